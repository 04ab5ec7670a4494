"""manage.py give_role USERNAME viewer|editor|owner: who may change a catalogue, and who only looks."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.utils import timezone

from qoe_service.catalogue import roles
from qoe_service.errors import ServiceError


class Command(BaseCommand):
    help = "Make an operator a viewer (looks), an editor (hands in, retires, bans) or an owner (everything)."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("username")
        parser.add_argument("role", choices=roles.ROLES)

    def handle(self, *, username: str, role: str, **_: Any) -> None:
        try:
            roles.give(username=username, role=role, actor="command", now=timezone.now())
        except ServiceError as error:
            raise CommandError(f"{error.field}: {error.detail}") from None
        self.stdout.write(f"{username} is {'an' if role != roles.VIEWER else 'a'} {role}")
