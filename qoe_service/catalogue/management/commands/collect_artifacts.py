"""manage.py collect_artifacts [--dry-run]: removes stored bytes that nothing refers to any more."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand
from django.utils import timezone

from qoe_service.catalogue import collection


class Command(BaseCommand):
    help = "Remove artifacts that no row names, files that no artifact is, and parts of uploads that have ended."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="only say what would go")

    def handle(self, *, dry_run: bool, **_: Any) -> None:
        collected = collection.collect(now=timezone.now(), is_dry_run=dry_run)
        for each in collected:
            self.stdout.write(f"{each.name} {each.size_bytes} bytes: {each.reason}")
        verb = "would free" if dry_run else "freed"
        self.stdout.write(f"{verb} {sum(each.size_bytes for each in collected)} bytes in {len(collected)} files")
