"""ONNX Runtime sessions: how they are opened, what they take and give, and what one run costs. Nothing is queued here.

Sessions run one graph sequentially with the threads they are given and without spinning; concurrency comes from
several callers of one session, which costs no second copy of the weights.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from device_agents.errors import AttemptFailed, RunFailed
from device_agents.wire import Outcome

# ONNX Runtime reports usage to its makers unless told otherwise before it is loaded; a device reports to its service.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from device_agents.containers import open_session

Array = NDArray[Any]

SHORT_MS = 0.5
SAMPLED = 8
SMALL_SHARE = 4
SHRINK_AFTER_S = 5.0

# ONNX Runtime's names of element types, and what the Open Inference Protocol and numpy call them.
DATATYPES: Mapping[str, tuple[str, np.dtype[Any]]] = {
    "tensor(bool)": ("BOOL", np.dtype(np.bool_)),
    "tensor(uint8)": ("UINT8", np.dtype(np.uint8)),
    "tensor(uint16)": ("UINT16", np.dtype(np.uint16)),
    "tensor(uint32)": ("UINT32", np.dtype(np.uint32)),
    "tensor(uint64)": ("UINT64", np.dtype(np.uint64)),
    "tensor(int8)": ("INT8", np.dtype(np.int8)),
    "tensor(int16)": ("INT16", np.dtype(np.int16)),
    "tensor(int32)": ("INT32", np.dtype(np.int32)),
    "tensor(int64)": ("INT64", np.dtype(np.int64)),
    "tensor(float16)": ("FP16", np.dtype(np.float16)),
    "tensor(float)": ("FP32", np.dtype(np.float32)),
    "tensor(double)": ("FP64", np.dtype(np.float64)),
    "tensor(string)": ("BYTES", np.dtype(np.object_)),
}


@dataclass(frozen=True)
class Tensor:
    """Name, Open Inference datatype and shape of one input or output; -1 where the model leaves a size open."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of its elements."""
        return next(dtype for datatype, dtype in DATATYPES.values() if datatype == self.datatype)


class RunCost(NamedTuple):
    """What one run took: wall time, and CPU time of this process that belongs to it."""

    service_ms: float
    cpu_ms: float


