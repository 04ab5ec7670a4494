"""Prints a new application key."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from django.utils import timezone

from qoe_service.fleet import keys


class Command(BaseCommand):
    help = "Issue a key with which apps may rate one application's decisions, and print it; it cannot be shown again."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("application", help="name of the application")
        parser.add_argument("--label", default="command line", help="which app the key is for")

    def handle(self, *, application: str, label: str, **_: Any) -> None:
        # fleet knows applications by name only, so a key may be issued before its application exists.
        self.stdout.write(
            keys.issue_application_key(application=application, label=label, actor="command", now=timezone.now())
        )
