"""With nothing committed, a device serves the fallback that its document names, and rates nothing by it."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pytest

from device_agents.wire import DesiredApplication, HealthGate, Outcome, UpdateState
from tests.device_agents.fake_service import FakeService, desired, variant
from tests.device_agents.models import Model, not_finite, scaling
from tests.device_agents.test_update import NEW, OLD, Device, switch_on

SAFE = scaling(5)
STRICT = HealthGate(min_requests=1, soak_s=0, max_error_share=0, max_p95_ms=0)


def wanted(
    model: Model, decision_id: str, *, fallback: Model = SAFE, gate: HealthGate | None = None
) -> DesiredApplication:
    return desired(model, decision_id, gate=gate).model_copy(update={"fallback": variant(fallback)})


@pytest.fixture
def fresh(tmp_path: Path, service: FakeService) -> Device:
    """A device that never committed anything."""
    service.offer(OLD, NEW, SAFE, not_finite())
    return switch_on(tmp_path, service)


def test_a_first_variant_that_cannot_run_is_replaced_by_the_fallback_under_no_decision(fresh: Device) -> None:
    fresh.attempt(wanted(not_finite(), "d1"))
    assert fresh.running == SAFE.digest
    assert fresh.answer() == 5
    served = fresh.machine.executor.served
    assert served is not None
    assert (served.decision_id, served.lease_s) == (None, math.inf)
    assert fresh.ends == [("d1", Outcome.INCOMPATIBLE)]
    assert fresh.machine.record.state is UpdateState.ROLLED_BACK


def test_a_first_variant_that_fails_its_soak_is_replaced_by_the_fallback(fresh: Device) -> None:
    fresh.attempt(wanted(NEW, "d1", gate=STRICT))
    assert fresh.answer() == 3
    fresh.machine.soak(threading.Event())
    assert fresh.answer() == 5
    assert fresh.ends == [("d1", Outcome.ROLLED_BACK)]


def test_a_restart_serves_the_fallback_again(fresh: Device, tmp_path: Path, service: FakeService) -> None:
    fresh.attempt(wanted(not_finite(), "d1"))
    service.is_away = True
    again = switch_on(tmp_path, service)
    assert again.running == SAFE.digest


def test_a_decision_that_is_given_up_still_leads_to_its_fallback(
    fresh: Device, tmp_path: Path, service: FakeService
) -> None:
    service.artifacts.pop(SAFE.digest)
    fresh.attempt(wanted(not_finite(), "d1"))
    assert fresh.running is None
    service.offer(SAFE)
    again = switch_on(tmp_path, service)
    again.attempt(wanted(not_finite(), "d1"))
    assert again.running == SAFE.digest
    assert len(again.ends) == 1


def test_what_is_committed_is_worth_more_than_any_fallback(fresh: Device, service: FakeService) -> None:
    fresh.commit(wanted(OLD, "d1"))
    fresh.attempt(wanted(not_finite(), "d2"))
    assert fresh.running == OLD.digest
    assert SAFE.digest not in fresh.store.cached_digests()
    assert fresh.machine.record.fallback is None


def test_a_variant_that_fails_beside_the_fallback_returns_to_it(fresh: Device, service: FakeService) -> None:
    fresh.attempt(wanted(not_finite(), "d1"))
    sent = service.sent_bytes
    fresh.attempt(wanted(NEW, "d2", gate=STRICT))
    assert fresh.answer() == 3
    fresh.machine.soak(threading.Event())
    assert fresh.answer() == 5
    assert service.sent_bytes == sent + len(NEW.content)


def test_a_newer_order_comes_before_the_fallback(fresh: Device) -> None:
    overtaken = threading.Event()
    overtaken.set()
    fresh.machine.attempt(wanted(NEW, "d1"), seen_s=time.monotonic(), overtaken=overtaken)
    assert fresh.running is None


def test_a_fallback_that_fails_too_leaves_the_device_with_what_it_has(fresh: Device) -> None:
    fresh.attempt(wanted(NEW, "d1", fallback=not_finite(), gate=STRICT))
    fresh.answer()
    fresh.machine.soak(threading.Event())
    assert fresh.answer() == 3
