"""manage.py create_application FILE.json [--data FILE.npz]: creates or updates an application."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.utils import timezone

from qoe_service.catalogue import applications, datasets
from qoe_service.errors import ServiceError


class Command(BaseCommand):
    help = "Create an application from a JSON file, or bring it to this definition."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("file", type=Path, help="the definition; see docs/catalogue.md")
        parser.add_argument("--data", type=Path, help=".npz with calibration and held-out data")

    def handle(self, *, file: Path, data: Path | None, **_: Any) -> None:
        now = timezone.now()
        try:
            record = json.loads(file.read_text())
            dataset = datasets.import_dataset(path=data, now=now) if data else None
            application = applications.define(record=record, dataset=dataset, now=now)
        except (OSError, ValueError) as error:
            raise CommandError(f"{file}: {error}") from None
        except ServiceError as error:
            raise CommandError(f"{error.field}: {error.detail}") from None
        self.stdout.write(f"application {application.name} is defined")
