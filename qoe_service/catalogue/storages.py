"""Where bytes are kept under names: a folder, or a bucket of S3-compatible storage. What they mean, others know."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from django.conf import settings
from django.core.files import File
from django.core.files.storage import FileSystemStorage, Storage

from qoe_service.errors import Unavailable

if TYPE_CHECKING:
    from storages.backends.s3 import S3Storage

_MISSING = {"404", "NoSuchKey", "NotFound"}


class Kept(NamedTuple):
    """One stored file."""

    name: str
    size_bytes: int
    changed_at: datetime


def save(name: str, content: File[bytes]) -> None:
    """Keep a file under this name. Writing a name twice writes the same bytes twice, so overwriting is safe."""
    _asked(lambda: storage().save(name, content))
    if not settings.ARTIFACT_BUCKET:
        _sync_folder(name)


def size(name: str) -> int | None:
    """How long a file is; None where there is none."""
    try:
        return int(_asked(lambda: storage().size(name)))
    except FileNotFoundError:
        return None


def read(name: str, start: int = 0, stop: int | None = None) -> BinaryIO:
    """A file from byte ``start`` on; from a bucket only the bytes up to ``stop`` come. Raises FileNotFoundError."""
    if settings.ARTIFACT_BUCKET:
        last = "" if stop is None else stop - 1
        span = {"Range": f"bytes={start}-{last}"} if start or stop is not None else {}
        return cast(BinaryIO, _asked(lambda: _object(name).get(**span)["Body"]))
    opened: Any = storage().open(name, "rb")
    stream: BinaryIO = opened.file
    stream.seek(start)
    return stream


def delete(name: str) -> None:
    """Remove a file; one that is not there is fine."""
    _asked(lambda: storage().delete(name))


def names(folder: str) -> Iterator[Kept]:
    """Every file under a folder, deep."""
    if settings.ARTIFACT_BUCKET:
        yield from _names_in_bucket(folder)
        return
    base = Path(settings.ARTIFACT_DIR)
    for path in sorted((base / folder).rglob("*")):
        if path.is_file():
            found = path.stat()
            changed_at = datetime.fromtimestamp(found.st_mtime).astimezone()
            yield Kept(path.relative_to(base).as_posix(), found.st_size, changed_at)


def free_bytes() -> int | None:
    """Room for more; None where nobody can tell."""
    if settings.ARTIFACT_BUCKET:
        return None
    folder = Path(settings.ARTIFACT_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(folder).free


def storage() -> Storage:
    """The storage that the settings name."""
    if settings.ARTIFACT_BUCKET:
        found: Storage = _bucket(
            settings.ARTIFACT_BUCKET,
            settings.ARTIFACT_S3_ENDPOINT,
            settings.ARTIFACT_S3_REGION,
            settings.ARTIFACT_S3_ACCESS_KEY,
            settings.ARTIFACT_S3_SECRET_KEY,
        )
        return found
    return FileSystemStorage(location=settings.ARTIFACT_DIR, allow_overwrite=True)


@functools.lru_cache(maxsize=4)
def _bucket(bucket: str, endpoint: str, region: str, access_key: str, secret_key: str) -> S3Storage:
    # half a second of imports that an installation on a folder never needs
    from storages.backends.s3 import S3Storage  # noqa: PLC0415

    return S3Storage(
        bucket_name=bucket,
        endpoint_url=endpoint or None,
        region_name=region or None,
        access_key=access_key or None,
        secret_key=secret_key or None,
        file_overwrite=True,
        default_acl=None,
        addressing_style="path" if endpoint else None,
    )


def _object(name: str) -> Any:
    return cast("S3Storage", storage()).bucket.Object(name)


def _names_in_bucket(folder: str) -> Iterator[Kept]:
    found = cast("S3Storage", storage()).bucket.objects.filter(Prefix=f"{folder}/")
    for each in _asked(lambda: list(found)):
        yield Kept(each.key, each.size, each.last_modified)


def _asked(call: Any) -> Any:
    """The answer of the storage. Raises FileNotFoundError where there is no such file, Unavailable otherwise."""
    if not settings.ARTIFACT_BUCKET:
        return call()
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - as above

    try:
        return call()
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in _MISSING:
            raise FileNotFoundError(str(error)) from None
        raise Unavailable(f"the artifact storage refuses: {error}") from None
    except BotoCoreError as error:
        raise Unavailable(f"the artifact storage does not answer: {error}") from None


def _sync_folder(name: str) -> None:
    # a rename survives a power loss only once its folder is on disk
    descriptor = os.open(Path(storage().path(name)).parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
