"""One model handed in, its whole family measured by two workers: how long it takes, and how soon a job can be stopped.

Runs the service's own functions on a database and a folder of its own.
``python -m benchmarks.compression_family FOLDER MODEL DATA`` prints one JSON line.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORK = "--work"
RECORD = {
    "name": "digits",
    "title": "Digits",
    "slo_p95_ms": 100.0,
    "configurations": [{"max_batch": 1, "max_concurrency": 1, "threads": 1}],
    "lease_s": 60.0,
}


def set_up(folder: Path) -> None:
    """Django on a database in ``folder``."""
    import django  # noqa: PLC0415 - not before the environment is set

    os.environ.update(
        DJANGO_SETTINGS_MODULE="qoe_service.settings", DATA_DIR=str(folder), COMPRESSION_JOBS="2", LOG_LEVEL="ERROR"
    )
    django.setup()


def work() -> None:
    """A worker: run what is runnable until nothing is open."""
    from django.utils import timezone  # noqa: PLC0415 - after set_up

    from qoe_service.catalogue import compression, jobs  # noqa: PLC0415
    from qoe_service.catalogue.models import Job  # noqa: PLC0415

    open_states = (Job.State.QUEUED, Job.State.RUNNING)
    while Job.objects.filter(state__in=open_states).exists():
        for job_id in jobs.runnable(now=timezone.now()):
            compression.run(job_id=job_id, clock=timezone.now)
        time.sleep(0.2)


def measure(folder: Path, model: Path, data: Path) -> dict[str, Any]:
    """Import, derive, measure, cancel; what became of it."""
    from django.core.management import call_command  # noqa: PLC0415 - after set_up
    from django.utils import timezone  # noqa: PLC0415

    from qoe_service.catalogue import applications, datasets, imports, jobs  # noqa: PLC0415
    from qoe_service.catalogue.models import Job, Variant  # noqa: PLC0415

    call_command("migrate", verbosity=0)
    dataset = datasets.import_dataset(path=data, now=timezone.now())
    application = applications.define(record=RECORD, dataset=dataset, now=timezone.now())
    started = time.monotonic()
    base = imports.import_model(application=application, path=model, name="base", passes=["family"], now=timezone.now())
    steps = _run_workers(folder)
    seconds = time.monotonic() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    states = {str(state): Job.objects.filter(state=state).count() for state in Job.State}
    whole, stored = _bytes(Variant)
    return {
        "family_seconds": round(seconds, 1),
        "family_cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "family_bytes": whole,
        "family_stored_bytes": stored,
        "model_bytes": model.stat().st_size,
        "variants": Variant.objects.count(),
        "measured": Variant.objects.filter(profiles__device=None).distinct().count(),
        "jobs": {name: count for name, count in states.items() if count},
        "progress_steps": steps,
        "cancel_seconds": _cancel_seconds(folder, base, jobs, Job),
    }


def _bytes(variants: Any) -> tuple[int, int]:
    """What all variants have as files of their own, and what they take where equal weights are kept once."""
    from qoe_service.catalogue.models import Piece  # noqa: PLC0415 - after set_up

    whole, pieces = 0, set[tuple[str, int]]()
    for digest, size in variants.objects.values_list("artifact", "artifact__size_bytes"):
        whole += size
        found = Piece.objects.filter(whole=digest).values_list("stored", "stored__size_bytes")
        pieces |= set(found) or {(digest, size)}
    return whole, sum(size for _, size in pieces)


def _run_workers(folder: Path) -> int:
    """Two workers to the end; how often some running job's progress was seen to have moved."""
    from qoe_service.catalogue.models import Job  # noqa: PLC0415 - after set_up

    workers = [_worker(folder) for _ in range(2)]
    seen: set[tuple[int, float]] = set()
    while any(worker.poll() is None for worker in workers):
        seen |= set(Job.objects.filter(state=Job.State.RUNNING).values_list("pk", "progress"))
        time.sleep(0.5)
    return len(seen)


def _worker(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.compression_family", WORK, str(folder)]
    return subprocess.Popen(command)


def _cancel_seconds(folder: Path, base: Any, jobs: Any, rows: Any) -> float:
    """From asking to stop a running job until its worker has let go."""
    from django.utils import timezone  # noqa: PLC0415 - after set_up

    parameters = {"calibration_samples": 256, "most_error": 1.0, "keep_cost": 0.2}
    job = jobs.queue(base=base, compression_pass="prune", parameters=parameters, now=timezone.now())
    worker = _worker(folder)
    while not rows.objects.filter(pk=job.pk, state=rows.State.RUNNING, progress__gt=0).exists():
        if worker.poll() is not None:
            return -1.0
        time.sleep(0.05)
    started = time.monotonic()
    jobs.cancel(job_id=job.pk, now=timezone.now())
    worker.wait()
    return round(time.monotonic() - started, 2)


def main(argv: Sequence[str]) -> None:
    if argv[0] == WORK:
        set_up(Path(argv[1]))
        work()
        return
    folder, model, data = (Path(each) for each in argv)
    set_up(folder)
    print(json.dumps(measure(folder, model, data)))


if __name__ == "__main__":
    main(sys.argv[1:])
