"""manage.py import_model APP FILE [--data FILE.npz] [--name NAME] [--passes family] [--base VARIANT] [--wait]."""

from __future__ import annotations

import functools
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.utils import timezone

from qoe_service.catalogue import (
    accuracies,
    applications,
    compression,
    datasets,
    imports,
    jobs,
    packages,
    tasks,
    uploads,
)
from qoe_service.catalogue.models import Application, Job, Variant
from qoe_service.catalogue.passes import PASSES, WHOLE_FAMILY
from qoe_service.errors import ServiceError


class Command(BaseCommand):
    help = "Check and measure a model, keep it as a variant, and queue compression passes over it."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("application")
        parser.add_argument(
            "file",
            type=Path,
            help=".onnx; a folder or .zip of one with its external data; an .ortpackage, as a folder or zip",
        )
        parser.add_argument("--name", help="name of the variant; the file's name unless given")
        parser.add_argument("--precision", default="fp32")
        parser.add_argument("--base", default="", help="the variant that this one was trained to stand in for")
        parser.add_argument("--passes", default="", help=f"comma separated: {WHOLE_FAMILY}, {', '.join(PASSES)}")
        parser.add_argument("--data", type=Path, help=".npz; becomes the application's data set")
        parser.add_argument("--labels-key", default="", help="the array in --data that holds the labels")
        parser.add_argument("--inputs-key", default="", help="the array in --data that holds the inputs")
        parser.add_argument("--wait", action="store_true", help="run the passes here instead of in a worker")

    def handle(self, *, application: str, file: Path, passes: str, wait: bool, **options: Any) -> None:
        wanted = [each.strip() for each in passes.split(",") if each.strip()]
        try:
            owner = applications.get(application)
            if options["data"]:
                self._take_data(owner, options)
            variants = self._take_models(owner, file, wanted, options)
        except ServiceError as error:
            raise CommandError(f"{error.field}: {error.detail}") from None
        for variant in variants:
            self._tell(variant)
        if wait:
            for variant in variants:
                self._run_jobs(variant)
        else:
            tasks.wake_workers()
            if owner.jobs.filter(state=Job.State.QUEUED).exists():
                self.stderr.write(f"jobs wait for a worker: manage.py jobs {application} --follow")

    def _take_data(self, application: Application, options: dict[str, Any]) -> None:
        keys = {"labels_key": options["labels_key"], "inputs_key": options["inputs_key"]}
        dataset = datasets.import_dataset(path=options["data"], now=timezone.now(), **keys)
        if datasets.replace(application=application, dataset=dataset):
            jobs.queue_all_accuracies(application=application, now=timezone.now())

    def _take_models(
        self, application: Application, file: Path, passes: list[str], options: dict[str, Any]
    ) -> list[Variant]:
        if uploads.kind_of(f"{file.name}.zip" if file.is_dir() else file.name) == "package":
            with packages.as_zip(file) as path:
                found = packages.import_package(application=application, path=path, passes=passes, now=timezone.now())
            for note in found.notes:
                self.stderr.write(f"left out: {note}")
            return list(found.variants)
        with packages.as_zip(file) as path:  # a folder holds a graph and its external data
            variant = imports.import_model(
                application=application,
                path=path,
                name=options["name"] or file.stem,
                precision=options["precision"],
                base=options["base"],
                passes=passes,
                now=timezone.now(),
                watch=functools.partial(self._tell_progress, "checked and measured"),
            )
        return [variant]

    def _run_jobs(self, variant: Variant) -> None:
        while (job := jobs.next_in_family(variant)) is not None:
            tell = functools.partial(self._tell_progress, f"{job.compression_pass} of {job.base.name}")
            ended = compression.run(job_id=job.pk, clock=timezone.now, tell=tell)
            if ended is None:
                self.stdout.write(f"{job.compression_pass}: left to the worker that runs jobs already")
                return
            if ended.result is not None:
                self._tell(ended.result)
            elif ended.state != Job.State.CANCELLED:
                self.stdout.write(f"{job.compression_pass}: {ended.state}: {ended.error}")

    def _tell_progress(self, what: str, share: float) -> bool:
        """On a terminal, one line that changes; nothing where it would fill a log."""
        if self.stdout.isatty():
            self.stdout.write(f"{share:>5.0%} {what:<70}", ending="\r")
        return True

    def _tell(self, variant: Variant) -> None:
        known, accuracy = accuracies.of_variant(variant), "not measured"
        if known is not None:
            interval = f"{known.low:.4f} to {known.high:.4f}"
            accuracy = f"{known.value:.4f} ({variant.accuracy_kind}, {interval}, {known.samples} samples)"
        self.stdout.write(f"{variant.name} {variant.artifact_id} accuracy {accuracy}")
