"""The product's own web process with a fleet in its database, for benchmarks; and changes, made as a worker makes them.

``python -m benchmarks.fleet_service seed N`` and ``change how`` run with the service's environment, as processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Self

import httpx

from benchmarks.delivery_device import ROOT, free_port

OPERATOR, PASSWORD = "benchmark", "a password for one benchmark"
APPLICATION = "digits"


def credential_of(number: int) -> str:
    """What the device of that number proves itself with."""
    return f"credential-of-device-{number:05d}".ljust(43, "x")


def device_id_of(number: int) -> str:
    """Identifier of the device of that number."""
    return f"d-fleet-{number:05d}"


class WebProcess:
    """uvicorn as production starts it, over a database that was filled by ``seed``."""

    def __init__(self, folder: Path, environment: Mapping[str, str], *, devices: int) -> None:
        self.port = free_port()
        self._folder = folder
        self._environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "qoe_service.settings",
            "DATA_DIR": str(folder / "service"),
            "PYTHONWARNINGS": "ignore",
            **environment,
        }
        self._command("seed", str(devices))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        command = [sys.executable, "-m", "uvicorn", "qoe_service.asgi:application", "--port", str(self.port)]
        command += ["--no-server-header", "--no-access-log", "--log-level", "warning", "--lifespan", "off"]
        with (self._folder / "web.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--timeout-graceful-shutdown", "1"],
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        ends_s = time.monotonic() + 60
        while time.monotonic() < ends_s:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/healthz", timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(0.05)
        raise TimeoutError(f"the web process does not answer: {self._folder / 'web.log'}")

    def stop(self) -> None:
        """Ends it as a restart does."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def change(self, how: str) -> dict[str, float]:
        """A new desired version for every device, ``one_by_one`` or ``at_once``: monotonic time of each commit."""
        lines = self._command("change", how).splitlines()
        return {device: float(at_s) for device, at_s in (line.split() for line in lines)}

    def _command(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "benchmarks.fleet_service", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return done.stdout


def _seed(devices: int) -> None:
    """A fleet in which every device runs a decision, as rows."""
    from django.contrib.auth import get_user_model  # noqa: PLC0415 - after Django is set up, here and below
    from django.core.management import call_command  # noqa: PLC0415
    from django.db import transaction  # noqa: PLC0415

    from qoe_service.rollouts import changes  # noqa: PLC0415
    from tests import builders  # noqa: PLC0415

    call_command("migrate", verbosity=0)
    now = time_now()
    with transaction.atomic():
        get_user_model().objects.create_superuser(OPERATOR, password=PASSWORD)
        application = builders.make_application(APPLICATION, lease_s=600.0, created_at=now)
        variant = builders.make_variant(application, created_at=now)
        for number in range(devices):
            device = builders.make_device(
                f"device-{number}", id=device_id_of(number), credential=credential_of(number), last_seen_at=now
            )
            decision = builders.make_decision(device, application, variant, decided_at=now, active_at=now)
            builders.make_assignment(device, application, decision, reported_at=now, desired_at=now)
            changes.announce(device_id=device.pk, now=now)


def _change(how: str) -> None:
    from django.db import transaction  # noqa: PLC0415

    from qoe_service.fleet.models import Device  # noqa: PLC0415
    from qoe_service.rollouts import changes  # noqa: PLC0415

    devices, now = list(Device.objects.order_by("pk").values_list("pk", flat=True)), time_now()
    at_s: dict[str, float] = {}
    if how == "at_once":
        with transaction.atomic():
            # First of all that follows the commit: wake-ups are sent by what comes after it.
            transaction.on_commit(lambda: at_s.update(dict.fromkeys(devices, time.monotonic())))
            for device in devices:
                changes.announce(device_id=device, now=now)
    else:
        for device in devices:
            with transaction.atomic():
                changes.announce(device_id=device, now=now)
            at_s[device] = time.monotonic()
    print("\n".join(f"{device} {moment}" for device, moment in at_s.items()))


def time_now() -> datetime:
    """The service's now."""
    from django.utils import timezone  # noqa: PLC0415

    return timezone.now()


if __name__ == "__main__":
    import django

    django.setup()
    _seed(int(sys.argv[2])) if sys.argv[1] == "seed" else _change(sys.argv[2])
