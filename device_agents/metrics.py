"""What a model has done so far, as Triton's statistics JSON and as Prometheus text with Triton's names."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from device_agents.control import Plan
from device_agents.executor import Executor
from device_agents.scheduling import SloScheduler
from device_agents.statistics import Duration
from device_agents.telemetry import package_energy_j

ZERO = Duration()
Row = tuple[str, float]


@dataclass
class CodecDurations:
    """What the server took to decode requests and encode their answers; callers in this process need neither."""

    input: Duration = field(default_factory=Duration)
    output: Duration = field(default_factory=Duration)

    def add(self, *, input_ms: float, output_ms: float) -> None:
        """Counts one request that was answered."""
        self.input.add(input_ms)
        self.output.add(output_ms)


UNUSED = CodecDurations()


def model_statistics(executor: Executor, codec: CodecDurations = UNUSED) -> dict[str, Any]:
    """One entry of the statistics extension. Per batch size only the runs are timed."""
    statistics, control = executor.statistics, _control(executor)
    with statistics.lock:
        failed = Duration(count=statistics.failures.total())
        return {
            "name": executor.model_name,
            "version": "1",
            "last_inference": statistics.last_inference_ms,
            "inference_count": statistics.inferences,
            "execution_count": statistics.runs,
            "inference_stats": {
                "success": _pair(statistics.success),
                "fail": _pair(failed),
                "queue": _pair(statistics.queue),
                "compute_input": _pair(codec.input),
                "compute_infer": _pair(statistics.infer),
                "compute_output": _pair(codec.output),
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": _pair(ZERO),
                    "compute_infer": _pair(duration),
                    "compute_output": _pair(ZERO),
                }
                for size, duration in sorted(statistics.batches.items())
            ],
            "slo_stats": control,
        }


def prometheus_text(executors: Sequence[Executor], codecs: Mapping[str, CodecDurations] | None = None) -> str:
    """All metrics in the text format 0.0.4; ``codecs`` by model name."""
    counters: dict[str, list[Row]] = {}
    for executor in executors:
        for name, labels, value in _counters(executor, (codecs or {}).get(executor.model_name, UNUSED)):
            counters.setdefault(name, []).append((labels, value))
    memory = psutil.virtual_memory()
    lately = {executor: executor.statistics.lately(time.monotonic()) for executor in executors}
    gauges: dict[str, list[Row]] = {
        "nv_inference_pending_request_count": [(_labels(e), float(e.pending)) for e in executors],
        "qoe_model_ready": [(_labels(e), float(e.served is not None)) for e in executors],
        "qoe_arrival_rate_rps": [(_labels(e), e.arrival_rate_rps()) for e in executors],
        "qoe_goodput_rps": [(_labels(e), each.goodput_rps) for e, each in lately.items()],
        "qoe_slo_miss_share": [(_labels(e), each.miss_share) for e, each in lately.items()],
        "qoe_utility": [(_labels(e), each.utility) for e, each in lately.items() if each.utility is not None],
        "qoe_effective_batch_limit": [(_labels(e), float(bounds.batch)) for e, bounds in _bounds(executors)],
        "qoe_effective_concurrency": [(_labels(e), float(bounds.concurrency)) for e, bounds in _bounds(executors)],
        "qoe_lease_active_seconds": [(_labels(e), _lease_s(e)) for e in executors],
        "nv_cpu_utilization": [("", psutil.cpu_percent() / 100)],  # since the last look, as Triton has it
        "nv_cpu_memory_total_bytes": [("", float(memory.total))],
        "nv_cpu_memory_used_bytes": [("", float(memory.total - memory.available))],
        "process_resident_memory_bytes": [("", float(psutil.Process().memory_info().rss))],
        "process_cpu_seconds_total": [("", time.process_time())],
    }
    if (energy_j := package_energy_j()) is not None:
        counters["qoe_package_energy_joules_total"] = [("", energy_j)]
    lines = [*_lines("counter", counters), *_lines("gauge", gauges)]
    return "\n".join(lines) + "\n"


def _counters(executor: Executor, codec: CodecDurations) -> list[tuple[str, str, float]]:
    statistics, labels = executor.statistics, _labels(executor)
    with statistics.lock:
        rows: list[tuple[str, str, float]] = [
            ("nv_inference_request_success", labels, statistics.success.count),
            ("nv_inference_count", labels, statistics.inferences),
            ("nv_inference_exec_count", labels, statistics.runs),
            ("nv_inference_request_duration_us", labels, statistics.success.ns / 1000),
            ("nv_inference_queue_duration_us", labels, statistics.queue.ns / 1000),
            ("nv_inference_compute_input_duration_us", labels, codec.input.ns / 1000),
            ("nv_inference_compute_infer_duration_us", labels, statistics.infer.ns / 1000),
            ("nv_inference_compute_output_duration_us", labels, codec.output.ns / 1000),
            ("qoe_inference_cpu_seconds_total", labels, statistics.cpu_ms / 1000),
            ("qoe_slo_hits_total", labels, statistics.in_time),
            ("qoe_slo_late_total", labels, statistics.late),
            ("qoe_slo_shed_total", labels, statistics.shed_requests),
        ]
        for reason in ("REJECTED", "BACKEND", "OTHER"):
            failed = f'{labels[:-1]},reason="{reason}"}}'
            rows.append(("nv_inference_request_failure", failed, statistics.failures[reason]))
        for size, duration in sorted(statistics.batches.items()):
            rows.append(("qoe_batch_runs_total", f'{labels[:-1]},batch_size="{size}"}}', duration.count))
    return rows


def _bounds(executors: Sequence[Executor]) -> list[tuple[Executor, Plan]]:
    """The controller's own bounds, where there is one."""
    return [(each, each.scheduler.bounds) for each in executors if isinstance(each.scheduler, SloScheduler)]


def _control(executor: Executor) -> dict[str, Any]:
    """How the SLO is met, and what the controller does about it: an entry of our own beside Triton's."""
    statistics, lately = executor.statistics, executor.statistics.lately(time.monotonic())
    found: dict[str, Any] = {
        "in_time": statistics.in_time,
        "late": statistics.late,
        "shed": statistics.shed_requests,
        "goodput_rps": lately.goodput_rps,
        "miss_share": lately.miss_share,
        "utility": lately.utility,
        "controller": executor.scheduler.version if executor.scheduler else "",
    }
    for _, bounds in _bounds([executor]):
        found |= {"batch": bounds.batch, "concurrency": bounds.concurrency, "is_overloaded": bounds.is_overloaded}
    return found


def _lease_s(executor: Executor) -> float:
    served = executor.served
    return served.account.active_s(time.monotonic()) if served else 0.0


def _labels(executor: Executor) -> str:
    # Model names are wire Names: letters, digits, dot, dash and underscore, so nothing needs escaping.
    return f'{{model="{executor.model_name}",version="1"}}'


def _lines(kind: str, families: dict[str, list[Row]]) -> Iterable[str]:
    for name, rows in families.items():
        yield f"# TYPE {name} {kind}"
        for labels, value in rows:
            yield f"{name}{labels} {value:.10g}"


def _pair(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}
