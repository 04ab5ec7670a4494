"""`python -m demo up`: the whole loop on this machine, from an empty folder to a running fleet, until Ctrl-C.

Order of things and what the reader of the terminal sees; processes are in `processes.py`, commands in `service.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from demo.devices import DEVICES, CpuLimit, Device, Errand, Site, agent_program, app_program
from demo.installation import APPLICATIONS, Installation, Secrets
from demo.preflight import CannotStart, check_port, check_python, check_start, claim, clear, free_ports
from demo.processes import ROOT, Household, end_leftovers, stopping_on
from demo.service import CommandFailed, Service, Stopped
from demo.status import StatusLine

DEFAULT_FOLDER = ROOT / "var" / "demo"
TEND_EVERY_S, STATUS_EVERY_S, UP_WITHIN_S = 0.5, 15.0, 90.0


@dataclass(frozen=True)
class Options:
    """What the caller of `up` chose. `settings` go to the service, over what the demo sets itself."""

    port: int = 8000
    folder: Path = DEFAULT_FOLDER
    is_fresh: bool = False
    devices: Sequence[Device] = field(default=DEVICES)
    settings: Mapping[str, str] = field(default_factory=dict)
    only_baseline: bool = False


def main(arguments: Sequence[str]) -> int:
    """`python -m demo up`."""
    parser = argparse.ArgumentParser(prog="python -m demo up", description="Run the whole loop here until Ctrl-C.")
    parser.add_argument("--port", type=int, default=8000, help="where the console listens (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget the data of earlier runs")
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="default: var/demo")
    chosen = parser.parse_args(arguments)
    return up(Options(port=chosen.port, folder=chosen.data, is_fresh=chosen.fresh))


def up(options: Options) -> int:
    """Run until SIGINT or SIGTERM. Returns the exit code: 0 after a stop that was asked for, 2 if it cannot start."""
    stop = stopping_on(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        check_python(sys.version_info[:2])
        check_start(options.is_fresh, os.environ | options.settings)
        with claim(options.folder):
            # Before the port is looked at: what a killed supervisor left behind may still hold it.
            end_leftovers(options.folder / "processes.json")
            check_port(options.port)
            return Demo(options, stop).run()
    except CannotStart as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 2


def say(text: str) -> None:
    """One event, with its time. A terminal that is gone is no reason to stop short of stopping everything."""
    with suppress(OSError):
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


class Demo:
    """One run of the demo on a claimed data folder."""

    def __init__(self, options: Options, stop: threading.Event, say: Callable[[str], None] = say) -> None:
        if options.is_fresh:
            clear(options.folder)
        self._options, self._stop, self._say = options, stop, say
        self._folder = options.folder
        self._is_continued = (options.folder / "secrets" / "enrolment-token").exists()
        self._service = Service(options.folder / "service", options.port, options.settings, stop=stop)
        self._secrets = Secrets(options.folder / "secrets")
        self._installation = Installation(
            self._service, self._secrets, options.folder / "models", only_baseline=options.only_baseline
        )
        self._limits: list[CpuLimit] = []
        self._status = StatusLine(self._service, self._folder / "devices", say)
        self._importing = threading.Thread(target=self._import_models, daemon=True)
        self._failure: str | None = None
        self.household = Household(options.folder, say)

    def run(self) -> int:
        """Everything from start to stop; returns the exit code."""
        try:
            self.start()
            self.watch()
        except (CannotStart, CommandFailed) as error:
            self._failure = str(error)
        except Stopped:
            pass
        finally:
            self.end()
        if self._failure:
            print(f"could not go on: {self._failure}", file=sys.stderr)
        return 1 if self._failure else 0

    def start(self) -> None:
        """The console first, then devices; models come in while devices enrol, the baseline first."""
        self._say("going on from the data of the last run" if self._is_continued else "starting with empty data")
        self._service.manage("migrate", "--verbosity", "0")
        for program in self._service.programs():
            self.household.start(program)
        self._wait_until_up()
        operator = self._service.manage("create_operator")
        self._say(greeting(self._service.url, operator, self.household.logs))
        self._installation.issue_token()
        for application in APPLICATIONS:
            self._installation.issue_key(application)
        self._start_devices()
        self._importing.start()

    def watch(self) -> None:
        """Keep everything running, and say how it goes, until told to stop."""
        while not self._stop.is_set() and not self._failure:
            self.watch_for(STATUS_EVERY_S)

    def watch_for(self, seconds: float) -> None:
        """The same for so long; whole status lines only."""
        for _ in range(max(1, round(seconds / STATUS_EVERY_S))):
            self.tend_for(STATUS_EVERY_S)
            self._status.tell_soon()

    def tend_for(self, seconds: float) -> None:
        """Keep everything running for so long, or until told to stop."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._failure and not self._stop.wait(TEND_EVERY_S):
            self.household.tend()

    @property
    def is_importing(self) -> bool:
        return self._importing.is_alive()

    def give_up_if_stopped(self) -> None:
        """Raises Stopped after a signal and CommandFailed after a failed import."""
        if self._failure:
            raise CommandFailed(self._failure)
        if self._stop.is_set():
            raise Stopped

    def end(self) -> None:
        """Stop every process and take the CPU limits away."""
        self._say("stopping")
        if self._importing.is_alive():
            self._importing.join()
        self.household.stop()
        for limit in self._limits:
            limit.remove()
        self._say("stopped")

    def _import_models(self) -> None:
        try:
            for name in chain.from_iterable(map(self._installation.fill, APPLICATIONS)):
                self._say(f"{name} imported")
        except CommandFailed as error:
            self._failure = str(error)
        except Stopped:
            pass

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + UP_WITHIN_S
        while not self._service.is_up():
            if time.monotonic() > deadline:
                raise CommandFailed(f"the service does not answer; see {self.household.logs / 'web.log'}")
            self.household.tend()
            if self._stop.wait(0.2):
                raise Stopped

    def _start_devices(self) -> None:
        owner = "edge-qoe-" + hashlib.sha256(str(self._folder.resolve()).encode()).hexdigest()[:8]
        ports = free_ports(len(self._options.devices), self._options.port + 10)
        for index, (device, port) in enumerate(zip(self._options.devices, ports, strict=True)):
            site = Site(self._folder / "devices" / device.name, self._service.url, port)
            site.folder.mkdir(parents=True, exist_ok=True)
            limit = CpuLimit(device, owner)
            self._limits.append(limit)
            self.household.start(agent_program(device, site, limit, self._secrets.path("enrolment-token")))
            for application in device.applications:
                data, key = self._installation.data(application), self._secrets.path(f"key-{application}")
                self.household.start(app_program(device, site, Errand(application, data, key, index)))
        kinds = {limit.label for limit in self._limits}
        self._say(f"{len(ports)} devices started, CPU limits {' and '.join(sorted(kinds))}")


def greeting(url: str, operator: str, logs: Path) -> str:
    """Where to look, as whom, and how to stop."""
    return f"""up

  console   {url}/   {log_in(operator)}
  look at   Fleet (what runs where), Application digits (is the bandit worth it), a Decision (why)
  logs      {relative(logs)}
  stop      Ctrl-C; the next run goes on from here, FRESH=1 (--fresh) starts over
"""


def log_in(printed: str) -> str:
    """What `create_operator` printed, for people. The password is known this once only.

    >>> log_in("operator operator password s3cret")
    'log in as operator, password s3cret'
    >>> log_in("operator operator exists")
    'log in as operator, password as printed by the first run'
    """
    words = printed.split()
    password = words[3] if "password" in words else "as printed by the first run"
    return f"log in as {words[1]}, password {password}"


def relative(path: Path) -> str:
    """As short as it can be typed from here."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
