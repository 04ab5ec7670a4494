"""Brings what people hand in into the one shape that everything else reads: one ONNX file, one data set.

Reads request.json, writes result.json, as ``__main__`` does; here are the commands that come before any check.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import packages
from .refusal import Refusal

MODEL, GIVEN, DATA = Path("model.onnx"), Path("given.npz"), Path("data.npz")
MAX_MODEL_BYTES = 2 * 2**30 - 1  # the bound of one protobuf message
MAX_UNPACKED_BYTES = 2**30
SPLIT_NAMES = ("calibration_inputs", "heldout_inputs")
LABEL_NAMES = ("heldout_labels", "labels", "label", "targets", "target", "y")
INPUT_NAMES = ("inputs", "input", "images", "data", "features", "x")
CALIBRATION_SHARE, MAX_CALIBRATION = 0.25, 512
SEED = 20_240_229


def split_data(request: Mapping[str, Any]) -> dict[str, Any]:
    """Make data.npz of given.npz, unless that has both parts already."""
    with _opened(GIVEN) as file:
        names = list(file.files)
        if set(SPLIT_NAMES) <= set(names) and not request["inputs_key"]:
            labels_key = request["labels_key"]
            if not labels_key or labels_key == "heldout_labels":
                return {"is_split": True}
            arrays = {name: _array(file, name) for name in (*SPLIT_NAMES, _present(labels_key, names))}
            _write(arrays[SPLIT_NAMES[0]], arrays[SPLIT_NAMES[1]], arrays[labels_key])
            return {"is_split": False}
        labels_key = _chosen(request["labels_key"], LABEL_NAMES, names)
        inputs_key = _inputs_key(request["inputs_key"], labels_key, names)
        inputs = _array(file, inputs_key)
        labels = _array(file, labels_key) if labels_key else None
    _split(inputs, labels, inputs_key, labels_key)
    return {"is_split": False}


def join_model(request: Mapping[str, Any]) -> dict[str, Any]:
    """Make one file of a zip that holds a graph and its external data."""
    packages.unpack(Path(request["bundle"]), Path("bundle"))
    Path(request["bundle"]).unlink()  # large models: three copies at a time are enough
    graph = packages.only_graph(Path("bundle"))
    import onnx  # noqa: PLC0415 - data sets, and most zips that are refused, need no ONNX
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # noqa: PLC0415 - ships no types

    try:
        packages.join(graph, MODEL, at_most=request.get("at_most", packages.MAX_MODEL_BYTES))
    except DecodeError:
        raise Refusal(f"{graph.name} is not an ONNX file, or it is truncated") from None
    except (onnx.checker.ValidationError, OSError) as error:
        raise Refusal(f"its external data cannot be read: {error}"[:500]) from None
    shutil.rmtree("bundle")
    return {"joined": graph.name}


def unpack_package(request: Mapping[str, Any]) -> dict[str, Any]:
    """Make one file of each variant of a model package; says what they are."""
    packages.unpack(Path(request["bundle"]), Path("bundle"))
    return {"variants": packages.variants_of(packages.root_of(Path("bundle")))}


def _opened(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:
        raise Refusal("the data set is not an .npz file, or it is truncated") from None
    if unpacked > MAX_UNPACKED_BYTES:
        raise Refusal(f"the data set unpacks to {unpacked} bytes; at most {MAX_UNPACKED_BYTES} are taken")
    return np.load(path, allow_pickle=False)


def _array(file: Any, name: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = file[name]
    except ValueError as error:
        raise Refusal(f"{name} cannot be read without running its pickle, which is never done: {error}") from None
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise Refusal(f"{name} is damaged: {error}") from None
    return array


def _present(name: str, names: list[str]) -> str:
    if name not in names:
        raise Refusal(f"the data set has no array named {name}; it has {', '.join(sorted(names))[:300]}")
    return name


def _chosen(wanted: str, usual: tuple[str, ...], names: list[str]) -> str:
    """The array that is asked for, else the one with a usual name; empty when there is none."""
    if wanted:
        return _present(wanted, names)
    by_lower = {name.lower(): name for name in names}
    return next((by_lower[name] for name in usual if name in by_lower), "")


def _inputs_key(wanted: str, labels_key: str, names: list[str]) -> str:
    found = _chosen(wanted, INPUT_NAMES, [name for name in names if name != labels_key])
    rest = [name for name in names if name != labels_key]
    if found or len(rest) == 1:
        return found or rest[0]
    missing = [name for name in (*SPLIT_NAMES, "heldout_labels") if name not in names]
    raise Refusal(
        f"the data set has no array named {' or '.join(missing)}, and which of {', '.join(sorted(names))[:300]} "
        "are the inputs is not clear; name them with an inputs key"
    )


def _split(inputs: NDArray[Any], labels: NDArray[Any] | None, inputs_key: str, labels_key: str) -> None:
    if inputs.ndim < 2 or len(inputs) < 2:
        raise Refusal(f"{inputs_key} is shaped {list(inputs.shape)}; [samples, ...] with two samples or more is needed")
    if labels is not None and len(labels) != len(inputs):
        raise Refusal(f"{labels_key} has {len(labels)} rows and {inputs_key} {len(inputs)}")
    order = np.random.default_rng(SEED).permutation(len(inputs))
    count = min(max(int(len(inputs) * CALIBRATION_SHARE), 1), MAX_CALIBRATION)
    heldout = np.sort(order[count:])
    _write(inputs[np.sort(order[:count])], inputs[heldout], None if labels is None else labels[heldout])


def _write(calibration: NDArray[Any], heldout: NDArray[Any], labels: NDArray[Any] | None) -> None:
    arrays: dict[str, Any] = {"calibration_inputs": calibration, "heldout_inputs": heldout}
    if labels is not None:
        arrays["heldout_labels"] = labels
    np.savez(DATA, **arrays)


COMMANDS = {"split-data": split_data, "join-model": join_model, "unpack-package": unpack_package}


def main() -> None:
    """Answer the request."""
    request = json.loads(Path("request.json").read_text())
    try:
        answer = COMMANDS[request["command"]](request)
    except Refusal as refusal:
        answer = {"refusal": str(refusal)}
    except Exception as error:  # noqa: BLE001 - libraries raise anything on odd files; all of it is a refusal
        answer = {"refusal": f"{type(error).__name__}: {error}"[:1000]}
    Path("result.json").write_text(json.dumps(answer, allow_nan=False))


if __name__ == "__main__":
    main()
