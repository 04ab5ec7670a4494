"""Faults that act on the real agent process: kill -9, network cuts, a full disk, clocks that jump, a long backlog."""

from __future__ import annotations

import itertools
import random
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.delivery_device import App, Device, Watch, compiled_shim
from benchmarks.delivery_proxy import CuttingProxy
from benchmarks.delivery_service import Model, RigService, decision, scaling
from device_agents.spool import Spool
from device_agents.wire import Components, Feedback, Outcome, UpdateState

S = UpdateState
SLOW_DISK_US = 15_000
CHUNK_BYTES = 65_536
COMMIT_S = 30.0
SIZE_BYTES = 2_000_000


@dataclass
class Offer:
    """Models under factors of their own, put into a service as they are made."""

    service: RigService
    factors: dict[str, float] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(2))

    def good(self, *, size_bytes: int = SIZE_BYTES) -> Model:
        """A model that works."""
        return self._offer(scaling(float(next(self._numbers)), size_bytes=size_bytes))

    def failing(self) -> Model:
        """A model that fails its warm-up."""
        return self._offer(scaling(float("inf"), size_bytes=16 * next(self._numbers)))

    def spoiled(self, *, size_bytes: int = SIZE_BYTES) -> Model:
        """A model whose bytes were exchanged on the way for those of another that would load and answer."""
        model = self.good(size_bytes=size_bytes)
        self.service.artifacts[model.digest] = scaling(-model.factor, size_bytes=size_bytes).content
        return model

    def _offer(self, model: Model) -> Model:
        self.service.artifacts[model.digest] = model.content
        self.factors[model.digest] = model.factor
        return model


# -- kill -9 -----------------------------------------------------------------------------------------------------------


@dataclass
class Kills:
    """What came of many kills. ``reached`` counts the states that the store held when the process was gone."""

    reached: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    boots_to_committed: int = 0
    unverified_served: int = 0
    answers: int = 0

    def __add__(self, other: Kills) -> Kills:
        return Kills(
            self.reached + other.reached,
            self.kills + other.kills,
            self.boots_to_committed + other.boots_to_committed,
            self.unverified_served + other.unverified_served,
            self.answers + other.answers,
        )


class KillBench:
    """One device that is killed again and again. After each kill follows a check of what it boots to."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.found = Kills()
        self._folder = folder
        self._random = random.Random(seed)
        self._numbers = itertools.count(1)
        shim = compiled_shim(folder)
        self._environment = {"LD_PRELOAD": str(shim), "SHIM_FSYNC_US": str(SLOW_DISK_US)} if shim else {}
        self._environment["QOE_AGENT_DISK_BUDGET_BYTES"] = str(8 * SIZE_BYTES)

    def run(self, *, per_state: int, arbitrary: int, tries: int = 8) -> Kills:
        """Until every state was hit ``per_state`` times (or tried ``tries`` times as often), and then at any moment."""
        with RigService() as service, Device(self._folder / "state", service, environment=self._environment) as device:
            offer = Offer(service)
            self._commit_first(service, device, offer)
            with Watch(device, offer.factors) as watch:
                for state in S:
                    for _ in range(per_state * tries):
                        if self.found.reached[state.value] >= per_state:
                            break
                        self._life(service, device, offer, state)
                for _ in range(arbitrary):
                    self._life(service, device, offer, None)
                service.hold(False)  # who still asks is answered before the service ends
            self.found.answers, self.found.unverified_served = watch.answers, watch.unverified
        return self.found

    def _commit_first(self, service: RigService, device: Device, offer: Offer) -> None:
        device.start()
        service.want(decision(offer.good(), "first"))
        if not device.wait_for_state(S.COMMITTED, "first", COMMIT_S):
            raise TimeoutError("the first variant was not committed")

    def _life(self, service: RigService, device: Device, offer: Offer, aim: UpdateState | None) -> None:
        """Begin an attempt, die, boot, check; the service holds its documents back until the next attempt."""
        decision_id = f"d{next(self._numbers)}"
        if aim is None:
            self._begin_anything(service, offer, decision_id)
            time.sleep(self._random.uniform(0.0, 1.0))
        else:
            self._begin(service, device, offer, aim, decision_id)
        device.kill()
        record = device.record()
        self.found.kills += 1
        self.found.reached[record.state.value if record else "none"] += 1
        service.hold(True)
        self._boot(device)

    def _boot(self, device: Device) -> None:
        record = device.record()
        assert record is not None, "a variant was committed before the first kill"
        assert record.committed is not None, "a variant was committed before the first kill"
        device.start()
        app = App(device.port)
        answer = app.first_answer()
        app.hang_up()
        self.found.boots_to_committed += answer.digest == record.committed.variant.digest

    def _begin(self, service: RigService, device: Device, offer: Offer, aim: UpdateState, decision_id: str) -> None:
        """Leads the attempt into the state that is aimed at; what was reached is read when the process is gone."""
        model = offer.failing() if aim is S.ROLLED_BACK else offer.good()
        service.rate_bytes_per_s = 4 * SIZE_BYTES if aim in (S.DOWNLOADING, S.IDLE) else None
        before = service.applications
        service.want(decision(model, decision_id, soak_s=5.0 if aim is S.SOAKING else 0.0))
        service.hold(False)
        if aim is S.IDLE:  # an order that is taken back while it is under way ends at rest, with nothing tried
            device.wait_for_state(S.DOWNLOADING, decision_id)
            record = device.record()
            service.want(*([record.committed] if record and record.committed else before))
        device.wait_for_state(aim, decision_id)
        if aim in (S.DOWNLOADING, S.WARMING, S.SOAKING):
            time.sleep(self._random.uniform(0.0, 0.04))

    def _begin_anything(self, service: RigService, offer: Offer, decision_id: str) -> None:
        kind = self._random.random()
        model = offer.spoiled() if kind < 0.15 else offer.failing() if kind < 0.25 else offer.good()
        service.rate_bytes_per_s = self._random.choice([None, 8.0 * SIZE_BYTES])
        service.want(decision(model, decision_id, soak_s=self._random.choice([0.0, 0.3])))
        service.hold(False)


def kills(folder: Path, *, per_state: int, arbitrary: int, devices: int = 2) -> Kills:
    """Kills of several devices at once, each with its share."""
    benches = [KillBench(folder / f"kills-{number}", seed=number) for number in range(devices)]
    shares = [(_share(per_state, devices, n), _share(arbitrary, devices, n)) for n in range(devices)]
    with ThreadPoolExecutor(devices) as pool:
        ran = [
            pool.submit(bench.run, per_state=states, arbitrary=moments)
            for bench, (states, moments) in zip(benches, shares, strict=True)
        ]
        return sum((each.result() for each in ran), Kills())


def _share(total: int, parts: int, number: int) -> int:
    return total // parts + (number < total % parts)


# -- network cuts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cuts:
    """``overfetch_chunks_per_break`` is the worst download's body bytes beyond its size, per cut, in 64 KiB."""

    cuts: int
    downloads: int
    committed: int
    overfetch_chunks_per_break: float
    unverified_served: int


