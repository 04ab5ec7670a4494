"""What a service needs for the demo: token, applications with their data, keys, models. Safe to run again.

Models come one by one: the safe baseline, so that devices have something to run early, then the largest, because its
compression takes longest.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo import models
from demo.processes import ROOT
from demo.service import Service

DEFINITIONS = ROOT / "demo" / "applications"
TOKEN_USES = 100
# Static int8 for the convolutional networks; the dense one is quantised both ways.
PASSES = {"digits": ("static-int8",), "parity": ("dynamic-int8", "static-int8")}
APPLICATIONS = tuple(PASSES)


def main(arguments: Sequence[str]) -> int:
    """`python -m demo install`: fill the service that the environment names, without starting anything.

    The environment's DATABASE_URL, REDIS_URL and DATA_DIR say which service; its worker does the compression.
    """
    parser = argparse.ArgumentParser(prog="python -m demo install", description="Fill a service with the demo.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="for tokens, keys and built models")
    folder = parser.parse_args(arguments).data
    service = Service(Path(os.environ.get("DATA_DIR", folder / "service")), port=0)
    installation = Installation(service, Secrets(folder / "secrets"), folder / "models")
    service.manage("migrate", "--verbosity", "0")
    print(service.manage("create_operator"))
    installation.issue_token()
    for application in APPLICATIONS:
        installation.issue_key(application)
        for name in installation.fill(application):
            print(f"{name} imported")
    return 0


@dataclass(frozen=True)
class Secrets:
    """Tokens and keys that this demo was given, readable by its owner alone."""

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name

    def keep(self, name: str, make: Callable[[], str]) -> None:
        """Store what `make` returns unless it is there already."""
        if self.path(name).exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        secret = make()
        with os.fdopen(os.open(self.path(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret)


@dataclass(frozen=True)
class Installation:
    """One service being filled; `folder` keeps data sets and the models that are built rather than committed."""

    service: Service
    secrets: Secrets
    folder: Path
    only_baseline: bool = False

    def data(self, application: str) -> Path:
        """The application's calibration and held-out data as one file."""
        path = self.folder / f"{application}.npz"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            arrays = models.load_data("digits" if application == "digits" else "parity")
            partial = path.with_suffix(".part.npz")
            np.savez_compressed(partial, **vars(arrays))
            os.replace(partial, path)
        return path

    def issue_token(self) -> None:
        self.secrets.keep(
            "enrolment-token", lambda: self.service.manage("issue_token", "--label", "demo", "--uses", str(TOKEN_USES))
        )

    def issue_key(self, application: str) -> None:
        """The key that the application's apps rate with; it may be there before the application."""
        self.secrets.keep(
            f"key-{application}", lambda: self.service.manage("issue_key", application, "--label", "demo app")
        )

    def fill(self, application: str) -> Iterator[str]:
        """Define the application, import its base models one by one and queue their compression; yields each name."""
        self.define(application)
        for path in self.model_files(application):
            passes = [] if self.only_baseline else ["--passes", ",".join(PASSES[application])]
            self.service.manage("import_model", application, str(path), "--name", path.stem, *passes)
            yield path.stem

    def family(self, application: str) -> list[tuple[Path, dict[str, Any]]]:
        """The same with compression done here; each variant's file and what the exported manifest says of it."""
        self.define(application)
        for path in self.model_files(application):
            passes = ",".join(PASSES[application])
            self.service.manage(
                "import_model", application, str(path), "--name", path.stem, "--passes", passes, "--wait"
            )
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            archive = Path(scratch) / "family.zip"
            self.service.manage("export_family", application, str(archive))
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(self.folder)
        folder = self.folder / application
        manifest = json.loads((folder / "manifest.json").read_text())
        return [(folder / row["file"], row) for row in manifest["variants"]]

    def define(self, application: str) -> None:
        data = self.data(application)
        definition = self.folder / f"{application}.json"
        definition.write_text(json.dumps(self.definition(application)))
        self.service.manage("create_application", str(definition), "--data", str(data))

    def definition(self, application: str) -> dict[str, Any]:
        """The application as it is committed; with `only_baseline`, its safe choice and no other."""
        definition = read_definition(application)
        if self.only_baseline:
            definition["configurations"] = [definition["baseline"]["configuration"]]
        return definition

    def model_files(self, application: str) -> list[Path]:
        """The base models, the baseline first and then the largest; the dense one is built at its first use."""
        if application == "digits":
            paths = [model.path for model in models.digits_models()]
        else:
            paths = [models.parity_model(self.folder).path]
        baseline = read_definition(application)["baseline"]["variant"]
        ordered = sorted(paths, key=lambda path: (path.stem != baseline, -path.stat().st_size))
        return ordered[:1] if self.only_baseline else ordered


def read_definition(application: str) -> dict[str, Any]:
    """The application as an operator would write it down."""
    definition: dict[str, Any] = json.loads((DEFINITIONS / f"{application}.json").read_text())
    return definition
