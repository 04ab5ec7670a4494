"""Rebuilds the newest policy and calibration from the log, and says whether they are what is stored."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from qoe_service.catalogue.models import Application
from qoe_service.decisions.learning import replay


class Command(BaseCommand):
    """``manage.py replay APP``; exit status 1 on a mismatch."""

    help = "Replay an application's log, and compare policy bytes and calibration rows with the stored ones."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("application")

    def handle(self, *_args: Any, **options: Any) -> None:
        application = Application.objects.filter(pk=options["application"]).first()
        if application is None:
            raise CommandError(f"no application {options['application']!r}")
        found = replay(application=application)
        if found is None:
            self.stdout.write(f"{application.pk}: no policy yet")
        elif found.mismatches:
            raise CommandError(f"{application.pk}: mismatch in {', '.join(found.mismatches)}")
        else:
            rebuilt = f"policy {found.sha256[:12]} and {len(found.calibration)} calibration rows"
            self.stdout.write(f"{application.pk}: match after {found.through} events: {rebuilt}")
