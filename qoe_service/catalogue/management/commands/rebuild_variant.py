"""manage.py rebuild_variant APP VARIANT: makes a derived variant again from its provenance, and compares the bytes."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from qoe_service.catalogue import applications, compression, retirement, sandbox
from qoe_service.errors import ServiceError


class Command(BaseCommand):
    help = "Make a derived variant again from its provenance; says whether the bytes are the same, and changes nothing."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("application")
        parser.add_argument("variant")

    def handle(self, *, application: str, variant: str, **_: Any) -> None:
        try:
            found = retirement.get(applications.get(application), variant)
            digest = compression.rebuilt(variant=found)
        except ServiceError as error:
            raise CommandError(f"{error.field}: {error.detail}") from None
        except sandbox.Refused as refusal:
            raise CommandError(str(refusal)) from None
        if digest != found.artifact_id:
            by = ", ".join(f"{name} {version}" for name, version in found.provenance["versions"].items())
            raise CommandError(f"other bytes, {digest}; it was made with {by} on {found.provenance['isa']}")
        self.stdout.write(f"{variant} {digest}: the same bytes")
