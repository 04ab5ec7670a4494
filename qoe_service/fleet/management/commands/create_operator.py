"""Creates the first operator of the console."""

from __future__ import annotations

import secrets
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandParser
from django.db import IntegrityError, transaction
from django.utils import timezone

from qoe_service.fleet import audit


class Command(BaseCommand):
    help = "Create an operator and print the generated password, once; an operator that exists is left alone."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--username", default="operator")

    def handle(self, *, username: str, **_: Any) -> None:
        password = secrets.token_urlsafe(12)
        try:
            with transaction.atomic():
                get_user_model().objects.create_superuser(username, password=password)
                audit.record(
                    actor="command", verb="create_operator", subject=f"operator:{username}", now=timezone.now()
                )
        except IntegrityError:
            self.stdout.write(f"operator {username} exists")
            return
        self.stdout.write(f"operator {username} password {password}")
