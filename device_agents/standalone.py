"""One ONNX file without a service: what ``qoe-agent serve`` and ``qoe-agent profile`` stand on."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from pydantic import ValidationError

from device_agents.config import AgentConfig
from device_agents.errors import BadConfiguration
from device_agents.executor import Executor
from device_agents.lease import LeaseAccount
from device_agents.profiler import Warmed, warm_up
from device_agents.runtime import EmulatedQuota
from device_agents.served import ServedModel
from device_agents.wire import ProfileReport, ServingConfiguration

PROFILE_BUDGET_S = 1.5
NO_SLO_MS = 3_600_000.0


def load(
    path: Path,
    *,
    model_name: str,
    config: AgentConfig,
    max_batch: int,
    max_concurrency: int,
    threads: int,
    slo_p95_ms: float | None = None,
) -> Executor:
    """An executor that serves one file. Raises AttemptFailed when the file cannot be served, BadConfiguration for
    numbers that cannot be, such as more threads than cores.

    With an SLO the controller chooses batch and concurrency inside the bounds, and sheds what would come too late.
    """
    _require_cores(threads)
    try:
        configuration = ServingConfiguration(
            max_batch=max_batch, max_concurrency=max_concurrency, threads=threads, controller=slo_p95_ms is not None
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise BadConfiguration(f"{first['loc'][0]}: {first['msg']}") from error
    warmed = _warmed(path, config=config, threads=threads, max_batch=max_batch, budget_s=config.profile_budget_s)
    executor = Executor(model_name, queue_requests=config.queue_requests)
    now_s = time.monotonic()
    executor.swap(
        ServedModel(
            session=warmed.session,
            configuration=configuration,
            digest=_digest(path),
            decision_id=None,
            account=LeaseAccount(slo_p95_ms=slo_p95_ms or NO_SLO_MS, started_s=now_s),
            started_s=now_s,
        )
    )
    return executor


def profile(path: Path, *, threads: int, config: AgentConfig) -> ProfileReport:
    """Measures one file; raises AttemptFailed when it cannot be run, BadConfiguration for more threads than cores."""
    _require_cores(threads)
    warmed = _warmed(path, config=config, threads=threads, max_batch=16, budget_s=PROFILE_BUDGET_S)
    assert warmed.profile is not None, "an unknown variant is always measured"
    return warmed.profile


def _require_cores(threads: int) -> None:
    cores = len(os.sched_getaffinity(0))
    if not 1 <= threads <= cores:
        raise BadConfiguration(f"--threads {threads}: must be 1 to {cores}, the cores that this process may use")


def _warmed(path: Path, *, config: AgentConfig, threads: int, max_batch: int, budget_s: float) -> Warmed:
    if not path.is_file():
        raise BadConfiguration(f"{path} is a folder" if path.is_dir() else f"there is no file {path}")
    quota = EmulatedQuota(config.cpu_quota_emulated) if config.cpu_quota_emulated else None
    return warm_up(path, digest=_digest(path), threads=threads, max_batch=max_batch, budget_s=budget_s, quota=quota)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
