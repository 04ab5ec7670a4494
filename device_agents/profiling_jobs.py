"""Profiling jobs: measures variants for the service while this device has nothing better to do.

The desired document names one variant and samples; both come by digest, verified like any variant. It is measured by
``qoe-agent profile`` in a process of its own, at low priority, which is killed as soon as the device is not idle any
more. What idle means is said in ``why_busy`` and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from pydantic import ValidationError

from device_agents.config import AgentConfig
from device_agents.delivery import Delivery, Fetch
from device_agents.errors import AgentError, AttemptFailed, Superseded
from device_agents.states import is_under_way
from device_agents.store import Store
from device_agents.telemetry import TelemetryReader
from device_agents.wire import (
    AccuracyReport,
    ApplicationReport,
    Hardware,
    Outcome,
    ProfileReport,
    ProfilingJob,
    ProfilingResult,
    ProfilingState,
    Telemetry,
    UpdateState,
    VariantReference,
)

logger = logging.getLogger("qoe_agent.profiling")

LONGEST_S = 600.0
TICK_S = 0.25
NICENESS = 10
SAMPLES_LIMIT_BYTES = 32 * 1024 * 1024
SAMPLES_BUDGET_BYTES = 2 * SAMPLES_LIMIT_BYTES
OUTPUT_LIMIT_BYTES = 65_536
RESULTS_KEPT = 16


@dataclass(frozen=True)
class Idleness:
    """When a device counts as idle: quiet for so long, little else to do, and enough energy."""

    quiet_s: float = 30.0
    rate_rps: float = 0.1
    load_share: float = 0.5
    battery_share: float = 0.5


def why_busy(telemetry: Telemetry, reports: Collection[ApplicationReport], limits: Idleness) -> str:
    """What keeps the device from measuring now; empty when it is idle.

    >>> why_busy(Telemetry(network="metered"), (), Idleness())
    'the network is metered'
    """
    if any(is_under_way(report.state) for report in reports):
        return "an update is under way"
    if is_asked(reports, limits):
        return "requests come in"
    if telemetry.cpu_load_share > limits.load_share:
        return f"others use {telemetry.cpu_load_share:.0%} of the processor"
    if telemetry.throttled:
        return "the processor is throttled"
    if (
        telemetry.battery_share is not None
        and not telemetry.charging
        and telemetry.battery_share < limits.battery_share
    ):
        return f"the battery is at {telemetry.battery_share:.0%} and not charging"
    return "the network is metered" if telemetry.network == "metered" else ""


def is_asked(reports: Collection[ApplicationReport], limits: Idleness) -> bool:
    """Whether apps use this device: more than one request in ten seconds, unless the limits say otherwise."""
    return sum(report.arrival_rate_rps for report in reports) > limits.rate_rps


class Measure(Protocol):
    """Measures a model file on samples. Raises AttemptFailed, or what ``go_on`` raises to end it early."""

    def __call__(self, model: Path, samples: Path, *, threads: int, go_on: Callable[[], None]) -> Measured: ...


@dataclass(frozen=True)
class Measured:
    """What one run of the command found."""

    profile: ProfileReport
    accuracy: AccuracyReport


class _NotIdle(Exception):
    """The device has something better to do: the job waits."""


class ProfilingJobs:
    """At most one job at a time, in a thread of its own. Results are kept on disk until the service has them.

    ``reports`` says what the applications do, ``in_use`` what must stay on disk; ``on_result`` is told of each end.
    """

    def __init__(
        self,
        config: AgentConfig,
        store: Store,
        *,
        fetch: Fetch,
        reports: Callable[[], Collection[ApplicationReport]],
        in_use: Callable[[], set[str]],
        read_hardware: Callable[[], Hardware],
        on_result: Callable[[], None],
        idleness: Idleness | None = None,
        measure: Measure | None = None,
    ) -> None:
        self._store = store
        # Samples are no variants: they have a folder of their own, and push none out.
        self._samples = Store(
            config.state_dir / "profiling",
            disk_budget_bytes=SAMPLES_BUDGET_BYTES,
            disk_reserve_bytes=config.disk_reserve_bytes,
        )
        self._fetch = fetch
        self._reports = reports
        self._in_use = in_use
        self._read_hardware = read_hardware
        self._on_result = on_result
        self._limits = idleness or Idleness()
        self._measure = measure or Command(config.cpu_quota_emulated)
        self._changed = threading.Condition()
        self._overtaken = threading.Event()
        self._job: ProfilingJob | None = None
        self._is_stopping = False
        self._asked_s = time.monotonic()
        self._told_at_once = RESULTS_KEPT
        self._thread: threading.Thread | None = None

    # -- for the agent -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to measure what it is told to."""
        self._thread = threading.Thread(target=self._work, name="profiling", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Gives up what is under way and ends the thread."""
        with self._changed:
            self._is_stopping = True
            self._overtaken.set()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(5.0)

    def order(self, job: ProfilingJob | None) -> None:
        """What the newest document asks for; another job, or none, ends the one under way."""
        if job is not None and any(result.job_id == job.job_id for result in self._store.profiling_results()):
            return  # measured, and about to be told
        with self._changed:
            if (job.job_id if job else None) != (self._job.job_id if self._job else None):
                self._job = job
                self._overtaken.set()
                self._changed.notify()

    def state(self, telemetry: Telemetry) -> ProfilingState:
        """What a check-in says of profiling."""
        busy_with, job = self._busy_with(telemetry), self._job
        return ProfilingState(
            is_idle=not busy_with,
            busy_with=busy_with[:256],
            job_id=job.job_id if job else None,
            results=self._store.profiling_results()[: self._told_at_once],
        )

    def acknowledge(self, told: ProfilingState) -> None:
        """The service has these results."""
        self._told_at_once = min(RESULTS_KEPT, self._told_at_once * 2)
        if told.results:
            self._forget(told.results)

    def refuse(self, told: ProfilingState, reason: str) -> None:
        """The service takes these results never, or not together: fewer are told next time, a single one is given up.

        What is refused for good must not block what is not.
        """
        if len(told.results) == 1:
            logger.warning("profiling result refused job=%s reason=%r", told.results[0].job_id, reason)
            self._forget(told.results)
        self._told_at_once = max(1, len(told.results) // 2)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        telemetry = TelemetryReader()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopping or self._job is not None)
                if self._is_stopping:
                    return
                job = self._job
                self._overtaken.clear()
            assert job is not None, "it was waited for"
            try:
                self._wait_until_idle(telemetry)
                self._finish(self._attempt(job))
            except (_NotIdle, Superseded) as reason:
                logger.info("profiling gives way job=%s reason=%s", job.job_id, reason)
            except Exception:
                # The top of a loop: the device serves on, and the service hears that nothing came of it.
                logger.exception("profiling failed job=%s", job.job_id)
                self._finish(ProfilingResult(job_id=job.job_id, error="internal error of the agent"))

    def _wait_until_idle(self, telemetry: TelemetryReader) -> None:
        while busy_with := self._busy_with(telemetry.read()):
            logger.debug("profiling waits reason=%s", busy_with)
            if self._overtaken.wait(max(TICK_S, min(1.0, self._limits.quiet_s))):
                raise Superseded("no longer asked for")

    def _busy_with(self, telemetry: Telemetry) -> str:
        reports = self._reports()
        if is_asked(reports, self._limits):
            self._asked_s = time.monotonic()
        busy_with = why_busy(telemetry, reports, self._limits)
        if not busy_with and time.monotonic() - self._asked_s < self._limits.quiet_s:
            return f"requests came in less than {self._limits.quiet_s:g} s ago"
        return busy_with

    def _go_on(self) -> None:
        """Raises when measuring must end at once. The processor's load is our own now, so it says nothing."""
        if self._overtaken.is_set():
            raise Superseded("no longer asked for")
        reports = self._reports()
        if is_asked(reports, self._limits) or any(is_under_way(report.state) for report in reports):
            raise _NotIdle("the device is needed")

    def _attempt(self, job: ProfilingJob) -> ProfilingResult:
        found, hardware = None, self._read_hardware()
        where = {"architecture": hardware.architecture, "isa": hardware.isa}
        try:
            if job.samples.size_bytes > SAMPLES_LIMIT_BYTES:
                raise AttemptFailed(f"samples of more than {SAMPLES_LIMIT_BYTES} bytes", outcome=Outcome.NO_SPACE)
            model = self._bring(self._store, job.variant, self._in_use)
            samples = self._bring(self._samples, job.samples, set)
            found = self._measure(model, samples, threads=job.threads, go_on=self._go_on)
            if found.profile.digest != job.variant.digest:
                raise AttemptFailed("another variant was measured", outcome=Outcome.VERIFY_FAILED)
        except Superseded:
            raise
        except AgentError as error:
            return ProfilingResult(job_id=job.job_id, error=error.reason[:1024], **where)
        except OSError as error:
            return ProfilingResult(job_id=job.job_id, error=f"the state folder fails: {error.strerror}", **where)
        self._store.save_profile(found.profile)
        return ProfilingResult(job_id=job.job_id, profile=found.profile, accuracy=found.accuracy, **where)

    def _bring(self, store: Store, variant: VariantReference, in_use: Callable[[], set[str]]) -> Path:
        """The verified file; Superseded or _NotIdle when something else came first."""

        def reached(_: UpdateState) -> None:
            self._go_on()

        Delivery(store, self._fetch, in_use=in_use, overtaken=self._overtaken, reached=reached).bring(variant)
        return store.artifact(variant.digest)

    def _finish(self, result: ProfilingResult) -> None:
        kept = [each for each in self._store.profiling_results() if each.job_id != result.job_id]
        self._keep([*kept, result])
        with self._changed:
            if self._job is not None and self._job.job_id == result.job_id:
                self._job = None
        logger.info("profiling ended job=%s error=%r", result.job_id, result.error)
        self._on_result()

    def _forget(self, results: Sequence[ProfilingResult]) -> None:
        gone = {result.job_id for result in results}
        self._keep([each for each in self._store.profiling_results() if each.job_id not in gone])

    def _keep(self, results: Sequence[ProfilingResult]) -> None:
        try:
            self._store.save_profiling_results(tuple(results[-RESULTS_KEPT:]))
        except OSError as error:
            logger.warning("profiling results not kept reason=%r", error.strerror)


class Command:
    """Runs ``qoe-agent profile`` as a process that gives way to all others, and is the first to go without memory."""

    def __init__(self, cpu_quota_emulated: float, *, longest_s: float = LONGEST_S, program: Sequence[str] = ()) -> None:
        self._quota = cpu_quota_emulated
        self._longest_s = longest_s
        self._program = program or (sys.executable, "-m", "device_agents")

    def __call__(self, model: Path, samples: Path, *, threads: int, go_on: Callable[[], None]) -> Measured:
        """See ``Measure``. A process that is no longer wanted, or takes too long, is killed."""
        flags = ["--json", "--threads", str(threads), "--samples", str(samples)]
        flags += ["--cpu-quota-emulated", str(self._quota)] if self._quota else []
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [*self._program, "profile", str(model), *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=_environment(),
                start_new_session=True,
            )
            try:
                _step_back(process.pid)
                self._wait(process, go_on)
            finally:
                _kill(process)
            return _read(process.returncode, _tail(output), _tail(errors))

    def _wait(self, process: subprocess.Popen[bytes], go_on: Callable[[], None]) -> None:
        until_s = time.monotonic() + self._longest_s
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TICK_S)
                return
            go_on()
            if time.monotonic() > until_s:
                raise AttemptFailed(f"took longer than {self._longest_s:g} s", outcome=Outcome.INCOMPATIBLE)


def _tail(file: IO[bytes]) -> bytes:
    file.seek(max(0, file.seek(0, os.SEEK_END) - OUTPUT_LIMIT_BYTES))
    return file.read()


def _environment() -> dict[str, str]:
    """Ours without the agent's settings: a model needs no credential. The command is found where we were."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("QOE_AGENT_")}
    here = str(Path(__file__).resolve().parent.parent)
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (here, kept.get("PYTHONPATH", ""))))}


def _step_back(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(status: int, output: bytes, errors: bytes) -> Measured:
    if status != 0:
        said = errors.decode(errors="replace").strip().splitlines()
        reason = said[-1].removeprefix("qoe-agent: ") if said else f"the measurement ended with status {status}"
        raise AttemptFailed(reason[:1024], outcome=Outcome.INCOMPATIBLE)
    try:
        found = json.loads(output)
        return Measured(ProfileReport.model_validate(found), AccuracyReport.model_validate(found["accuracy"]))
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise AttemptFailed("the measurement gave no answer", outcome=Outcome.INCOMPATIBLE) from error
