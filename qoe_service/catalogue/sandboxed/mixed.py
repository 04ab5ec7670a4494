"""8-bit but for the layers that suffer most: found by leaving each out in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx

from . import activations, cost, int8
from . import graph as graphs
from .interface import Task
from .memory import Held
from .refusal import Refusal

SAMPLES, MOST_LAYERS = 64, 16
WORTH = 0.25  # a layer in single precision is slower; it must take at least this share of the error away


class MixedInt8(int8.StaticInt8):
    """Static int8 in which the layers with the largest quantisation error stay in single precision."""

    name = "mixed-int8"

    def held_bytes(self, layers: Held, task: Task) -> int:
        """It runs the model on as many rows as its answers are compared on."""
        return max(super().held_bytes(layers, task), activations.ANSWERS_BATCH * layers.at_once)

    def apply(self, task: Task) -> None:
        """Calibrate once, then quantise again and again, each time without one layer."""
        assert task.data is not None
        model = graphs.prepare(task.source, int8.PREPARED)
        samples = task.data.calibration_inputs[: task.parameters["calibration_samples"]]
        int8.calibrate(samples, model.graph.input[0].name, str(task.parameters["ranges"]), task)
        check = samples[-SAMPLES:]
        (answer,) = activations.outputs_of(model, check)

        def error(leave_out: Sequence[str]) -> float:
            int8.insert_pairs(task.target, task.parameters, leave_out)
            (changed,) = activations.outputs_of(onnx.load(task.target), check)
            return float(((changed - answer) ** 2).mean() / max(answer.var(), 1e-30))

        chosen = worst_layers(model, error, float(task.parameters["keep_share"]), task.tell)
        int8.insert_pairs(task.target, task.parameters, chosen)


def worst_layers(
    model: onnx.ModelProto, error: Callable[[Sequence[str]], float], keep_share: float, tell: Callable[[float], None]
) -> list[str]:
    """Names of nodes to keep in single precision: at most ``keep_share`` of all multiplications, worst first."""
    shapes = cost.shapes_of(model)
    costs = {node.name: cost.multiplications(node, shapes) for node in model.graph.node}
    layers = [node.name for node in model.graph.node if node.op_type in int8.LAYERS and costs[node.name] > 0]
    allowed = keep_share * sum(costs.values())
    affordable = [name for name in layers if costs[name] <= allowed][:MOST_LAYERS]
    if not affordable or len(layers) < 2:
        raise Refusal(f"mixed-int8 does not help here: every layer costs more than {keep_share:.0%} of the whole")
    before = error(())
    alone = {}
    for number, name in enumerate(affordable):
        tell(0.6 + 0.4 * number / len(affordable))
        alone[name] = error((name,))
    chosen, spent = list[str](), 0.0
    for name in sorted(affordable, key=lambda name: (alone[name], name)):
        gain = 1 - alone[name] / max(before, 1e-30)
        if gain < WORTH or spent + costs[name] > allowed:
            continue
        chosen.append(name)
        spent += costs[name]
    if not chosen:
        best = max(1 - min(alone.values()) / max(before, 1e-30), 0.0)
        raise Refusal(
            f"mixed-int8 does not help here: leaving out the worst affordable layer takes only {best:.0%} of the "
            f"quantisation error away ({np.sqrt(before):.1%} of the answer's spread)"
        )
    return chosen