class EmulatedQuota:
    """EMULATED processor of ``share`` of one core, for hosts that do not permit cgroups.

    Runs pay for their measured CPU time by sleeping before they answer, one after the other, so that CPU time by
    wall time stays at or below ``share``. Work outside of runs (HTTP, check-ins) is not limited: a cgroup is the
    real thing, and a device that uses this says so in a label.
    """

    def __init__(self, share: float, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._share = share
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def pay(self, *, started_s: float, cpu_s: float) -> None:
        """Sleeps until a processor of that share would have finished the run that began at ``started_s``."""
        with self._lock:
            self._free_at_s = max(self._free_at_s, started_s) + cpu_s / self._share
            wait_s = self._free_at_s - time.monotonic()
        if wait_s > 0:
            self._sleep(wait_s)


class Session:
    """One loaded variant with a fixed number of threads. ``run`` may be called from many threads at once."""

    def __init__(self, path: Path, *, threads: int, quota: EmulatedQuota | None = None) -> None:
        started_s = time.monotonic()
        try:
            self._session = open_session(path, _options(threads))
        except Exception as error:
            raise AttemptFailed(f"cannot be loaded: {_first_line(error)}", outcome=Outcome.INCOMPATIBLE) from error
        self.threads = threads
        self.inputs = tuple(_tensor(argument) for argument in self._session.get_inputs())
        self.outputs = tuple(_tensor(argument) for argument in self._session.get_outputs())
        self.load_ms = (time.monotonic() - started_s) * 1000
        # What a run of n rows takes, as (ms per row, ms): a guess that favours batches, until the warm-up measures it.
        self.line = (0.2, 0.8)
        self._output_names = [output.name for output in self.outputs]
        self.is_batchable = all(tensor.shape[:1] == (-1,) for tensor in (*self.inputs, *self.outputs))
        """Whether requests can be joined along axis 0: every input and output leaves its first size open."""
        self._quota = quota
        self._running = 0
        self._runs = 0
        self._is_short = False
        self._cpu_share = 1.0
        self._largest_bytes, self._swelled_s = 0, -math.inf

    @property
    def signature(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What callers depend on: equal signatures can replace each other under traffic."""
        return self.inputs, self.outputs

    def run(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], RunCost]:
        """One run; raises RunFailed.

        Asking for CPU time costs as much as the shortest runs do: of those, one in ``SAMPLED`` is asked about.
        """
        self._runs += 1
        if self._is_short and self._quota is None and self._runs % SAMPLED:
            return self._run_unsampled(inputs)
        return self.run_timed(inputs)

    def run_timed(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], RunCost]:
        """One run whose CPU time is asked for however short it is: exact with one thread, else its part of the
        process's. Raises RunFailed."""
        options = self._run_options(inputs)
        clock = time.thread_time if self.threads == 1 else time.process_time
        self._running += 1
        started_s, cpu_started_s = time.monotonic(), clock()
        try:
            outputs = self._session.run(self._output_names, dict(inputs), options)
        except Exception as error:
            raise RunFailed(_first_line(error)) from error
        finally:
            cpu_s = (clock() - cpu_started_s) / (1 if self.threads == 1 else max(1, self._running))
            self._running -= 1
            if self._quota is not None:
                self._quota.pay(started_s=started_s, cpu_s=cpu_s)
        cost = RunCost(service_ms=(time.monotonic() - started_s) * 1000, cpu_ms=cpu_s * 1000)
        self._is_short = cost.service_ms < SHORT_MS
        self._cpu_share = cost.cpu_ms / max(cost.service_ms, 1e-6)
        return dict(zip(self._output_names, outputs, strict=True)), cost

    def _run_options(self, inputs: Mapping[str, Array]) -> ort.RunOptions | None:
        """Gives memory back at the end of the first small run some time after a large one.

        ONNX Runtime's arena keeps what its largest run ever needed; shrinking it costs that run next to nothing.
        """
        now_s, size = time.monotonic(), sum(array.nbytes for array in inputs.values())
        if size * SMALL_SHARE > self._largest_bytes:
            self._largest_bytes, self._swelled_s = max(size, self._largest_bytes), now_s
            return None
        if now_s - self._swelled_s < SHRINK_AFTER_S:
            return None
        self._largest_bytes, self._swelled_s = size, now_s
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options

    def _run_unsampled(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], RunCost]:
        """A short run; its CPU time by the share of the last that was asked about. One that took long against
        expectation was held up, not busy."""
        options = self._run_options(inputs)
        started_s = time.monotonic()
        try:
            outputs = self._session.run(self._output_names, dict(inputs), options)
        except Exception as error:
            raise RunFailed(_first_line(error)) from error
        service_ms = (time.monotonic() - started_s) * 1000
        self._is_short = service_ms < SHORT_MS
        cost = RunCost(service_ms=service_ms, cpu_ms=min(service_ms, SHORT_MS) * self._cpu_share)
        return dict(zip(self._output_names, outputs, strict=True)), cost


def runtime_version() -> str:
    """Name and version of the runtime, for reports."""
    return f"onnxruntime {ort.__version__}"


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Spinning halves latency at four times the CPU per request, and starves neighbours (docs/agent.md).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _tensor(argument: Any) -> Tensor:
    if argument.type not in DATATYPES:
        raise AttemptFailed(f"{argument.name} is {argument.type}, not a known tensor", outcome=Outcome.INCOMPATIBLE)
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in argument.shape)
    return Tensor(name=argument.name, datatype=DATATYPES[argument.type][0], shape=shape)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:500]
