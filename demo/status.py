"""The one line about how the demo is doing, from the service's own verdict and metrics and the apps' counts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from demo.service import CommandFailed, Service, Stopped

APPLICATION = "digits"


class StatusLine:
    """Asks in the background: the verdict takes a while, and the supervisor has processes to look after."""

    def __init__(self, service: Service, devices_folder: Path, say: Callable[[str], None]) -> None:
        self._service, self._folder, self._say = service, devices_folder, say
        self._thread: threading.Thread | None = None

    def tell_soon(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._tell, daemon=True)
            self._thread.start()

    def _tell(self) -> None:
        try:
            verdict = read_verdict(self._service)
        except Stopped:
            return
        except CommandFailed as error:
            self._say(f"no verdict yet: {error}")
            return
        self._say(line(verdict, app_counts(self._folder)))


def read_verdict(service: Service) -> dict[str, Any]:
    verdict: dict[str, Any] = json.loads(service.manage("verdict", APPLICATION, "--json").splitlines()[-1])
    return verdict


def app_counts(folder: Path) -> dict[str, int]:
    """Sums over all app processes."""
    total = {"requests": 0, "failed": 0, "refused": 0}
    for path in folder.glob("*/app-*.json"):
        counts = json.loads(path.read_text())
        for name in total:
            total[name] += counts[name]
    return total


def line(verdict: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """
    >>> line({"decisions": 40, "feedback": 99, "policy_version": 3, "qoe": None, "lift_over_uniform": None},
    ...      {"requests": 900, "failed": 0, "refused": 0})
    'decisions 40 · feedback 99 · policy 3 · no evidence yet · 900 requests, 0 failed'
    """
    words = [f"decisions {verdict['decisions']}", f"feedback {verdict['feedback']}"]
    if verdict.get("policy_version"):
        words.append(f"policy {verdict['policy_version']}")
    words.append(worth(verdict.get("qoe"), verdict.get("lift_over_uniform")))
    refused = f", {counts['refused']} refused" if counts["refused"] else ""
    words.append(f"{counts['requests']} requests, {counts['failed']} failed{refused}")
    return " · ".join(words)


def worth(qoe: Mapping[str, float] | None, lift: Mapping[str, float] | None) -> str:
    if qoe is None:
        return "no evidence yet"
    if lift is None:
        return f"QoE {qoe['mean']:.2f}, lift over uniform: not enough evidence"
    return f"QoE {qoe['mean']:.2f}, lift over uniform {lift['mean']:+.2f} ({lift['low']:+.2f} to {lift['high']:+.2f})"
