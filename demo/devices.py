"""The demo's six devices: one agent process each, under its own CPU limit, with an app process beside it.

They run on one machine and differ for real in the CPU time they get, where control groups can be written; elsewhere the
agent itself keeps to the quota, emulated from the CPU time it measures. The label `cpu-limit` says which.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.limits import CpuGroup, open_cpu_group
from demo.processes import Program

# Importing its libraries is not what a small device is slow at here: an agent comes under its limit once it serves.
SERVING_WITHIN_S = 60.0


@dataclass(frozen=True)
class Device:
    """One device of the demo: what it is, what it may use, and what is asked of it by whom."""

    name: str
    device_class: str
    cpu_quota: float
    persona: str
    rates_rps: Mapping[str, float]
    cores: frozenset[int] = frozenset()

    @property
    def applications(self) -> tuple[str, ...]:
        return tuple(self.rates_rps)


DEVICES = (
    Device("workstation", "workstation", 1.0, "careful", {"digits": 16.0, "parity": 8.0}),
    Device("laptop", "laptop", 0.6, "easygoing", {"digits": 12.0, "parity": 6.0}),
    Device("tablet", "tablet", 0.4, "careful", {"digits": 10.0, "parity": 4.0}),
    Device("phone", "phone", 0.3, "easygoing", {"digits": 8.0}, frozenset({0})),
    Device("camera", "camera", 0.1, "careful", {"digits": 5.0}, frozenset({1})),
    Device("sensor-hub", "sensor-hub", 0.035, "impatient", {"digits": 3.0}, frozenset({0})),
)


@dataclass(frozen=True)
class Site:
    """Where one device's processes keep their things, and whom they talk to."""

    folder: Path
    service_url: str
    agent_port: int

    @property
    def device_url(self) -> str:
        return f"http://127.0.0.1:{self.agent_port}"


@dataclass(frozen=True)
class Errand:
    """What an app process does for one application: held-out data to ask about, and the key to rate with."""

    application: str
    data: Path
    key_file: Path | None
    seed: int = 0


class CpuLimit:
    """The limit of one device: a control group where there can be one, else a quota for the agent to emulate."""

    def __init__(self, device: Device, owner: str) -> None:
        self.group: CpuGroup | None = open_cpu_group(f"{owner}-{device.name}", device.cpu_quota)

    @property
    def label(self) -> str:
        return "real" if self.group else "emulated"

    def applier(self, port: int) -> Callable[[int], None]:
        """For `Program.after_start`: bring the process under the limit as soon as it serves."""

        def apply(pid: int) -> None:
            threading.Thread(target=self._apply_when_serving, args=(pid, port), daemon=True).start()

        return apply

    def _apply_when_serving(self, pid: int, port: int) -> None:
        deadline = time.monotonic() + SERVING_WITHIN_S
        while time.monotonic() < deadline and not is_serving(port):
            time.sleep(0.1)
        if self.group:
            try:
                self.group.add(pid)
            except OSError as error:
                print(f"{self.group.folder.name} runs without its CPU limit: {error.strerror}", flush=True)

    def remove(self) -> None:
        if self.group:
            self.group.remove()


def is_serving(port: int) -> bool:
    """Whether an inference server is live on this port of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/v2/health/live")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def agent_program(device: Device, site: Site, limit: CpuLimit, token_file: Path | None) -> Program:
    """The device's agent, configured by a file in its own folder. It enrols with the token once."""
    configuration = site.folder / "agent.toml"
    configuration.write_text(toml(agent_settings(device, site, limit)))
    return Program(
        name=f"agent-{device.name}",
        arguments=[sys.executable, "-m", "device_agents", "run", "--config", str(configuration)],
        environment=one_thread() | ({"QOE_AGENT_TOKEN_FILE": str(token_file)} if token_file else {}),
        cores=device.cores,
        after_start=limit.applier(site.agent_port),
    )


def agent_settings(device: Device, site: Site, limit: CpuLimit) -> dict[str, Any]:
    labels = {
        "cpu-limit": limit.label,
        "cpu-quota": f"{device.cpu_quota:g} cores",
        "applications": ",".join(device.applications),
        "persona": device.persona,
        "users": "simulated",
    }
    return {
        "service_url": site.service_url,
        "name": device.name,
        "device_class": device.device_class,
        "state_dir": str(site.folder / "state"),
        "port": site.agent_port,
        "cpu_quota_emulated": 0.0 if limit.group else device.cpu_quota,
        "labels": labels,
    }


def toml(settings: Mapping[str, Any]) -> str:
    """Flat settings and one level of tables; JSON's strings and numbers are TOML's too."""
    plain = [f"{name} = {json.dumps(value)}" for name, value in settings.items() if not isinstance(value, dict)]
    for name, table in settings.items():
        if isinstance(table, dict):
            plain += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(plain) + "\n"


def app_program(device: Device, site: Site, errand: Errand) -> Program:
    """The app beside the device, with its simulated user. It is no part of the device and under no limit."""
    name = f"app-{device.name}-{errand.application}"
    return Program(
        name=name,
        arguments=[
            *(sys.executable, "-m", "demo", "app"),
            *("--device-url", site.device_url),
            *("--application", errand.application),
            *("--data", str(errand.data)),
            *("--rate", f"{device.rates_rps[errand.application]:g}"),
            *("--persona", device.persona),
            *("--seed", str(errand.seed)),
            *("--stats", str(site.folder / f"{name}.json")),
            *(("--service-url", site.service_url, "--key-file", str(errand.key_file)) if errand.key_file else ()),
        ],
        environment=one_thread(),
    )


def one_thread() -> dict[str, str]:
    """numpy's own thread pool would be larger than the work."""
    return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
