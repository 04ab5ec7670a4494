"""Data sets of applications: checked in the sandbox, kept as artifacts."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from django.db import transaction

from qoe_service.catalogue import artifacts, sandbox
from qoe_service.catalogue.models import Application, Artifact
from qoe_service.errors import InvalidInput, TooLarge

GIVEN, FILE_NAME = "given.npz", "data.npz"
MAX_BYTES = 2**30


def import_dataset(
    *,
    path: Path,
    now: datetime,
    labels_key: str = "",
    inputs_key: str = "",
    watch: sandbox.Watch | None = None,
) -> Artifact:
    """Keep an .npz as calibration and held-out data. Raises InvalidInput, TooLarge.

    A file with calibration_inputs and heldout_inputs is kept as it is; of any other, ``inputs_key`` and ``labels_key``
    name the arrays, and a split that follows from the bytes alone makes both parts.
    """
    check_file(path, field="data", max_bytes=MAX_BYTES)
    with sandbox.opened() as box:
        try:
            _put_data(box, path, labels_key, inputs_key, watch)
            box.ask({"command": "describe-data"}, watch=watch)
            with box.open(FILE_NAME) as checked:
                return artifacts.store(checked, now=now)
        except sandbox.Refused as refusal:
            raise InvalidInput(str(refusal), field="data") from None


def replace(*, application: Application, dataset: Artifact) -> bool:
    """Give an application this data set; whether it is another one than before."""
    with transaction.atomic():
        is_new = in_use(application) != dataset.pk
        application.dataset = dataset
        application.save(update_fields=["dataset"])
    return is_new


def in_use(application: Application) -> str | None:
    """Digest of the data set that the application has now, and keeps until the caller's transaction ends."""
    rows = Application.objects.select_for_update(no_key=True)
    return rows.values_list("dataset_id", flat=True).get(pk=application.pk)


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


def _put_data(box: sandbox.Sandbox, path: Path, labels_key: str, inputs_key: str, watch: sandbox.Watch | None) -> None:
    box.add(GIVEN, path.open("rb"))
    request: dict[str, Any] = {"command": "split-data", "labels_key": labels_key, "inputs_key": inputs_key}
    if box.ask(request, program="sandboxed.intake", watch=watch)["is_split"]:
        (box.folder / GIVEN).rename(box.folder / FILE_NAME)
