"""manage.py import_model APP FILE.onnx --name NAME [--passes static-int8,dynamic-int8] [--wait]."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db.models import Q
from django.utils import timezone

from qoe_service.catalogue import applications, compression, imports, tasks
from qoe_service.catalogue.models import Job, Variant
from qoe_service.errors import ServiceError


class Command(BaseCommand):
    help = "Check and measure an ONNX model, keep it as a variant, and queue compression passes over it."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("application")
        parser.add_argument("file", type=Path)
        parser.add_argument("--name", help="name of the variant; the file's name unless given")
        parser.add_argument("--precision", default="fp32")
        parser.add_argument("--passes", default="", help=f"comma separated: {', '.join(compression.PASSES)}")
        parser.add_argument("--wait", action="store_true", help="run the passes here instead of in a worker")

    def handle(
        self, *, application: str, file: Path, name: str | None, precision: str, passes: str, wait: bool, **_: Any
    ) -> None:
        try:
            variant = imports.import_model(
                application=applications.get(application),
                path=file,
                name=name or file.stem,
                precision=precision,
                passes=[each.strip() for each in passes.split(",") if each.strip()],
                now=timezone.now(),
            )
        except ServiceError as error:
            raise CommandError(f"{error.field}: {error.detail}") from None
        self._tell(variant)
        if wait:
            self._run_jobs(variant)
        else:
            tasks.wake_workers()

    def _run_jobs(self, variant: Variant) -> None:
        family = Q(base=variant) | Q(base__base=variant)
        while job := Job.objects.filter(family, state=Job.State.QUEUED).first():
            ended = compression.run(job_id=job.pk, clock=timezone.now)
            if ended is None:
                self.stdout.write(f"{job.compression_pass}: left to the worker that runs jobs already")
                return
            if ended.result is not None:
                self._tell(ended.result)
            else:
                self.stdout.write(f"{job.compression_pass}: {ended.state}: {ended.error}")

    def _tell(self, variant: Variant) -> None:
        accuracy = "not measured" if variant.accuracy is None else f"{variant.accuracy:.4f}"
        self.stdout.write(f"{variant.name} {variant.artifact_id} accuracy {accuracy}")
