"""Looks at an agent from outside: ``qoe-agent status`` and ``qoe-agent doctor``. Changes nothing."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import sys
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from device_agents.client import is_loopback, require_safe, trust
from device_agents.config import AgentConfig
from device_agents.errors import AgentError
from device_agents.runtime import runtime_version
from device_agents.store import Store
from device_agents.telemetry import hardware

LARGEST_CLOCK_OFFSET_S = 60.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    is_ok: bool
    detail: str


def status(config: AgentConfig) -> dict[str, Any]:
    """What the agent of this state folder is doing, from its files alone."""
    nothing: dict[str, Any] = {"state_dir": str(config.state_dir), "device_id": None, "running": False}
    if not config.state_dir.is_dir():
        return nothing | {"service_url": config.service_url, "applications": []}
    store = Store(config.state_dir, disk_budget_bytes=config.disk_budget_bytes)
    identity, note = store.identity(), store.status()
    return nothing | {
        "device_id": identity.device_id if identity else None,
        "service_url": identity.service_url if identity else config.service_url,
        "running": store.is_in_use(),
        "serving_url": note.get("serving_url"),
        "desired_version_seen": store.seen_version(),
        "applications": [
            {
                "application": record.application,
                "model_name": record.model_name,
                "state": record.state.value,
                "committed": record.committed.variant.digest if record.committed else None,
                "decision_id": record.committed.decision_id if record.committed else None,
            }
            for record in store.records()
        ],
        "cached_variants": len(store.cached_digests()),
        "feedback_waiting": _feedback_waiting(config),
    }


def examine(config: AgentConfig) -> list[Finding]:
    """Everything that the agent needs, each with what to do about it."""
    return [
        Finding("python", sys.version_info >= (3, 11), sys.version.split()[0]),
        Finding("runtime", True, f"{runtime_version()}; {', '.join(hardware().isa) or 'no known instruction sets'}"),
        _state_folder(config),
        _disk(config),
        _credential(config),
        *_service(config),
    ]


def _state_folder(config: AgentConfig) -> Finding:
    place = _existing(config.state_dir)
    is_usable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    what = str(config.state_dir) if place == config.state_dir else f"{config.state_dir} will be made in {place}"
    reason = f"{what}: {place} is {'not writable' if place.is_dir() else 'no folder'}; choose another --state-dir"
    return Finding("state folder", is_usable, what if is_usable else reason)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _disk(config: AgentConfig) -> Finding:
    free = shutil.disk_usage(_existing(config.state_dir)).free
    is_enough = free > config.disk_reserve_bytes
    return Finding(
        "disk", is_enough, f"{free // 2**20} MiB free, {config.disk_reserve_bytes // 2**20} MiB are kept free"
    )


def _credential(config: AgentConfig) -> Finding:
    path = config.state_dir / "identity.json"
    if not path.exists():
        return Finding("credential", bool(config.token), "not enrolled yet; give --token once")
    is_private = not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return Finding("credential", is_private, "private" if is_private else f"others can read it: chmod 600 {path}")


def _service(config: AgentConfig) -> list[Finding]:
    try:
        require_safe(config.service_url, allow_plaintext=config.allow_plaintext)
        response = httpx.get(
            f"{config.service_url}/healthz",
            timeout=5.0,
            verify=trust(config.ca_bundle) if config.service_url.startswith("https") else False,
            trust_env=not is_loopback(httpx.URL(config.service_url).host),
        )
    except (AgentError, httpx.HTTPError) as error:
        return [Finding("service", False, str(error))]
    findings = [Finding("service", response.status_code == 200, f"{config.service_url} says {response.status_code}")]
    if "Date" in response.headers:
        offset_s = (datetime.now(UTC) - parsedate_to_datetime(response.headers["Date"])).total_seconds()
        findings.append(Finding("clock", abs(offset_s) < LARGEST_CLOCK_OFFSET_S, f"{offset_s:+.0f} s from the service"))
    return findings


def _feedback_waiting(config: AgentConfig) -> int:
    path = config.state_dir / "spool.sqlite3"
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            return int(database.execute("SELECT records FROM total").fetchone()[0])
    except sqlite3.Error:
        return 0
