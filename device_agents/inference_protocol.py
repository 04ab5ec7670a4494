"""Codec of the Open Inference Protocol v2: JSON and the binary tensor extension, so that ``tritonclient`` works.

https://github.com/kserve/open-inference-protocol and Triton's binary_tensor_data extension. Knows neither HTTP
servers nor models beyond their tensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from device_agents.errors import BadRequest, RunFailed
from device_agents.runtime import DATATYPES, Array, Tensor

DTYPES: Mapping[str, np.dtype[Any]] = dict(DATATYPES.values())
DATATYPE_OF: Mapping[str, str] = {dtype.str: name for name, dtype in DTYPES.items()}
INTEGER_KINDS = "iu"
LARGEST_RANK = 16


@dataclass(frozen=True)
class RequestedOutput:
    """One output that the caller asked for, and in which form."""

    name: str
    is_binary: bool


@dataclass(frozen=True)
class InferenceRequest:
    """A decoded request. No ``outputs`` means all, each in the form that ``is_binary_default`` says."""

    inputs: dict[str, Array]
    id: str = ""
    outputs: tuple[RequestedOutput, ...] = ()
    is_binary_default: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedAnswer:
    """Body of an answer; ``json_size`` is set where binary tensors follow the JSON."""

    body: bytes
    json_size: int | None


def decode_request(body: bytes, *, json_size: int | None, inputs: Sequence[Tensor]) -> InferenceRequest:
    """Decodes a body; ``json_size`` is the header Inference-Header-Content-Length, None when it is absent.

    Raises BadRequest naming what is wrong. No content type is looked at: ``tritonclient`` sends none.
    """
    if json_size == 0:
        return _decode_raw(body, inputs)
    if json_size is not None and not 0 < json_size <= len(body):
        raise BadRequest(f"Inference-Header-Content-Length {json_size} does not fit a body of {len(body)} bytes")
    header = _object(_json(body[:json_size] if json_size else body), "the request")
    binary = _Binary(memoryview(body)[json_size:] if json_size else memoryview(b""))
    parameters = _object(header.get("parameters", {}), "parameters")
    decoded = {}
    for item in _items(header.get("inputs"), "inputs"):
        name, array = _decode_input(item, binary)
        if name in decoded:
            raise BadRequest(f"input {name} comes twice")
        decoded[name] = array
    binary.must_be_used_up()
    is_binary = parameters.get("binary_data_output") is True
    outputs = tuple(_requested(item, is_binary) for item in _items(header.get("outputs", []), "outputs"))
    return InferenceRequest(
        inputs=decoded,
        id=str(header.get("id", "")),
        outputs=outputs,
        is_binary_default=is_binary,
        parameters=parameters,
    )


def encode_answer(
    request: InferenceRequest, outputs: Mapping[str, Array], *, model_name: str, model_version: str
) -> EncodedAnswer:
    """Encodes the requested outputs. Raises BadRequest for an unknown output, RunFailed for NaN in JSON."""
    wanted = request.outputs or tuple(RequestedOutput(name, request.is_binary_default) for name in outputs)
    described: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for output in wanted:
        if output.name not in outputs:
            raise BadRequest(f"the model has no output {output.name}")
        array = outputs[output.name]
        datatype = DATATYPE_OF[array.dtype.str]
        entry: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": list(array.shape)}
        if output.is_binary:
            tail.append(to_bytes(array))
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        elif datatype == "FP16":
            raise BadRequest(f"output {output.name} is FP16, which JSON cannot carry: ask for binary data")
        else:
            entry["data"] = array.ravel().tolist()
        described.append(entry)
    answer: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    answer |= {"id": request.id} if request.id else {}
    try:
        head = json.dumps(answer | {"outputs": described}, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        raise RunFailed("an output holds NaN or infinity, which JSON cannot carry: ask for binary data") from error
    return EncodedAnswer(body=b"".join((head, *tail)), json_size=len(head) if tail else None)


def to_bytes(array: Array) -> bytes:
    """A tensor in row-major little-endian order; strings each behind their length in four bytes."""
    if array.dtype.kind != "O":
        return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
    texts = [text if isinstance(text, bytes) else str(text).encode() for text in array.ravel()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def from_bytes(content: memoryview, *, datatype: str, shape: tuple[int, ...], name: str) -> Array:
    """The reverse of ``to_bytes``; raises BadRequest when the sizes do not agree."""
    dtype = _dtype(datatype, name)
    count = math.prod(shape)
    if dtype.kind == "O":
        return np.array(_texts(content, count, name), dtype=object).reshape(shape)
    if len(content) != count * dtype.itemsize:
        raise BadRequest(f"input {name}: {len(content)} bytes for shape {list(shape)} of {datatype}")
    if not count:
        return np.empty(shape, dtype=dtype)
    return np.frombuffer(content, dtype=dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)


class _Binary:
    """The bytes behind the JSON, taken in the order of the inputs."""

    def __init__(self, content: memoryview) -> None:
        self._content = content

    def take(self, size: int, name: str) -> memoryview:
        if size > len(self._content):
            raise BadRequest(f"input {name}: {size} binary bytes are announced, {len(self._content)} are left")
        taken, self._content = self._content[:size], self._content[size:]
        return taken

    def must_be_used_up(self) -> None:
        if len(self._content):
            raise BadRequest(f"{len(self._content)} bytes behind the last input")


def _decode_input(item: dict[str, Any], binary: _Binary) -> tuple[str, Array]:
    name, datatype, shape = _text(item, "name"), _text(item, "datatype"), _shape(item)
    parameters = _object(item.get("parameters", {}), "parameters")
    if any(key.startswith("shared_memory") for key in parameters):
        raise BadRequest("shared memory is not served")
    if "binary_data_size" in parameters:
        size = parameters["binary_data_size"]
        if type(size) is not int or size < 0:
            raise BadRequest(f"input {name}: binary_data_size must be a whole number")
        return name, from_bytes(binary.take(size, name), datatype=datatype, shape=shape, name=name)
    if datatype == "FP16":
        raise BadRequest(f"input {name} is FP16, which JSON cannot carry: send binary data")
    return name, _from_json(item.get("data"), datatype=datatype, shape=shape, name=name)


def _decode_raw(body: bytes, inputs: Sequence[Tensor]) -> InferenceRequest:
    """The whole body is the single input of a batch of one."""
    if len(inputs) != 1:
        raise BadRequest("a body without JSON needs a model with one input")
    tensor = inputs[0]
    is_text = tensor.datatype == "BYTES"  # then the body is one string, without its length
    sizes = [1 if size < 0 and (is_text or index == 0) else size for index, size in enumerate(tensor.shape)]
    if is_text:
        if math.prod(sizes) != 1:
            raise BadRequest("a body without JSON is one string, the model takes more: send JSON with a shape")
        body = struct.pack("<I", len(body)) + body
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size > 0) * tensor.dtype.itemsize
        sizes[sizes.index(-1)] = len(body) // known if known else 0
    if -1 in sizes:
        raise BadRequest("the model leaves several sizes open: send JSON with a shape")
    array = from_bytes(memoryview(body), datatype=tensor.datatype, shape=tuple(sizes), name=tensor.name)
    return InferenceRequest(inputs={tensor.name: array}, is_binary_default=True)


def _from_json(data: Any, *, datatype: str, shape: tuple[int, ...], name: str) -> Array:
    dtype = _dtype(datatype, name)
    if not isinstance(data, list):
        raise BadRequest(f"input {name} has no data")
    is_text = dtype.kind == "O"
    array = np.array(_flat(data, name), dtype=object) if is_text else _numbers(data, dtype, datatype, name)
    if array.size != math.prod(shape):
        raise BadRequest(f"input {name} has {array.size} elements, its shape {list(shape)} says otherwise")
    return array.reshape(shape)


def _numbers(data: list[Any], dtype: np.dtype[Any], datatype: str, name: str) -> Array:
    try:
        natural = np.array(data) if data else np.array([], dtype=dtype)
    except (ValueError, OverflowError) as error:
        raise BadRequest(f"input {name}: the data is ragged or out of range") from error
    if datatype == "UINT64" and natural.dtype.kind == "f":
        # numpy takes small and very large whole numbers together for floats; exact is exact.
        exact = np.array(data, dtype=object)
        natural = (
            exact.astype(dtype) if all(type(value) is int and 0 <= value < 2**64 for value in exact.flat) else natural
        )
    allowed = {"f": "fiu", "b": "b"}.get(dtype.kind, INTEGER_KINDS)
    if natural.dtype.kind not in allowed:
        raise BadRequest(f"input {name}: the data is not {datatype}")
    if dtype.kind in INTEGER_KINDS and natural.size:
        limits = np.iinfo(dtype)
        if int(natural.min()) < limits.min or int(natural.max()) > limits.max:
            raise BadRequest(f"input {name}: a value does not fit {datatype}")
    with np.errstate(over="ignore"):
        array = natural.astype(dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise BadRequest(f"input {name}: a value does not fit {datatype}")
    return array


def _flat(data: list[Any], name: str) -> list[str]:
    flat: list[str] = []
    for element in data:
        if isinstance(element, list):
            flat.extend(_flat(element, name))
        elif isinstance(element, str):
            flat.append(element)
        else:
            raise BadRequest(f"input {name}: BYTES are written as strings")
    return flat


def _texts(content: memoryview, count: int, name: str) -> list[str]:
    texts: list[str] = []
    offset = 0
    while offset + 4 <= len(content) and len(texts) < count:
        (size,) = struct.unpack_from("<I", content, offset)
        text = content[offset + 4 : offset + 4 + size]
        if len(text) != size:
            break
        try:
            texts.append(str(text, "utf-8"))
        except UnicodeDecodeError as error:
            raise BadRequest(f"input {name}: strings must be UTF-8") from error
        offset += 4 + size
    if len(texts) != count or offset != len(content):
        raise BadRequest(f"input {name}: the bytes are not {count} strings behind their lengths")
    return texts


def _json(content: bytes) -> Any:
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{what} must be a JSON object")
    return value


def _items(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise BadRequest(f"{what} must be a list")
    return [_object(item, f"each of {what}") for item in value]


def _text(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"an input or output has no {key}")
    return value


def _shape(item: dict[str, Any]) -> tuple[int, ...]:
    shape = item.get("shape")
    is_shape = (
        isinstance(shape, list)
        and len(shape) <= LARGEST_RANK
        and all(type(size) is int and 0 <= size < 2**40 for size in shape)
    )
    if not is_shape:
        raise BadRequest(f"input {item.get('name')}: shape must be a list of sizes")
    return tuple(item["shape"])


def _requested(item: dict[str, Any], is_binary_default: bool) -> RequestedOutput:
    name, parameters = _text(item, "name"), _object(item.get("parameters", {}), "parameters")
    for key in parameters:
        if key == "classification" or key.startswith("shared_memory"):
            raise BadRequest(f"output {name}: the parameter {key} is not served, only binary_data is")
    return RequestedOutput(name, parameters.get("binary_data", is_binary_default) is True)


def _dtype(datatype: str, name: str) -> np.dtype[Any]:
    if datatype not in DTYPES:
        raise BadRequest(f"input {name}: datatype {datatype} is not served")
    return DTYPES[datatype]