def cuts(folder: Path, *, downloads: int, cuts_each: int, seed: int = 1) -> Cuts:
    """Downloads through a proxy that cuts each of them at random bytes, half of the times by reset."""
    rng, worst, committed, total = random.Random(seed), 0.0, 0, 0
    with (
        RigService() as service,
        CuttingProxy(service.port) as proxy,
        Device(folder / "cuts", service, service_port=proxy.port) as device,
    ):
        offer = Offer(service)
        device.start()
        with Watch(device, offer.factors) as watch:
            for number in range(downloads):
                model = offer.good()
                before_bytes, before_cuts = proxy.body_bytes, proxy.cuts
                breaker = threading.Thread(
                    target=_cut_at, args=(proxy, _places(rng, len(model.content), cuts_each), rng)
                )
                breaker.start()
                service.want(decision(model, f"d{number}"))
                committed += device.wait_for_state(S.COMMITTED, f"d{number}", 60.0)
                breaker.join(1.0)
                made = proxy.cuts - before_cuts
                total += made
                beyond = proxy.body_bytes - before_bytes - len(model.content)
                worst = max(worst, beyond / CHUNK_BYTES / max(1, made))
        return Cuts(total, downloads, committed, worst, watch.unverified)


def _places(rng: random.Random, size: int, count: int) -> list[int]:
    """Random bytes of the body, as distances from one to the next."""
    at = sorted(rng.randrange(1, size - 1) for _ in range(count))
    return [at[0], *(max(1, later - earlier) for earlier, later in itertools.pairwise(at))]


def _cut_at(proxy: CuttingProxy, places: Sequence[int], rng: random.Random) -> None:
    for place in places:
        made = proxy.cuts
        proxy.cut_after(place, resets=rng.random() < 0.5)
        ends_s = time.monotonic() + 30.0
        while proxy.cuts == made and time.monotonic() < ends_s:
            time.sleep(0.001)


# -- a full disk -------------------------------------------------------------------------------------------------------


def full_disk_by_limit(folder: Path) -> dict[str, bool]:
    """A file may grow to 1 MB only (RLIMIT_FSIZE): the variant does not fit, and everything else goes on."""
    with RigService() as service, Device(folder / "limit", service, file_limit_bytes=1_000_000) as device:
        return _fill(service, device, lambda: None)


def full_disk_by_tmpfs(folder: Path) -> dict[str, bool] | None:
    """A state folder on a tmpfs of 4 MB that something else fills while the agent runs. None: mounting is forbidden."""
    mounted = folder / "tmpfs"
    with _tmpfs(mounted, size="4m") as is_mounted:
        if not is_mounted:
            return None
        with RigService() as service, Device(mounted / "state", service) as device:
            return _fill(service, device, lambda: _fill_up(mounted / "filler"))


