"""manage.py send_model APP FILE --service URL [--user NAME]: hands a file to a service elsewhere, in parts."""

from __future__ import annotations

import getpass
import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from django.core.management.base import BaseCommand, CommandError

from qoe_service.catalogue.sending import Sender
from qoe_service.errors import ServiceError


class Command(BaseCommand):
    help = "Send a model, a data set or a package to a service elsewhere; started again, it goes on where it stopped."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("application")
        parser.add_argument("file", type=Path, help=".onnx, .zip, .npz or .ortpackage.zip")
        parser.add_argument("--service", required=True, metavar="URL")
        parser.add_argument("--user", default="operator", help="the password is asked for, or read from a pipe")
        for name in ("name", "precision", "base", "labels-key", "inputs-key"):
            parser.add_argument(f"--{name}", default="")
        parser.add_argument("--passes", default="", help="comma separated, or family")

    def handle(self, *, application: str, file: Path, service: str, user: str, **given: Any) -> None:
        options: dict[str, Any] = {
            name: given[name] for name in ("name", "precision", "base", "labels_key", "inputs_key") if given[name]
        }
        options["passes"] = [each.strip() for each in given["passes"].split(",") if each.strip()]
        password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
        try:
            with httpx.Client(base_url=service, timeout=60) as http:
                sender = Sender(http)
                sender.log_in(user, password)
                upload = sender.send(application=application, path=file, options=options, report=self._report)
        except (OSError, httpx.HTTPError) as error:
            raise CommandError(str(error)) from None
        except ServiceError as error:
            raise CommandError(f"{error.field}: {error.detail}" if error.field else error.detail) from None
        if upload["state"] != "done":
            raise CommandError(f"{upload['state']}: {upload['error']}")

    def _report(self, upload: Mapping[str, Any]) -> None:
        share = upload["received_bytes"] / upload["size_bytes"]
        sent = f" {share:.0%} sent" if upload["state"] == "receiving" else ""
        variant = f": {upload['variant']}" if upload["variant"] else ""
        self.stdout.write(f"{upload['state']}{sent}{variant}")
