"""Do a thousand connected agents hear of a change in time, and does the console stay quick meanwhile?

Simulated clients in one process speak ``device_agents.wire`` over real sockets with the product's web process, by the
pauses that the real agent takes. What would falsify it: a wake-up that comes later than two seconds for more than one
in twenty, looks that are not answered within ten seconds, a console page that takes longer than one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from benchmarks.fleet_service import OPERATOR, PASSWORD, WebProcess, credential_of, device_id_of
from device_agents.client import full_jitter_s
from device_agents.wake_ups import LONGEST_PAUSE_S, STEADY_CONNECTION_S
from device_agents.wire import DesiredState, SignedDesired, WakeUp

PAGE_EVERY_S = 0.25
ALL_WITHIN_S = 60.0
ALL_BACKENDS, QUICK_BACKENDS = ("SQLite", "PostgreSQL and Redis"), ("SQLite",)


@dataclass(frozen=True)
class Found:
    """Seconds. Wake-ups count from the commit of the change, looks from the last wake-up of the fleet."""

    backend: str
    devices: int
    connected_s: float
    one_by_one_p95_s: float
    at_once_p95_s: float
    reconnected_s: float
    after_restart_p95_s: float
    looked_s: float
    page_idle_s: float
    page_worst_s: float
    page_worst_reconnecting_s: float

    @property
    def wake_up_p95_s(self) -> float:
        """The worst of the three."""
        return max(self.one_by_one_p95_s, self.at_once_p95_s, self.after_restart_p95_s)

    def rows(self) -> Iterator[tuple[str, float, float]]:
        """Name, value and limit of what has a target."""
        yield "wake-up p95, changes one by one, s", self.one_by_one_p95_s, 2
        yield "wake-up p95, changes at once, s", self.at_once_p95_s, 2
        yield "wake-up p95, after a restart of the web, s", self.after_restart_p95_s, 2
        yield "all looked, after the last wake-up, s", self.looked_s, 10
        yield f"slowest console page meanwhile (idle {self.page_idle_s:.2f}), s", self.page_worst_s, 1
        yield f"slowest page while all reconnect ({self.reconnected_s:.1f} s), s", self.page_worst_reconnecting_s, 1


@dataclass
class Client:
    """One simulated agent: its ear, and its look when it is woken."""

    number: int
    port: int
    rng: random.Random
    is_connected: bool = False
    seen_version: int = -1
    woken_s: dict[int, float] = field(default_factory=dict)
    looked_s: dict[int, float] = field(default_factory=dict)
    _looks: set[asyncio.Task[None]] = field(default_factory=set)

    async def live(self) -> None:
        """Listens until it is cancelled, and comes back by the agent's pauses when the line ends."""
        failures = 0
        while True:
            started_s = time.monotonic()
            with suppress(OSError, EOFError, ValueError):
                await self._listen()
            self.is_connected = False
            failures = 0 if time.monotonic() - started_s > STEADY_CONNECTION_S else failures + 1
            await asyncio.sleep(full_jitter_s(failures, self.rng, cap_s=LONGEST_PAUSE_S))

    async def _listen(self) -> None:
        async with self._asked("wake-up") as reader:
            async for line in reader:
                self.is_connected = True
                if line.startswith(b"data:"):
                    self._woken(WakeUp.model_validate_json(line.removeprefix(b"data:")))

    def _woken(self, wake_up: WakeUp) -> None:
        if wake_up.version > self.seen_version:
            self.woken_s.setdefault(wake_up.version, time.monotonic())
            task = asyncio.create_task(self._look(self.rng.uniform(0.0, wake_up.spread_s)))
            self._looks.add(task)
            task.add_done_callback(self._looks.discard)

    async def _look(self, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        for failures in range(6):
            with suppress(OSError, EOFError, ValueError):
                async with self._asked("desired") as reader:
                    body = (await reader.read()).rpartition(b"\r\n\r\n")[2]
                found = DesiredState.model_validate_json(SignedDesired.model_validate_json(body).document)
                self.seen_version = max(self.seen_version, found.version)
                self.looked_s.setdefault(found.version, time.monotonic())
                return
            await asyncio.sleep(full_jitter_s(failures, self.rng))

    @asynccontextmanager
    async def _asked(self, what: str) -> AsyncIterator[asyncio.StreamReader]:
        """The answer to a GET, from its first line on. Raises OSError unless it is 200."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            path = f"/api/v1/devices/{device_id_of(self.number)}/{what}"
            head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {credential_of(self.number)}\r\n"
            writer.write(f"{head}Connection: close\r\n\r\n".encode())
            status = await reader.readline()
            if b" 200 " not in status:
                raise OSError(f"{what}: {status!r}")
            yield reader
        finally:
            writer.close()


class Console:
    """An operator who opens the fleet page and the page of a device, again and again."""

    def __init__(self, url: str) -> None:
        self.took_s: list[float] = []
        self._client = httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, follow_redirects=True)
        self._pages = ("/", f"/devices/{device_id_of(0)}/")

    async def sign_in(self) -> None:
        """By the form, as a person does."""
        form = await self._client.get("/login/")
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', form.text)
        assert token is not None, "the sign-in form has a token"
        data = {"username": OPERATOR, "password": PASSWORD, "csrfmiddlewaretoken": token[1]}
        (await self._client.post("/login/", data=data)).raise_for_status()

    async def open(self) -> None:
        """Every page once."""
        for page in self._pages:
            started_s = time.monotonic()
            (await self._client.get(page)).raise_for_status()
            self.took_s.append(time.monotonic() - started_s)

    async def browse(self) -> None:
        """Until it is cancelled; a page that fails while the web restarts is asked for again."""
        while True:
            with suppress(httpx.HTTPError):
                await self.open()
            await asyncio.sleep(PAGE_EVERY_S)

    def worst_s(self) -> float:
        """The slowest page since the last call."""
        found, self.took_s = max(self.took_s, default=0.0), []
        return found


class Fleet:
    """All clients, one console and the web process; the clients live in this event loop."""

    def __init__(self, web: WebProcess, *, devices: int) -> None:
        self._web = web
        self._clients = [Client(number, web.port, random.Random(number)) for number in range(devices)]
        self._by_id = {device_id_of(client.number): client for client in self._clients}

    async def run(self, backend: str) -> Found:
        """The whole story, from the first connection to the change after a restart."""
        console = Console(self._web.url)
        await console.sign_in()
        for _ in range(3):
            await console.open()
        idle_s = console.worst_s()
        started_s = time.monotonic()
        living = [asyncio.create_task(client.live()) for client in self._clients]
        await self._until_connected()
        connected_s = time.monotonic() - started_s
        await self._until_looked(max(client.seen_version for client in self._clients))
        browsing = asyncio.create_task(console.browse())
        console.worst_s()
        one_by_one, first_looked_s = await self._change("one_by_one")
        at_once, second_looked_s = await self._change("at_once")
        page_worst_s = console.worst_s()
        reconnected_s = await self._restart(console)
        reconnecting_s = console.worst_s()
        after, third_looked_s = await self._change("at_once")
        page_worst_s = max(page_worst_s, console.worst_s())
        for task in (browsing, *living):
            task.cancel()
        await asyncio.gather(browsing, *living, return_exceptions=True)
        return Found(
            backend=backend,
            devices=len(self._clients),
            connected_s=connected_s,
            one_by_one_p95_s=one_by_one,
            at_once_p95_s=at_once,
            reconnected_s=reconnected_s,
            after_restart_p95_s=after,
            looked_s=max(first_looked_s, second_looked_s, third_looked_s),
            page_idle_s=idle_s,
            page_worst_s=page_worst_s,
            page_worst_reconnecting_s=reconnecting_s,
        )

    async def _restart(self, console: Console) -> float:
        """From the moment that the new process answers until all are back; pages count from there."""
        await asyncio.to_thread(self._web.stop)
        await asyncio.to_thread(self._web.start)
        console.worst_s()
        started_s = time.monotonic()
        await self._until_connected()
        return time.monotonic() - started_s

    async def _change(self, how: str) -> tuple[float, float]:
        """95th percentile of wake-ups after their commit, and seconds from the last wake-up to the last answer."""
        version = max(client.seen_version for client in self._clients) + 1
        committed_s = await asyncio.to_thread(self._web.change, how)
        await self._until_looked(version)
        waits_s = [self._by_id[device].woken_s[version] - at_s for device, at_s in committed_s.items()]
        last_woken_s = max(client.woken_s[version] for client in self._clients)
        last_looked_s = max(client.looked_s[version] for client in self._clients)
        return float(np.quantile(waits_s, 0.95)), last_looked_s - last_woken_s

    async def _until_connected(self) -> None:
        await self._until(lambda client: client.is_connected, "connected")

    async def _until_looked(self, version: int) -> None:
        await self._until(lambda client: client.seen_version >= version, f"saw version {version}")

    async def _until(self, is_true: object, what: str) -> None:
        assert callable(is_true)
        ends_s = time.monotonic() + ALL_WITHIN_S
        while missing := sum(not is_true(client) for client in self._clients):
            if time.monotonic() > ends_s:
                raise TimeoutError(f"{missing} clients never {what}")
            await asyncio.sleep(0.02)


@contextmanager
def _servers(folder: Path) -> Iterator[dict[str, str] | None]:
    """Private PostgreSQL and Redis from development packages; None where they are not installed."""
    from tests.system import backends  # noqa: PLC0415 - needs development packages

    folder.mkdir(parents=True)
    try:
        with backends.servers(folder) as environment:
            yield environment
    except BaseException as error:
        if type(error).__name__ != "Skipped":
            raise
        yield None


def measure(folder: Path, *, devices: int, backends: tuple[str, ...] = ALL_BACKENDS) -> list[Found]:
    """The story on each backend that runs here."""
    found = []
    for backend in backends:
        place = folder / f"fleet-{backend.partition(' ')[0].lower()}"
        with _environment(backend, place) as environment:
            if environment is None:
                print(f"{backend}: not run, the servers are not installed")
                continue
            with WebProcess(place, environment, devices=devices) as web:
                found.append(asyncio.run(Fleet(web, devices=devices).run(backend)))
    return found


@contextmanager
def _environment(backend: str, place: Path) -> Iterator[dict[str, str] | None]:
    if backend == "SQLite":
        place.mkdir(parents=True)
        yield {}
    else:
        with _servers(place) as environment:
            yield environment


def main() -> None:
    """Prints a table per backend, and a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100 agents on SQLite")
    parser.add_argument("--devices", type=int, default=1000)
    options = parser.parse_args()
    devices, backends = (100, QUICK_BACKENDS) if options.quick else (options.devices, ALL_BACKENDS)
    summary = {}
    with tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True) as folder:
        for found in measure(Path(folder), devices=devices, backends=backends):
            print(f"-- {found.devices} connected agents, {found.backend}; all connected in {found.connected_s:.1f} s")
            for name, value, limit in found.rows():
                print(f"{name:<60}{value:>8.2f}   at most {limit:g}{'' if value <= limit else '   MISSED'}")
            summary[f"wakeup_p95_s_{found.backend.partition(' ')[0].lower()}"] = round(found.wake_up_p95_s, 3)
    print(json.dumps({"devices": devices} | summary))


if __name__ == "__main__":
    main()
