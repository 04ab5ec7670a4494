"""Graph clean-up: constants folded, shapes fixed, dead and repeated nodes gone. The function stays what it was."""

from __future__ import annotations

import contextlib
import io

import onnx

from . import checks
from .datasets import Dataset
from .interface import Pass, Task
from .refusal import Refusal

CUSTOM_DOMAINS = frozenset({"com.microsoft"})
LEFT_OVER = frozenset(
    {"Constant", "Identity", "Shape", "Unsqueeze", "BatchNormalization", "Dropout", "ConstantOfShape"}
)


class CleanUp(Pass):
    """For exported graphs, which carry arithmetic on shapes and unfolded normalisations."""

    name = "clean-up"
    uses_calibration = False

    def why_not(self, model: onnx.ModelProto, data: Dataset | None) -> str | None:  # noqa: ARG002 - needs no data
        """Contrib operators confuse the shape inference it relies on."""
        found = sorted({node.op_type for node in model.graph.node if node.domain in CUSTOM_DOMAINS})
        return f"the model uses operators of ONNX Runtime's own ({', '.join(found)})" if found else None

    def apply(self, task: Task) -> None:
        """Slim; refuse when nothing went away."""
        model = checks.read(task.source)
        before = len(model.graph.node)
        slim = slimmed(model)
        if len(slim.graph.node) >= before:
            raise Refusal(f"clean-up does not help here: all {before} nodes are needed")
        onnx.save(slim, task.target)


def tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Cleaned, if anything in it is left over from its export; the model itself otherwise."""
    return slimmed(model) if any(node.op_type in LEFT_OVER for node in model.graph.node) else model


def slimmed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A cleaned copy; the model itself where the cleaner cannot cope with it."""
    import onnxslim  # noqa: PLC0415 - takes half a second to load, and most models need none of it

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # it prints tables for people, and stops the program on some models
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        slim = onnxslim.slim(copy)
        if isinstance(slim, onnx.ModelProto):
            del slim.graph.value_info[:]
            slim.ClearField("metadata_props")
            return slim
    return model
