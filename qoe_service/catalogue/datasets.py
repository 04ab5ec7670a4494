"""Data sets of applications: checked in the sandbox, kept as artifacts."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from qoe_service.catalogue import artifacts, sandbox
from qoe_service.catalogue.models import Application, Artifact
from qoe_service.errors import InvalidInput, TooLarge

FILE_NAME = "data.npz"
MAX_BYTES = 2**30


def import_dataset(*, path: Path, now: datetime) -> Artifact:
    """Keep an .npz with calibration_inputs, heldout_inputs and heldout_labels. Raises InvalidInput, TooLarge."""
    check_file(path, field="data", max_bytes=MAX_BYTES)
    with sandbox.opened() as box:
        box.add(FILE_NAME, path.open("rb"))
        try:
            box.ask({"command": "describe-data"})
            with box.open(FILE_NAME) as checked:
                return artifacts.store(checked, now=now)
        except sandbox.Refused as refusal:
            raise InvalidInput(str(refusal), field="data") from None


def add_to(box: sandbox.Sandbox, application: Application) -> None:
    """Put the application's data set into a sandbox, if it has one."""
    if application.dataset_id:
        box.add(FILE_NAME, artifacts.open_for_reading(application.dataset_id))


def check_file(path: Path, *, field: str, max_bytes: int) -> None:
    """Raises InvalidInput or TooLarge before a byte is read."""
    if not path.is_file():
        raise InvalidInput(f"there is no file {str(path)!r}", field=field)
    if path.stat().st_size > max_bytes:
        raise TooLarge(f"{path.name} is larger than {max_bytes} bytes", field=field)
