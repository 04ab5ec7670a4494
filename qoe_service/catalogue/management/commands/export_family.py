"""manage.py export_family APP FILE [--format zip|ortpackage]: all variants in use as one file."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from qoe_service.catalogue import applications, packages
from qoe_service.errors import ServiceError


class Command(BaseCommand):
    help = "Write an application's variants as a zip with a manifest, or as a zipped ONNX Runtime model package."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("application")
        parser.add_argument("file", type=Path)
        parser.add_argument("--format", default="zip", choices=packages.FORMATS)

    def handle(self, *, application: str, file: Path, format: str, **_: Any) -> None:  # noqa: A002 - argparse names it
        try:
            chunks = packages.export(applications.get(application), format)
            with file.open("xb") as target:
                for chunk in chunks:
                    target.write(chunk)
        except FileExistsError:
            raise CommandError(f"{file} exists already") from None
        except ServiceError as error:
            raise CommandError(f"{error.field}: {error.detail}") from None
        self.stdout.write(f"{file} {file.stat().st_size} bytes")
