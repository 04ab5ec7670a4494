"""manage.py jobs APP [--follow] [--cancel ID] [--again ID]: what compression is doing, stopped and started over."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.utils import timezone

from qoe_service.catalogue import applications, jobs, tasks
from qoe_service.catalogue.models import Application, Job
from qoe_service.errors import ServiceError

POLL_S, SHOWN = 1.0, 40
OPEN = (Job.State.QUEUED, Job.State.RUNNING)


class Command(BaseCommand):
    help = "List an application's compression jobs, newest last, with progress and reasons; stop one, or start it over."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("application")
        parser.add_argument("--follow", action="store_true", help="go on until nothing waits or runs")
        parser.add_argument("--cancel", type=int, metavar="ID", help="stop this job and what waits for it")
        parser.add_argument("--again", type=int, metavar="ID", help="queue a job that ended without a result once more")

    def handle(self, *, application: str, follow: bool, cancel: int | None, again: int | None, **_: Any) -> None:
        try:
            owner = applications.get(application)
            if cancel is not None and not jobs.cancel(job_id=cancel, now=timezone.now(), actor="command"):
                raise CommandError(f"job {cancel} has ended already")
            if again is not None:
                jobs.run_again(job_id=again, now=timezone.now())
                tasks.wake_workers()
        except ServiceError as error:
            raise CommandError(f"{error.field}: {error.detail}") from None
        seen = self._list(owner, {})
        while follow and owner.jobs.filter(state__in=OPEN).exists():
            time.sleep(POLL_S)
            seen = self._list(owner, seen)

    def _list(self, application: Application, seen: dict[int, str]) -> dict[int, str]:
        """Print the newest jobs, as far as they changed since they were seen."""
        newest = application.jobs.select_related("base", "result").order_by("-id")[:SHOWN]
        lines = {job.pk: _line(job) for job in reversed(newest)}
        for number, line in lines.items():
            if seen.get(number) != line:
                self.stdout.write(line)
        return lines


def _line(job: Job) -> str:
    share = f" {job.progress:.0%}" if job.state == Job.State.RUNNING else ""
    outcome = f" → {job.result.name}" if job.result else f": {job.error}" if job.error else ""
    return f"{job.pk:>5} {job.state}{share:<5} {job.compression_pass} of {job.base.name}{outcome}"
