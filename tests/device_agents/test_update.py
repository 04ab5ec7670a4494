"""The update machine: fail and power loss in every state. The store is real, the network is a fake."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from device_agents.client import ServiceClient
from device_agents.errors import RunFailed
from device_agents.executor import Executor
from device_agents.profiler import Warmed, warm_up
from device_agents.runtime import EmulatedQuota, Session
from device_agents.served import ServedModel
from device_agents.states import STEPS, is_under_way
from device_agents.store import Identity, Record, Store
from device_agents.update import Machine, Tools
from device_agents.wire import DesiredApplication, HealthGate, Outcome, ServingConfiguration, UpdateState
from tests.device_agents.fake_service import NOW, URL, FakeService, desired
from tests.device_agents.models import Model, not_finite, scaling, summing

ROW = {"x": np.ones((1, 4), dtype=np.float32)}
OLD, NEW = scaling(2), scaling(3)
IN_FLIGHT = [state for state in UpdateState if is_under_way(state)]
BUDGET_BYTES = 10_000_000


def assert_opened(gate: threading.Event) -> None:
    assert gate.wait(30)


class PowerLoss(BaseException):
    """The process is gone."""


class FragileStore(Store):
    """Loses power when a record in ``state`` is saved: just before, or just after it is on disk."""

    state: UpdateState | None = None
    is_saved = True

    def save_record(self, record: Record) -> None:
        if record.state is not self.state:
            return super().save_record(record)
        if self.is_saved:
            super().save_record(record)
        raise PowerLoss


class NoWaiting(random.Random):
    """Back-off without the time."""

    def uniform(self, a: float, b: float) -> float:
        return 0.0


@dataclass
class Device:
    """One power cycle of a device with one application."""

    store: FragileStore
    machine: Machine
    exchanged: list[str]

    @property
    def running(self) -> str | None:
        served = self.machine.executor.served
        return served.digest if served else None

    @property
    def ends(self) -> list[tuple[str, Outcome]]:
        return [(outcome.decision_id, outcome.outcome) for outcome in self.machine.record.outcomes]

    def answer(self) -> float:
        return float(self.machine.executor.infer(ROW, timeout_s=5).outputs["y"][0, 0])

    def attempt(self, wanted: DesiredApplication) -> None:
        self.machine.attempt(wanted, seen_s=time.monotonic(), overtaken=threading.Event())

    def commit(self, wanted: DesiredApplication) -> None:
        self.attempt(wanted)
        self.machine.soak(threading.Event())
        assert self.machine.record.state is UpdateState.COMMITTED


def switch_on(folder: Path, service: FakeService, *, budget_bytes: int = BUDGET_BYTES) -> Device:
    """A device as it comes up, with whatever the last power cycle left in ``folder``."""
    store = FragileStore(folder, disk_budget_bytes=budget_bytes)
    identity = Identity(service_url=URL, device_id="device-1", credential="secret")
    client = ServiceClient(URL, identity=identity, transport=service.transport, rng=NoWaiting())
    record = next(iter(store.records()), Record(application="digits", model_name="digits"))
    exchanged: list[str] = []

    def warm(desired: DesiredApplication, *, must_match: Session | None) -> Warmed:
        path, digest = store.artifact(desired.variant.digest), desired.variant.digest
        if digest == service.hangs:
            assert service.released.wait(30)
        return warm_up(path, digest=digest, threads=1, max_batch=4, budget_s=0.02, must_match=must_match)

    def note(old: ServedModel | None, new: ServedModel) -> None:
        assert store.is_intact(new.digest), "an unverified variant is served"
        exchanged.append(new.digest)

    tools = Tools(
        store=store,
        fetch=client.download,
        warm_up=warm,
        now=lambda: NOW,
        warm_up_limit_s=5.0 if service.hangs is None else 0.2,
        stuck_after_s=0.2,
        in_use=lambda: machine.digests_in_use(),  # noqa: PLW0108 - the machine is made below
    )
    machine = Machine(record, Executor("digits", queue_requests=8), tools, on_exchange=note)
    machine.boot()
    return Device(store, machine, exchanged)


@pytest.fixture
def device(tmp_path: Path, service: FakeService) -> Device:
    """A device that has committed OLD under decision d1, and has told so."""
    service.offer(OLD, NEW)
    device = switch_on(tmp_path, service)
    device.commit(desired(OLD, "d1"))
    device.machine.acknowledge(device.machine.record.outcomes)
    return device


# -- power loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", IN_FLIGHT)
def test_power_loss_in_any_state_boots_to_the_committed_variant_and_is_reported(
    tmp_path: Path, device: Device, service: FakeService, state: UpdateState
) -> None:
    device.store.state = state
    with pytest.raises(PowerLoss):
        device.attempt(desired(NEW, "d2"))

    again = switch_on(tmp_path, service)

    assert again.running == OLD.digest
    assert again.answer() == 2
    assert again.machine.record.state is UpdateState.ROLLED_BACK
    assert again.ends == [("d2", STEPS[state].interrupted)]
    assert state.value in again.machine.record.outcomes[0].reason


@pytest.mark.parametrize("state", IN_FLIGHT)
def test_power_loss_just_before_a_state_is_on_disk_boots_to_the_committed_variant(
    tmp_path: Path, device: Device, service: FakeService, state: UpdateState
) -> None:
    device.store.state, device.store.is_saved = state, False
    with pytest.raises(PowerLoss):
        device.attempt(desired(NEW, "d2"))
    again = switch_on(tmp_path, service)
    assert again.running == OLD.digest
    assert not is_under_way(again.machine.record.state)


@pytest.mark.parametrize(("is_saved", "digest"), [(False, OLD.digest), (True, NEW.digest)])
def test_the_commit_is_one_moment(
    tmp_path: Path, device: Device, service: FakeService, is_saved: bool, digest: str
) -> None:
    device.attempt(desired(NEW, "d2"))
    device.store.state, device.store.is_saved = UpdateState.COMMITTED, is_saved
    with pytest.raises(PowerLoss):
        device.machine.soak(threading.Event())
    again = switch_on(tmp_path, service)
    assert again.running == digest
    assert len(again.ends) == 1


def test_power_loss_before_anything_was_committed_serves_nothing(tmp_path: Path, service: FakeService) -> None:
    service.offer(NEW)
    device = switch_on(tmp_path, service)
    device.store.state = UpdateState.SOAKING
    with pytest.raises(PowerLoss):
        device.attempt(desired(NEW, "d1"))
    again = switch_on(tmp_path, service)
    assert again.running is None
    assert again.ends == [("d1", Outcome.ROLLED_BACK)]


def test_a_decision_that_crashed_the_device_is_not_tried_again(
    tmp_path: Path, device: Device, service: FakeService
) -> None:
    device.store.state = UpdateState.WARMING
    with pytest.raises(PowerLoss):
        device.attempt(desired(NEW, "d2"))
    again = switch_on(tmp_path, service)
    again.attempt(desired(NEW, "d2"))
    assert again.running == OLD.digest
    assert len(again.ends) == 1


def test_a_committed_variant_that_rots_on_disk_is_not_served_but_its_predecessor_is(
    tmp_path: Path, device: Device, service: FakeService
) -> None:
    device.commit(desired(NEW, "d2"))
    device.store.artifact(NEW.digest).write_bytes(b"rot" + NEW.content[3:])
    again = switch_on(tmp_path, service)
    assert again.running == OLD.digest
    assert again.ends[-1] == ("d2", Outcome.VERIFY_FAILED)


# -- failures ----------------------------------------------------------------------------------------------


def missing(service: FakeService) -> DesiredApplication:
    return desired(scaling(9), "d2")


def corrupt(service: FakeService) -> DesiredApplication:
    service.artifacts[NEW.digest] = bytes([NEW.content[0] ^ 1]) + NEW.content[1:]
    return desired(NEW, "d2")


def truncated(service: FakeService) -> DesiredApplication:
    service.artifacts[NEW.digest] = NEW.content[:-1]
    return desired(NEW, "d2")


def oversized(service: FakeService) -> DesiredApplication:
    service.artifacts[NEW.digest] = NEW.content + b"more"
    return desired(NEW, "d2")


def no_model(service: FakeService) -> DesiredApplication:
    junk = Model(b"this is no model, whatever its digest says")
    service.offer(junk)
    return desired(junk, "d2")


def other_outputs(service: FakeService) -> DesiredApplication:
    other = scaling(3, output="z")
    service.offer(other)
    return desired(other, "d2")


def infinite(service: FakeService) -> DesiredApplication:
    service.offer(not_finite())
    return desired(not_finite(), "d2")


def mixes_rows(service: FakeService) -> DesiredApplication:
    service.offer(summing())
    return desired(summing(), "d2")


def too_slow(service: FakeService) -> DesiredApplication:
    return desired(NEW, "d2", gate=HealthGate(min_requests=1, soak_s=0, max_p95_ms=0.0))


SCENARIOS = {
    missing: Outcome.DOWNLOAD_FAILED,
    truncated: Outcome.DOWNLOAD_FAILED,
    oversized: Outcome.VERIFY_FAILED,
    corrupt: Outcome.VERIFY_FAILED,
    no_model: Outcome.INCOMPATIBLE,
    other_outputs: Outcome.INCOMPATIBLE,
    infinite: Outcome.INCOMPATIBLE,
    mixes_rows: Outcome.INCOMPATIBLE,
    too_slow: Outcome.ROLLED_BACK,
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_failed_attempt_leaves_the_old_variant_serving_and_says_how_it_ended(
    device: Device, service: FakeService, scenario: object
) -> None:
    assert callable(scenario)
    wanted = scenario(service)
    device.attempt(wanted)
    if device.machine.record.state is UpdateState.SOAKING:
        device.answer()
        device.machine.soak(threading.Event())
    assert device.machine.record.state is UpdateState.ROLLED_BACK
    assert device.ends == [("d2", SCENARIOS[scenario])]
    assert device.machine.record.outcomes[0].reason
    assert device.running == OLD.digest
    assert device.answer() == 2


def test_no_room_is_told_before_a_byte_is_fetched(tmp_path: Path, service: FakeService) -> None:
    service.offer(OLD, NEW)
    device = switch_on(tmp_path, service, budget_bytes=len(OLD.content) + 10)
    device.commit(desired(OLD, "d1"))
    device.attempt(desired(NEW, "d2"))
    assert device.ends[-1] == ("d2", Outcome.NO_SPACE)
    assert device.running == OLD.digest
    assert not any(NEW.digest in request.url.path for request in service.requests)


def test_a_full_disk_that_cannot_even_keep_state_does_not_stop_serving(device: Device) -> None:
    def fail(record: Record) -> None:
        raise OSError(28, "No space left on device")

    device.store.save_record = fail  # type: ignore[method-assign]  # the disk fills up
    device.attempt(desired(NEW, "d2"))
    assert device.ends == [("d2", Outcome.NO_SPACE)]
    assert device.running == OLD.digest


def test_attempts_at_a_decision_are_bounded(device: Device, service: FakeService) -> None:
    for _ in range(5):
        device.attempt(missing(service))
    assert len(device.ends) == 3


def test_a_download_that_power_loss_broke_is_completed_later(
    tmp_path: Path, device: Device, service: FakeService
) -> None:
    device.store.part(NEW.digest).write_bytes(NEW.content[:-1])
    device.store.state = UpdateState.DOWNLOADING
    with pytest.raises(PowerLoss):
        device.attempt(desired(NEW, "d2"))
    service.sent_bytes = 0
    again = switch_on(tmp_path, service)
    again.attempt(desired(NEW, "d2"))
    assert again.running == NEW.digest
    assert service.sent_bytes == 1


def test_an_order_that_comes_in_between_ends_the_attempt(device: Device) -> None:
    overtaken = threading.Event()
    overtaken.set()
    device.machine.attempt(desired(NEW, "d2"), seen_s=time.monotonic(), overtaken=overtaken)
    assert device.ends == [("d2", Outcome.SUPERSEDED)]
    assert device.running == OLD.digest


def test_an_attempt_that_was_overtaken_does_not_count(device: Device) -> None:
    for _ in range(5):
        device.attempt(desired(NEW, "d2", gate=HealthGate(soak_s=60)))
        device.machine.abandon("the agent stopped")
    device.commit(desired(NEW, "d2"))
    assert device.running == NEW.digest


def test_a_rollback_after_two_candidates_returns_to_what_was_committed(device: Device, service: FakeService) -> None:
    device.attempt(desired(NEW, "d2", gate=HealthGate(soak_s=60)))
    device.machine.abandon("overtaken by decision d3")
    assert device.running == NEW.digest
    service.offer(not_finite())
    device.attempt(desired(not_finite(), "d3"))
    assert device.running == OLD.digest


def test_a_variant_that_never_soaked_is_not_committed_by_adopting_it(device: Device) -> None:
    device.attempt(desired(NEW, "d2", gate=HealthGate(soak_s=60)))
    device.machine.adopt(desired(NEW, "d3", gate=HealthGate(soak_s=60)), seen_s=time.monotonic())
    assert device.machine.record.state is UpdateState.SOAKING
    assert device.ends == [("d2", Outcome.SUPERSEDED)]
    assert device.machine.record.committed == desired(OLD, "d1")


def test_a_variant_that_rots_on_disk_is_found_out_and_fetched_anew(device: Device, service: FakeService) -> None:
    device.commit(desired(NEW, "d2"))
    device.commit(desired(OLD, "d3"))
    device.store.artifact(NEW.digest).write_bytes(b"x" * len(NEW.content))
    service.sent_bytes = 0
    device.commit(desired(NEW, "d4"))
    assert service.sent_bytes == len(NEW.content)
    assert device.answer() == 3


def test_a_damaged_beginning_is_not_held_against_the_variant(device: Device, service: FakeService) -> None:
    device.store.part(NEW.digest).write_bytes(b"x" * 20)
    device.commit(desired(NEW, "d2"))
    assert device.answer() == 3


def test_what_is_wrong_twice_is_wrong(device: Device, service: FakeService) -> None:
    device.store.part(NEW.digest).write_bytes(b"x" * 20)
    device.attempt(corrupt(service))
    assert device.ends == [("d2", Outcome.VERIFY_FAILED)]
    assert device.running == OLD.digest


# -- hangs -------------------------------------------------------------------------------------------------


def test_a_variant_that_hangs_under_traffic_is_rolled_back_and_the_old_one_answers(device: Device) -> None:
    gate = threading.Event()
    device.attempt(desired(NEW, "d2", gate=HealthGate(min_requests=0, soak_s=0)))
    candidate = device.machine.executor.served
    assert candidate is not None
    candidate.session._quota = EmulatedQuota(1e-9, sleep=lambda _: assert_opened(gate))
    stuck = device.machine.executor.submit(ROW)
    time.sleep(0.05)
    waiting = device.machine.executor.submit(ROW)
    device.machine.soak(threading.Event())
    assert device.machine.record.state is UpdateState.SOAKING, "a run may take a moment"
    time.sleep(0.25)
    device.machine.soak(threading.Event())
    assert device.ends == [("d2", Outcome.ROLLED_BACK)]
    assert "requests was answered" in device.machine.record.outcomes[0].reason
    assert device.running == OLD.digest
    assert float(waiting.result(5).outputs["y"][0, 0]) == 2
    assert isinstance(stuck.exception(5), RunFailed)
    gate.set()


def test_a_variant_that_hangs_when_it_is_tried_ends_the_attempt_and_not_the_follower(
    tmp_path: Path, service: FakeService
) -> None:
    service.offer(OLD, NEW)
    service.hangs = NEW.digest
    device = switch_on(tmp_path, service)
    device.commit(desired(OLD, "d1"))
    device.attempt(desired(NEW, "d2"))
    assert device.ends[-1] == ("d2", Outcome.ROLLED_BACK)
    assert "warm-up" in device.machine.record.outcomes[-1].reason
    assert device.answer() == 2
    device.commit(desired(OLD, "d3"))
    service.released.set()


def test_a_committed_variant_that_hangs_after_a_restart_does_not_keep_the_device_from_booting(
    tmp_path: Path, device: Device, service: FakeService
) -> None:
    device.commit(desired(NEW, "d2"))
    service.hangs = NEW.digest
    again = switch_on(tmp_path, service)
    assert again.running == OLD.digest
    service.released.set()


# -- what serves is what is committed ------------------------------------------------------------------------

TWO_THREADS = ServingConfiguration(max_batch=4, threads=2)
LONG_SOAK = HealthGate(soak_s=60)


def soaking_with_two_threads(device: Device, *, gate: HealthGate) -> None:
    device.attempt(desired(OLD, "d2", serving=TWO_THREADS, gate=LONG_SOAK))
    device.machine.adopt(desired(OLD, "d3", serving=TWO_THREADS, gate=gate), seen_s=time.monotonic())
    assert device.machine.record.state is UpdateState.SOAKING, "two threads were never vouched for"


def decision(device: Device) -> str | None:
    served = device.machine.executor.served
    return served.decision_id if served else None


def committed(device: Device) -> str | None:
    record = device.machine.record.committed
    return record.decision_id if record else None


def test_a_failure_does_not_return_to_a_decision_that_was_replaced(device: Device, service: FakeService) -> None:
    soaking_with_two_threads(device, gate=HealthGate(min_requests=0, soak_s=0))
    device.machine.soak(threading.Event())
    device.attempt(desired(scaling(9), "d4"))
    assert device.ends[-1] == ("d4", Outcome.DOWNLOAD_FAILED)
    assert (decision(device), committed(device)) == ("d3", "d3")


@pytest.mark.parametrize("broken", [scaling(9), not_finite()], ids=["missing", "not finite"])
def test_a_failure_before_the_soak_is_over_returns_to_what_is_committed(
    device: Device, service: FakeService, broken: Model
) -> None:
    service.offer(not_finite())
    soaking_with_two_threads(device, gate=LONG_SOAK)
    device.machine.abandon("overtaken by decision d4")
    device.attempt(desired(broken, "d4"))
    assert (decision(device), committed(device)) == ("d1", "d1")


def test_a_variant_that_never_soaked_is_no_fallback(device: Device, service: FakeService) -> None:
    device.attempt(desired(OLD, "d2", serving=TWO_THREADS, gate=LONG_SOAK))
    device.machine.abandon("overtaken by decision d3")
    device.attempt(desired(NEW, "d3", gate=LONG_SOAK))
    device.machine.abandon("overtaken by decision d4")
    device.attempt(desired(scaling(9), "d4"))
    assert (decision(device), committed(device)) == ("d1", "d1")


def test_adopting_what_is_committed_leaves_nothing_to_fall_back_to(device: Device, service: FakeService) -> None:
    device.attempt(desired(NEW, "d2", gate=LONG_SOAK))
    device.machine.abandon("overtaken by decision d3")
    device.attempt(desired(OLD, "d3", gate=LONG_SOAK))
    device.machine.adopt(desired(OLD, "d4"), seen_s=time.monotonic())
    device.attempt(desired(scaling(9), "d5"))
    assert (decision(device), committed(device)) == ("d4", "d4")


def test_every_state_has_a_row_and_every_failure_ends_at_rest() -> None:
    assert set(STEPS) == set(UpdateState)
    for state in IN_FLIGHT:
        assert STEPS[state].failed is UpdateState.ROLLED_BACK
        assert not is_under_way(STEPS[state].booted)
