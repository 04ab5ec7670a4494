"""The state folder: identity, variants by digest, and one record per application. Every write survives power loss.

Nothing here decides; it keeps what others decided, so that a restart finds either the old state or the new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from device_agents.errors import AttemptFailed, BadConfiguration, Superseded
from device_agents.wire import (
    DesiredApplication,
    Message,
    Outcome,
    OutcomeReport,
    ProfileReport,
    ProfilingResult,
    TrustedKey,
    UpdateState,
)

logger = logging.getLogger("qoe_agent.store")

OUTCOMES_KEPT = 64
ATTEMPTS_KEPT = 32
CANCEL_TICK_S = 0.1
LOCK_TRIES, LOCK_PAUSE_S = 50, 0.01

AnyMessage = TypeVar("AnyMessage", bound=BaseModel)


class Identity(Message):
    """Who this device is to the service. The file is readable by its owner only."""

    service_url: str
    device_id: str
    credential: str = Field(repr=False)
    trusted_keys: tuple[TrustedKey, ...] = ()
    keys_version: int = 0


class Record(Message):
    """What is durable about one application: what is committed, what is being tried, and what is yet to be told."""

    application: str
    model_name: str
    state: UpdateState = UpdateState.IDLE
    committed: DesiredApplication | None = None
    previous: DesiredApplication | None = None
    candidate: DesiredApplication | None = None
    fallback: DesiredApplication | None = Field(default=None, description="stands in while nothing is committed")
    lease_closed: str | None = Field(default=None, description="decision whose lease was last closed")
    attempts: dict[str, int] = Field(default_factory=dict, description="attempts per decision, newest last")
    outcomes: tuple[OutcomeReport, ...] = Field(default=(), description="not yet acknowledged by the service")

    def with_outcome(self, outcome: OutcomeReport) -> Record:
        """The record with one more outcome to tell; the oldest go when the service is away for very long."""
        return self.model_copy(update={"outcomes": (*self.outcomes, outcome)[-OUTCOMES_KEPT:]})

    def with_attempts(self, decision_id: str, count: int) -> Record:
        """The record with the number of attempts for a decision; old decisions are forgotten."""
        kept = {key: attempts for key, attempts in self.attempts.items() if key != decision_id}
        return self.model_copy(update={"attempts": dict([*kept.items(), (decision_id, count)][-ATTEMPTS_KEPT:])})


class Progress(Message):
    """How far the device has come with desired documents; guards against replays across restarts."""

    seen_version: int = -1


class Profiles(Message):
    """Measured profiles by variant and threads, kept so that each pair is measured once."""

    measured: tuple[ProfileReport, ...] = ()


class ProfilingResults(Message):
    """What profiling jobs found, until the service has it."""

    untold: tuple[ProfilingResult, ...] = ()


class Store:
    """One state folder, used by one agent at a time."""

    def __init__(self, folder: Path, *, disk_budget_bytes: int, disk_reserve_bytes: int = 0) -> None:
        self.folder = folder
        self._budget = disk_budget_bytes
        self._reserve = disk_reserve_bytes
        self._lock_file: int | None = None
        self._profiles_lock = threading.Lock()
        self._brought = threading.Condition()
        self._bringing: set[str] = set()
        try:
            for part in (folder, folder / "artifacts", folder / "applications"):
                part.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise BadConfiguration(f"state_dir {folder}: {error.strerror}") from error

    def lock(self) -> None:
        """Claims the folder; raises BadConfiguration when another agent holds it. Ends with the process."""
        handle = os.open(self.folder / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(LOCK_PAUSE_S)  # who only asks whether the folder is in use holds it for a moment too
            except OSError as error:
                os.close(handle)
                raise BadConfiguration(f"state_dir {self.folder} cannot be locked: {error.strerror}") from error
            else:
                self._lock_file = handle
                return
        os.close(handle)
        raise BadConfiguration(f"another agent uses the state folder {self.folder}")

    def unlock(self) -> None:
        """Releases the folder."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def is_in_use(self) -> bool:
        """Whether an agent's process holds the folder at this moment."""
        try:
            handle = os.open(self.folder / "agent.lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    # -- small documents ---------------------------------------------------------------------------------------

    def identity(self) -> Identity | None:
        """Who this device is, or None before enrolment. Raises BadConfiguration where the file cannot be read."""
        return self._read(self.folder / "identity.json", Identity)

    def secure_identity(self) -> None:
        """Takes the credential away from other users of the host, whoever copied it here with wider permissions."""
        path = self.folder / "identity.json"
        with suppress(FileNotFoundError):
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
                logger.warning("others could read %s: now they cannot", path)

    def save_identity(self, identity: Identity) -> None:
        """Keeps the credential, readable by the owner only."""
        self._write(self.folder / "identity.json", identity)

    def seen_version(self) -> int:
        """The highest desired version that was ever accepted; -1 before the first, for versions begin at 0."""
        return (self._read(self.folder / "progress.json", Progress) or Progress()).seen_version

    def save_seen_version(self, version: int) -> None:
        """Remembers an accepted version, before it is acted upon."""
        self._write(self.folder / "progress.json", Progress(seen_version=version))

    def records(self) -> tuple[Record, ...]:
        """All applications that this device knows."""
        paths = sorted((self.folder / "applications").glob("*.json"))
        return tuple(record for path in paths if (record := self._read(path, Record)) is not None)

    def save_record(self, record: Record) -> None:
        """Makes a record durable. Callers save first and act after."""
        self._write(self.folder / "applications" / f"{record.application}.json", record)

    def forget_record(self, application: str) -> None:
        """Drops an application that the service no longer wants here."""
        (self.folder / "applications" / f"{application}.json").unlink(missing_ok=True)

    def forget_device(self) -> None:
        """Drops what belonged to another device id: its decisions and versions mean nothing to this one.

        Variants and profiles stay: they belong to the hardware.
        """
        for path in (self.folder / "applications").glob("*.json"):
            path.unlink(missing_ok=True)
        (self.folder / "progress.json").unlink(missing_ok=True)
        (self.folder / "profiling.json").unlink(missing_ok=True)

    def profiles(self) -> tuple[ProfileReport, ...]:
        """All profiles measured on this device so far."""
        return (self._read(self.folder / "profiles.json", Profiles) or Profiles()).measured

    def save_profile(self, profile: ProfileReport) -> None:
        """Keeps the newest profile of a (variant, threads) pair."""
        with self._profiles_lock:
            others = (p for p in self.profiles() if (p.digest, p.threads) != (profile.digest, profile.threads))
            self._write(self.folder / "profiles.json", Profiles(measured=(*others, profile)[-256:]))

    def profiling_results(self) -> tuple[ProfilingResult, ...]:
        """Results of profiling jobs that the service has not acknowledged."""
        return (self._read(self.folder / "profiling.json", ProfilingResults) or ProfilingResults()).untold

    def save_profiling_results(self, results: tuple[ProfilingResult, ...]) -> None:
        """Keeps exactly these."""
        self._write(self.folder / "profiling.json", ProfilingResults(untold=results))

    def save_status(self, status: Mapping[str, Any]) -> None:
        """Leaves a note for ``qoe-agent status`` and supervisors; worth nothing after a restart, nor on a full disk."""
        try:
            _replace(self.folder / "status.json", json.dumps(status).encode())
        except OSError as error:
            logger.warning("no status note reason=%r", error.strerror)

    def status(self) -> dict[str, Any]:
        """The note of the last agent that ran here."""
        try:
            loaded = json.loads((self.folder / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def _read(self, path: Path, kind: type[AnyMessage]) -> AnyMessage | None:
        try:
            return kind.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadConfiguration(f"cannot read {path}: {error.strerror}") from error
        except ValidationError:
            # Writes are atomic, so this is damage from outside: keep it for its owner, go on without it.
            logger.exception("unreadable file=%s kept as .damaged", path)
            path.rename(path.with_suffix(".damaged"))
            return None

    def _write(self, path: Path, message: BaseModel) -> None:
        _replace(path, message.model_dump_json().encode())

    # -- artifacts -----------------------------------------------------------------------------------------------

    def artifact(self, digest: str) -> Path:
        """Where a verified variant is, or would be."""
        return self.folder / "artifacts" / f"{digest}.onnx"

    def part(self, digest: str) -> Path:
        """Where a variant that is still being fetched collects its bytes."""
        return self.folder / "artifacts" / f"{digest}.part"

    @contextmanager
    def bringing(self, digest: str, *, is_cancelled: Callable[[], bool]) -> Iterator[None]:
        """Claims the part file of a variant: two applications that want one variant must not both write it.

        Who comes second waits, and finds the artifact there; raises Superseded when it is cancelled meanwhile.
        """
        with self._brought:
            while digest in self._bringing:
                if is_cancelled():
                    raise Superseded("overtaken while another application fetched the variant")
                self._brought.wait(CANCEL_TICK_S)
            self._bringing.add(digest)
        try:
            yield
        finally:
            with self._brought:
                self._bringing.discard(digest)
                self._brought.notify_all()

    def has_artifact(self, digest: str) -> bool:
        """Whether a variant that once passed verification is here."""
        return self.artifact(digest).exists()

    def cached_digests(self) -> tuple[str, ...]:
        """The variants on this device, most recently used first."""
        return tuple(path.stem for path in sorted(self._artifacts(), key=_last_used, reverse=True))

    def touch(self, digest: str) -> None:
        """Marks a variant as used now, which makes it the last to be evicted."""
        os.utime(self.artifact(digest))

    def demote(self, digest: str) -> None:
        """Marks a variant as the first to be evicted: it failed here, so it is worth less than any that did not."""
        with suppress(OSError):
            os.utime(self.artifact(digest), (0.0, 0.0))

    def is_intact(self, digest: str, path: Path | None = None) -> bool:
        """Whether a file still hashes to its name."""
        try:
            with (path or self.artifact(digest)).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            return False

    def make_room(self, *, digest: str, size_bytes: int, keep: Collection[str]) -> None:
        """Evicts what is worth least until a variant of ``size_bytes`` fits; raises AttemptFailed(no_space).

        Worth least are beginnings of other downloads, then variants that failed here, then the longest unused.
        Variants in ``keep`` are running or needed for a rollback and never go.
        """
        part = self.part(digest)
        missing = size_bytes - (part.stat().st_size if part.exists() else 0)
        with self._brought:
            kept = {*keep, *self._bringing, digest}
        evictable = [p for p in sorted(self._files(), key=_worth) if p.stem not in kept]
        while not self._fits(missing):
            if not evictable:
                raise AttemptFailed(f"no room for {size_bytes} bytes", outcome=Outcome.NO_SPACE)
            evictable.pop(0).unlink(missing_ok=True)

    def accept_part(self, digest: str) -> Path:
        """Turns a verified part into the artifact, durably and in one step."""
        target = self.artifact(digest)
        with self.part(digest).open("rb") as file:
            os.fsync(file.fileno())
        self.part(digest).replace(target)
        _sync_folder(target.parent)
        return target

    def discard_part(self, digest: str) -> None:
        """Drops what was fetched of a variant."""
        self.part(digest).unlink(missing_ok=True)

    def _fits(self, missing_bytes: int) -> bool:
        used = sum(path.stat().st_size for path in self._files())
        free = shutil.disk_usage(self.folder).free
        return used + missing_bytes <= self._budget and missing_bytes + self._reserve <= free

    def _files(self) -> list[Path]:
        return [p for p in (self.folder / "artifacts").iterdir() if p.suffix in {".onnx", ".part"}]

    def _artifacts(self) -> list[Path]:
        return [p for p in self._files() if p.suffix == ".onnx"]


def _worth(path: Path) -> tuple[bool, float]:
    return path.suffix == ".onnx", _last_used(path)


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _replace(path: Path, content: bytes) -> None:
    """Writes beside and renames, so that a reader sees the old file or the new one, also after power loss."""
    beside = path.with_suffix(".new")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        if os.geteuid() == 0:  # an owner's ``sudo`` must not lock out the agent, which runs as who owns the folder
            folder = path.parent.stat()
            with suppress(PermissionError):  # a root of a container that may not
                os.fchown(descriptor, folder.st_uid, folder.st_gid)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