def _fill(service: RigService, device: Device, fill: object) -> dict[str, bool]:
    offer = Offer(service)
    small, large = offer.good(size_bytes=100_000), offer.good(size_bytes=3_000_000)
    device.start()
    with Watch(device, offer.factors) as watch:
        service.want(decision(small, "small"))
        first = device.wait_for_state(S.COMMITTED, "small", COMMIT_S)
        assert callable(fill)
        fill()
        service.want(decision(large, "large"))
        service.wait_for(lambda: service.ended("large") is not None)
        ended = service.ended("large")
        app = App(device.port)
        serves = app.first_answer().digest == small.digest
        device.kill()
        device.start()
        boots = app.first_answer().digest == small.digest
        app.hang_up()
    return {
        "first variant committed": first,
        "told no_space": ended is not None and ended.outcome is Outcome.NO_SPACE,
        "served on": serves,
        "booted to the committed variant": boots,
        "nothing unverified served": watch.unverified == 0,
    }


def _fill_up(path: Path) -> None:
    with suppress(OSError), path.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()


@contextmanager
def _tmpfs(folder: Path, *, size: str) -> Iterator[bool]:
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


# -- clocks ------------------------------------------------------------------------------------------------------------


def clock_jumps(folder: Path, *, years: Sequence[int] = (-20, 10)) -> dict[str, bool] | None:
    """The wall clock of the process jumps while an attempt is under way, and before a boot. None: no C compiler."""
    shim = compiled_shim(folder)
    if shim is None:
        return None
    clock = folder / "clock"
    environment = {"LD_PRELOAD": str(shim), "SHIM_CLOCK_FILE": str(clock)}
    found = {}
    with RigService() as service, Device(folder / "clocks", service, environment=environment) as device:
        offer = Offer(service)
        service.rate_bytes_per_s = 4 * SIZE_BYTES
        with Watch(device, offer.factors) as watch:
            for jump in years:
                clock.write_text("0")
                device.start()
                model, name = offer.good(), f"jump{jump}"
                service.want(decision(model, name, soak_s=0.5))
                device.wait_for_state(S.DOWNLOADING, name)
                clock.write_text(str(jump * 31_536_000))
                found[f"{jump:+d} years while downloading: committed"] = device.wait_for_state(
                    S.COMMITTED, name, COMMIT_S
                )
                device.kill()
                device.start()
                app = App(device.port)
                found[f"{jump:+d} years before a boot: serves it"] = app.first_answer().digest == model.digest
                later, again = offer.good(), f"again{jump}"
                service.want(decision(later, again))
                found[f"{jump:+d} years: follows the next"] = device.wait_for_state(S.COMMITTED, again, COMMIT_S)
                told = [each.sent_at.year for each in service.check_ins]
                found[f"{jump:+d} years: its clock did jump"] = any(
                    abs(year - time.gmtime().tm_year) > 5 for year in told
                )
                app.hang_up()
                device.kill()
        found["nothing unverified served"] = watch.unverified == 0
    return found


# -- a long backlog ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backlog:
    """``ready_s``: from the start of the process to its first answer; drained once each, or not."""

    records: int
    ready_s: float
    ready_empty_s: float
    drained_s: float
    lost: int
    repeated: int


def backlog(folder: Path, *, records: int) -> Backlog:
    """An agent that comes up with that many spooled records and a service that takes them."""
    with RigService() as service, Device(folder / "backlog", service) as device:
        offer = Offer(service)
        device.start()
        service.want(decision(offer.good(), "first"))
        device.wait_for_state(S.COMMITTED, "first", COMMIT_S)
        device.stop()
        ready_empty_s = _ready_s(device)
        expected = _fill_spool(device.folder / "spool.sqlite3", records)
        started_s = time.monotonic()
        ready_s = _ready_s(device, stops=False)
        service.wait_for(lambda: len(service.fed_back) >= records, 300.0)
        drained_s = time.monotonic() - started_s
        lost = len(expected - set(service.fed_back))
        repeated = sum(count - 1 for count in service.fed_back.values())
        return Backlog(records, ready_s, ready_empty_s, drained_s, lost, repeated)


def _ready_s(device: Device, *, stops: bool = True) -> float:
    started_s = time.monotonic()
    device.start()
    app = App(device.port)
    app.first_answer()
    took_s = time.monotonic() - started_s
    app.hang_up()
    if stops:
        device.stop()
    return took_s


def _fill_spool(path: Path, records: int) -> set[str]:
    """As many records as apps would have left behind; put in by one transaction instead of one each."""
    Spool(path, budget_bytes=2**30, max_age_s=1e9).close()
    items = [
        Feedback(id=f"f{n}", decision_id="first", rating=0.5, components=Components(requests=n)) for n in range(records)
    ]
    rows = [(each.id, True, 0.0, 120, each.model_dump_json(exclude_defaults=True)) for each in items]
    with closing(sqlite3.connect(path)) as database, database:
        database.executemany(
            "INSERT INTO feedback (id, is_reward, created_at, size_bytes, payload) VALUES (?,?,?,?,?)", rows
        )
    return {each.id for each in items}
