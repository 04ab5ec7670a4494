"""Prints a new enrolment token."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from qoe_service.errors import InvalidInput
from qoe_service.fleet import enrolment


class Command(BaseCommand):
    help = "Issue an enrolment token and print it; it cannot be shown again."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--label", default="command line", help="what the token is for")
        parser.add_argument("--uses", type=int, default=1, help="how many agents may enrol with it")
        parser.add_argument("--ttl", type=float, default=None, metavar="SECONDS", help="no end unless given")

    def handle(self, *, label: str, uses: int, ttl: float | None, **_: Any) -> None:
        try:
            token = enrolment.issue_token(label=label, uses=uses, ttl_s=ttl, actor="command", now=timezone.now())
        except InvalidInput as error:
            raise CommandError(f"{error.field} {error.detail}") from error
        self.stdout.write(token)
