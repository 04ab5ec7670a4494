"""manage.py doctor: which promises of the sandbox and of the artifact store this machine can keep."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from qoe_service.catalogue import diagnosis


class Command(BaseCommand):
    help = "Try every limit of the sandbox and the artifact storage for real, and say which hold on this machine."

    def handle(self, **_: Any) -> None:
        findings = diagnosis.examine()
        for each in findings:
            self.stdout.write(f"{each.what}: {'real' if each.is_real else 'NOT REAL'}: {each.detail}")
        missing = [each.what for each in findings if each.is_needed and not each.is_real]
        if missing:
            raise CommandError(f"cannot work safely here: {', '.join(missing)}")
