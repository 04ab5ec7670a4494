"""The local inference server: Open Inference Protocol v2 as a raw ASGI app, served by uvicorn.

Routes and headers are here; bodies are ``bodies``' business, tensors ``inference_protocol``'s, running models is the
executor's.
Every error is JSON: {"error": "..."}.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import time
import zlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import Future
from typing import Any

from pydantic import ValidationError

from device_agents.bodies import BodyRoom, Receive
from device_agents.control import CONTROLLER_VERSION
from device_agents.errors import AgentError, BadRequest, NotFound, Overloaded
from device_agents.executor import Executor
from device_agents.inference_protocol import InferenceRequest, decode_request, encode_answer
from device_agents.lease import LEASE_ID_PREFIX
from device_agents.metrics import CodecDurations, model_statistics, prometheus_text
from device_agents.runtime import Tensor
from device_agents.served import Answer, ServedModel
from device_agents.spool import Kept
from device_agents.wire import Feedback

logger = logging.getLogger("qoe_agent.server")

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Reply = tuple[int, Headers, bytes]

JSON: tuple[bytes, bytes] = (b"content-type", b"application/json")
OCTETS: tuple[bytes, bytes] = (b"content-type", b"application/octet-stream")
MODEL_VERSION = "1"
EXTENSIONS = ["binary_tensor_data", "model_repository", "statistics", "model_configuration"]
DECODE_IN_THREAD_BYTES = 256 * 1024
RUN_IN_LOOP_MS = 0.2  # a run as short as this costs less than the two changes of threads that it would take elsewhere
GZIP = zlib.MAX_WBITS + 16  # as the module gzip, which an agent at rest need not hold in memory
COMPRESS_FROM_BYTES = 4096
FEEDBACK_RETRY_AFTER_S = 30.0


class InferenceServer:
    """An ASGI application over ``executors``, a live mapping from model name to executor."""

    def __init__(
        self,
        executors: Mapping[str, Executor],
        *,
        version: str,
        body_limit_bytes: int,
        accept_feedback: Callable[[Feedback], Kept] | None = None,
    ) -> None:
        self._executors = executors
        self._version = version
        self._bodies = BodyRoom(limit_bytes=body_limit_bytes)
        self._accept_feedback = accept_feedback
        self._codec: defaultdict[str, CodecDurations] = defaultdict(CodecDurations)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, one answer; nothing escapes as anything but JSON."""
        if scope["type"] != "http":
            return
        try:
            status, headers, body = await self._answer(scope, receive)
        except AgentError as error:
            status, headers, body = _error(error)
        except Exception:
            logger.exception("request failed path=%s", scope["path"])
            status, headers, body = _json({"error": "internal error"}, status=500)
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, scope: Scope, receive: Receive) -> Reply:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        with self._bodies.body() as place:
            return await self._routed(scope, headers, await place.read(headers, receive))

    async def _routed(self, scope: Scope, headers: Mapping[bytes, bytes], body: bytes) -> Reply:
        path = [part for part in scope["path"].split("/") if part]
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        match method, path:
            case "POST", ["v2", "models", model, *version, "infer"]:
                return await self._infer(self._executor(model, version), headers, body)
            case "GET", ["v2", "models", *rest]:
                return self._models(rest)
            case "POST", ["v2", "repository", *rest]:
                return self._repository(rest, body)
            case "POST", ["feedback"]:
                return await asyncio.to_thread(self._feedback, body)
            case "GET", _:
                return self._about(path)
        raise NotFound(f"there is no {method} {scope['path']}")

    def _about(self, path: list[str]) -> Reply:
        match path:
            case ["v2"]:
                return _json({"name": "qoe-agent", "version": self._version, "extensions": EXTENSIONS})
            case ["v2", "health", "live"]:
                return _json({"live": True})
            case ["v2", "health", "ready"]:
                is_ready = bool(self._executors) and all(e.served for e in list(self._executors.values()))
                return _json({"live": True, "ready": is_ready}, status=200 if is_ready else 503)
            case ["metrics"]:
                text = prometheus_text(list(self._executors.values()), self._codec)
                return 200, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")], text.encode()
        raise NotFound(f"there is no GET /{'/'.join(path)}")

    # -- models ------------------------------------------------------------------------------------------------------

    def _executor(self, model: str, version: list[str]) -> Executor:
        """``version`` is the part of the path that names one: nothing, or versions/1."""
        executor = self._executors.get(model)
        if executor is None or version not in ([], ["versions", MODEL_VERSION]):
            raise NotFound(f"unknown model {'/'.join([model, *version])}")
        return executor

    def _models(self, path: list[str]) -> Reply:
        match path:
            case ["stats"]:
                return _json({"model_stats": [self._statistics(e) for e in list(self._executors.values())]})
            case [model, "versions", version, *rest]:
                return self._describe(self._executor(model, ["versions", version]), rest)
            case [model, *rest]:
                return self._describe(self._executor(model, []), rest)
        raise NotFound("name a model")

    def _describe(self, executor: Executor, rest: list[str]) -> Reply:
        served = executor.served
        if rest == ["ready"]:
            ready = {"name": executor.model_name, "ready": served is not None}
            return _json(ready, status=200 if served else 503)
        if rest == ["stats"]:
            return _json({"model_stats": [self._statistics(executor)]})
        if served is None:
            raise Overloaded(f"model {executor.model_name} is not ready")
        if rest == ["config"]:
            return _json(_configuration(executor.model_name, served))
        if rest:
            raise NotFound(f"a model has no {'/'.join(rest)}")
        return _json(
            {
                "name": executor.model_name,
                "versions": [MODEL_VERSION],
                "platform": "onnxruntime_onnx",
                "inputs": [_tensor(tensor) for tensor in served.session.inputs],
                "outputs": [_tensor(tensor) for tensor in served.session.outputs],
            }
        )

    def _statistics(self, executor: Executor) -> dict[str, Any]:
        return model_statistics(executor, self._codec[executor.model_name])

    def _repository(self, rest: list[str], body: bytes) -> Reply:
        match rest:
            case ["index"]:
                wants_ready = bool(body.strip()) and _json_object(body).get("ready") is True
                entries = (_index_entry(executor) for executor in list(self._executors.values()))
                return _json([entry for entry in entries if not wants_ready or entry["state"] == "READY"])
            case ["models", model, "load" | "unload"]:
                self._executor(model, [])
                if self._accept_feedback is None:
                    raise BadRequest("this server belongs to no service: it serves the file that it was started with")
                raise BadRequest("the service decides which models are loaded here")
        raise NotFound(f"there is no POST /v2/repository/{'/'.join(rest)}")

    async def _infer(self, executor: Executor, headers: Mapping[bytes, bytes], body: bytes) -> Reply:
        served = executor.served
        if served is None:
            executor.statistics.failed("REJECTED")
            raise Overloaded(f"model {executor.model_name} is not ready")
        started_s = time.perf_counter()
        try:
            request = await _decoded(headers, body, served.session.inputs)
            decoded_s = time.perf_counter()
            answer = await _asked(executor, request)
        except AgentError as error:
            # After a swap an error does not tell which of the two models it came of: no decision beats a wrong one.
            return _error(error, served=served if executor.served is served else None)
        answered_s = time.perf_counter()
        try:
            encoded = encode_answer(
                request, answer.outputs, model_name=executor.model_name, model_version=MODEL_VERSION
            )
        except AgentError as error:
            return _error(error, served=answer.served)
        reply_headers: Headers = [OCTETS if encoded.json_size else JSON, *_origin(answer.served)]
        if encoded.json_size is not None:
            reply_headers.append((b"inference-header-content-length", str(encoded.json_size).encode()))
        reply_headers, content = _compressed(reply_headers, encoded.body, headers)
        self._codec[executor.model_name].add(
            input_ms=(decoded_s - started_s) * 1000, output_ms=(time.perf_counter() - answered_s) * 1000
        )
        return 200, reply_headers, content

    # -- feedback ----------------------------------------------------------------------------------------------------

    def _feedback(self, body: bytes) -> Reply:
        """Spools what an app says of a decision; the service gets it with the next batch."""
        if self._accept_feedback is None:
            raise NotFound("this server belongs to no service: there is nobody to tell")
        item = {"id": f"local-{secrets.token_hex(12)}"} | _json_object(body)
        try:
            feedback = Feedback.model_validate(item | {"lease_closed": False})
        except ValidationError as error:
            first = error.errors()[0]
            raise BadRequest(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        if feedback.rating is None and feedback.components is None:
            raise BadRequest("rating: a rating or components are needed")
        if feedback.id.startswith(LEASE_ID_PREFIX):
            raise BadRequest(f"id: ids that begin with {LEASE_ID_PREFIX} are the agent's own")
        kept = self._accept_feedback(feedback)
        if kept is Kept.LOST:
            raise Overloaded("the feedback could not be kept", retry_after_s=FEEDBACK_RETRY_AFTER_S)
        return _json({"id": feedback.id, "status": kept.value}, status=202)


def _json(content: Any, *, status: int = 200) -> Reply:
    return status, [JSON], json.dumps(content, separators=(",", ":")).encode()


def _error(error: AgentError, *, served: ServedModel | None = None) -> Reply:
    status, headers, body = _json({"error": error.reason}, status=error.status)
    if served is not None:
        headers += _origin(served)
    if isinstance(error, Overloaded):
        headers.append((b"retry-after", str(math.ceil(error.retry_after_s)).encode()))
    return status, headers, body


def _origin(served: ServedModel) -> Headers:
    """Which variant an answer or an error came of, and the decision to rate."""
    headers = [(b"x-model-digest", served.digest.encode())]
    if served.decision_id is not None:
        headers.append((b"x-decision-id", served.decision_id.encode()))
    return headers


async def _decoded(headers: Mapping[bytes, bytes], body: bytes, inputs: Sequence[Tensor]) -> InferenceRequest:
    json_size = _json_size(headers)
    if len(body) > DECODE_IN_THREAD_BYTES:
        return await asyncio.to_thread(decode_request, body, json_size=json_size, inputs=inputs)
    return decode_request(body, json_size=json_size, inputs=inputs)


async def _asked(executor: Executor, request: InferenceRequest) -> Answer:
    within_ms = _patience_ms(request.parameters)
    found = executor.answer_or_submit(request.inputs, within_ms=within_ms, own_thread_ms=RUN_IN_LOOP_MS)
    return await asyncio.wrap_future(found) if isinstance(found, Future) else found


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadRequest("the body must be a JSON object")
    return content


def _patience_ms(parameters: Mapping[str, Any]) -> float:
    """Triton's request parameter ``timeout``, in microseconds; zero or none is no limit."""
    timeout_us = parameters.get("timeout", 0)
    if type(timeout_us) is not int or timeout_us < 0:
        raise BadRequest("parameters: timeout must be a whole number of microseconds")
    return timeout_us / 1000 if timeout_us else math.inf


def _json_size(headers: Mapping[bytes, bytes]) -> int | None:
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not text.isdigit():
        raise BadRequest("Inference-Header-Content-Length must be a number")
    return int(text)


def _compressed(headers: Headers, body: bytes, request_headers: Mapping[bytes, bytes]) -> tuple[Headers, bytes]:
    if len(body) < COMPRESS_FROM_BYTES or b"gzip" not in request_headers.get(b"accept-encoding", b""):
        return headers, body
    return [*headers, (b"content-encoding", b"gzip")], zlib.compress(body, level=1, wbits=GZIP)


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def _configuration(model_name: str, served: ServedModel) -> dict[str, Any]:
    """The running configuration in Triton's words; shapes without the batch axis where there is one."""
    first = 1 if served.session.is_batchable else 0

    def described(tensor: Tensor) -> dict[str, Any]:
        datatype = "TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}"
        return {"name": tensor.name, "data_type": datatype, "dims": list(tensor.shape[first:])}

    return {
        "name": model_name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": served.configuration.max_batch if first else 0,
        "input": [described(tensor) for tensor in served.session.inputs],
        "output": [described(tensor) for tensor in served.session.outputs],
        "instance_group": [{"kind": "KIND_CPU", "count": served.configuration.max_concurrency}],
        "parameters": {
            "threads": {"string_value": str(served.configuration.threads)},
            "controller": {"string_value": CONTROLLER_VERSION if served.configuration.controller else "off"},
            "digest": {"string_value": served.digest},
        },
    }


def _index_entry(executor: Executor) -> dict[str, str]:
    state = "READY" if executor.served else "UNAVAILABLE"
    reason = "" if executor.served else "no variant yet"
    return {"name": executor.model_name, "version": MODEL_VERSION, "state": state, "reason": reason}
