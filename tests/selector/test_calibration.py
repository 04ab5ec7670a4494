"""How leases correct what the latency model expects."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from selector.actions import action_table
from selector.calibration import LEAST_MEASURED_MS, Calibration, scopes_of
from selector.errors import InvalidInput
from selector.hierarchy import LARGEST_EFFECT, LARGEST_LOADING, Level
from selector.interactions import Context, Interaction, Measurement, Profile
from selector.latency import LatencyModel, Predicted
from tests.selector.builders import action, closed, context, grid, interaction, profiles, ranked

ACTIONS = grid()


def predict(calibration: Calibration, situation: Context, some: tuple[Profile, ...] = profiles()) -> Predicted:
    return LatencyModel(some, calibration).predict(situation, action_table(ACTIONS))


def lease(calibration: Calibration, situation: Context, number: int, slow: float = 1.0, **changes: Any) -> Interaction:
    """One closed lease of a device ``slow`` times slower than its profile; every action gets its turn."""
    ranking = ranked(f"{situation.device}/{number}", context=situation, calibration=calibration, **changes)
    raw = ranking.candidates[ranking.chosen].prediction
    batch = raw.batch
    measurement = Measurement(
        requests=500,
        service_ms=slow * (raw.raw_a_ms * batch + raw.raw_b_ms),
        batch_mean=batch,
        cpu_ms_per_request=raw.raw_cpu_ms * slow,
    )
    return closed(ranking, situation, measurement, 0.5, f"{situation.device}/{number}")


def learn(calibration: Calibration, situation: Context, count: int, slow: float, **changes: Any) -> None:
    for number in range(count):
        calibration.update(lease(calibration, situation, number, slow, **changes))


def error(calibration: Calibration, situation: Context, slow: float) -> float:
    """Largest log error of the predicted service time over all actions."""
    known, raw = predict(calibration, situation), predict(Calibration(), situation)
    at_once = (known.service_ms / (known.raw_a_ms * known.batch + known.raw_b_ms)) / slow
    assert raw.raw_a_ms.tolist() == known.raw_a_ms.tolist()
    return float(np.abs(np.log(at_once)).max())


def test_a_slow_device_is_known_after_a_few_leases() -> None:
    calibration = Calibration()
    learn(calibration, context(), 8, slow=2.0)
    assert error(calibration, context(), 2.0) < 0.15
    sure = predict(calibration, context()).log_sd
    assert (sure < predict(Calibration(), context()).log_sd).all()


def test_a_new_device_starts_from_its_class_and_others_hardly_change() -> None:
    calibration = Calibration()
    for device in range(12):
        learn(calibration, context(device=f"slow-{device}"), 6, slow=1.6)
        learn(calibration, context(device=f"plain-{device}", device_class="nuc"), 6, slow=1.0)
    assert error(calibration, context(device="new"), 1.6) < 0.2
    assert error(calibration, context(device="other", device_class="nuc"), 1.0) < 0.15


def test_a_device_that_changes_its_class_starts_from_that_class() -> None:
    calibration = Calibration()
    for device in range(6):
        learn(calibration, context(device=f"slow-{device}"), 6, slow=2.0)
        learn(calibration, context(device=f"plain-{device}", device_class="nuc"), 6, slow=1.0)
    moved = context(device="slow-1", device_class="nuc")
    assert (
        predict(calibration, moved).p95_ms.tolist()
        == predict(calibration, replace(moved, device="new")).p95_ms.tolist()
    )
    rows = json.loads(json.dumps(calibration.rows()))
    learn(calibration, moved, 2, slow=1.0)
    assert error(calibration, moved, 1.0) < 0.15
    again = Calibration.from_rows(rows)
    learn(again, moved, 2, slow=1.0)
    assert again.rows() == calibration.rows()


def test_one_odd_lease_hardly_matters() -> None:
    calibration = Calibration()
    learn(calibration, context(), 10, slow=1.0)
    calibration.update(lease(calibration, context(), 99, slow=50.0))
    assert error(calibration, context(), 1.0) < 0.25


def test_what_is_hardly_believed_makes_hardly_surer() -> None:
    """Absurd times in turn, too long and too short: whatever the device is, they do not tell."""
    calibration = Calibration()
    learn(calibration, context(), 3, 1.0)
    sure = predict(calibration, context()).log_sd
    for number in range(3, 13):
        calibration.update(lease(calibration, context(), number, math.exp(4.0 if number % 2 else -4.0)))
    assert (predict(calibration, context()).log_sd > 0.9 * sure).all()
    assert error(calibration, context(), 1.0) < 0.3


@pytest.mark.parametrize("slow", [0.25, 2.0, 4.0])
def test_a_lasting_change_is_known_after_three_leases(slow: float) -> None:
    calibration = Calibration()
    learn(calibration, context(), 40, slow=1.0)
    for number in range(100, 103):
        calibration.update(lease(calibration, context(), number, slow))
    assert error(calibration, context(), slow) < 0.25


@pytest.mark.parametrize(
    ("usual", "other"),
    [({"features": {"temperature": 0.4}}, {"features": {"temperature": 0.8}}), ({}, {"cpu_load_share": 0.9})],
)
def test_what_heat_and_load_do_to_devices_of_a_class_is_learnt(usual: dict[str, Any], other: dict[str, Any]) -> None:
    """1.4 times slower where it is hot, or loaded; a new device of the class is expected to be as well."""
    calibration = Calibration()
    for number in range(120):
        device = f"device-{number % 4}"
        conditions, slow = ((usual, 1.0), (other, 1.4))[number // 4 % 2]
        calibration.update(lease(calibration, context(device=device, **conditions), number, slow))
    cool, hot = (
        predict(calibration, context(device="new", arrival_rate_rps=0.1, **each)).service_ms
        / predict(Calibration(), context(device="new", arrival_rate_rps=0.1, **each)).service_ms
        for each in (usual, other)
    )
    assert np.median(hot / cool) > 1.2


def test_a_slow_variant_is_told_from_a_slow_device() -> None:
    calibration = Calibration()
    for number in range(60):
        entry = lease(calibration, context(), number)
        slow = 2.0 if entry.candidates[entry.chosen].action.variant.name == "variant-1" else 1.0
        calibration.update(lease(calibration, context(), number, slow))
    known = predict(calibration, context())
    factor = known.service_ms / (known.raw_a_ms * known.batch + known.raw_b_ms)
    names = np.array([each.variant.name for each in ACTIONS])
    assert factor[names == "variant-1"].mean() / factor[names != "variant-1"].mean() > 1.5


def test_a_variant_that_is_slow_with_one_number_of_threads_is_told_from_variant_and_threads() -> None:
    """On one device, and on another of its class."""
    some = tuple(action(number, threads=threads) for number in range(3) for threads in (1, 2))
    measured = tuple(replace(each, threads=threads) for each in profiles() for threads in (1, 2))
    calibration = Calibration()
    for number in range(120):
        situation = context(device=f"device-{number % 4}")
        entry = lease(calibration, situation, number, actions=some, profiles=measured)
        chosen = entry.candidates[entry.chosen].action
        slow = 2.0 if (chosen.variant.name, chosen.configuration.threads) == ("variant-1", 2) else 1.0
        calibration.update(lease(calibration, situation, number, slow, actions=some, profiles=measured))
    for device in ("device-1", "new"):
        known = LatencyModel(measured, calibration).predict(context(device=device), action_table(some))
        factor = known.service_ms / (known.raw_a_ms * known.batch + known.raw_b_ms)
        assert factor[3] / max(np.delete(factor, 3)) > 1.4


def test_a_throttled_tail_is_learnt_apart_from_the_service_time() -> None:
    """A CPU quota: the median is right, p95 is five times what queueing says."""
    calibration = Calibration()
    before = predict(calibration, context())
    for number in range(15):
        entry = lease(calibration, context(), number)
        throttled = entry.candidates[entry.chosen].prediction.raw_b_ms + 5 * 12.0
        calibration.update(replace(entry, measurement=replace(entry.measurement, p95_ms=throttled)))
    after = predict(calibration, context())
    assert (after.p95_ms > 2 * before.p95_ms).all()
    assert after.p50_ms == pytest.approx(before.p50_ms, rel=0.1)
    assert (after.slo_violation_probability > before.slo_violation_probability).all()


def test_cpu_time_is_learnt_apart_from_the_service_time() -> None:
    calibration = Calibration()
    for number in range(15):
        entry = lease(calibration, context(), number)
        raw = entry.candidates[entry.chosen].prediction.raw_cpu_ms
        calibration.update(replace(entry, measurement=replace(entry.measurement, cpu_ms_per_request=3.0 * raw)))
    after = predict(calibration, context())
    assert (after.cpu_ms_per_request / after.raw_cpu_ms).tolist() == pytest.approx([3.0] * len(ACTIONS), rel=0.2)
    assert error(calibration, context(), 1.0) < 0.1


def test_a_median_alone_calibrates_too() -> None:
    calibration = Calibration()
    truth = predict(Calibration(), context(), profiles(factor=2.0))
    for number in range(25):
        entry = lease(calibration, context(), number)
        p50_ms = float(truth.p50_ms[ACTIONS.index(entry.candidates[entry.chosen].action)])
        calibration.update(replace(entry, measurement=Measurement(requests=500, p50_ms=p50_ms)))
    assert predict(calibration, context()).p50_ms == pytest.approx(truth.p50_ms, rel=0.25)


def test_predictions_of_an_older_revision_teach_the_same() -> None:
    """Two leases decided before either was learnt: the second is not counted as a new surprise."""
    calibration, situation = Calibration(), context()
    stale = [lease(Calibration(), situation, number, slow=2.0) for number in range(10)]
    for entry in stale:
        calibration.update(entry)
    assert error(calibration, situation, 2.0) < 0.15


def test_rows_carry_the_whole_state_through_json() -> None:
    straight, restarted = Calibration(), Calibration()
    for number in range(30):
        situation = context(device=f"device-{number % 3}")
        entry = lease(Calibration(), situation, number, slow=1.0 + number % 3)
        changed = straight.update(entry)
        assert changed == set(scopes_of(situation))
        restarted = Calibration.from_rows(json.loads(json.dumps(restarted.rows())))
        restarted.update(entry)
    assert restarted.rows() == straight.rows()
    assert straight.revisions(context(device="device-1")) == {"fleet": 30, "class:pi4": 30, "device:device-1": 10}
    one, other = predict(straight, context()), predict(restarted, context())
    assert one.p95_ms.tolist() == other.p95_ms.tolist()


def test_what_teaches_nothing_leaves_no_trace_in_rows() -> None:
    """Tails of overloaded devices are not learnt; whoever stores what changed and reloads has the same rows in the
    end."""
    straight, stored = Calibration(), dict[str, Any]()
    for number in range(12):
        situation = context(arrival_rate_rps=1e5 if number % 3 else 5.0)
        entry = lease(Calibration(), situation, number)
        if number % 3:
            entry = replace(entry, measurement=Measurement(requests=500, p95_ms=900.0))
        restarted = Calibration.from_rows(json.loads(json.dumps(stored)))
        changed = restarted.update(entry)
        assert changed == straight.update(entry) == (set() if number % 3 else set(scopes_of(situation)))
        stored |= restarted.rows(changed)
    assert stored == straight.rows()


def test_rows_are_copies_and_unknown_scopes_are_new() -> None:
    calibration = Calibration()
    learn(calibration, context(), 2, 1.5)
    calibration.rows()["fleet"]["effects"].clear()
    calibration.rows()["device:device-1"]["surprise"].clear()
    assert calibration.rows()["fleet"]["effects"]
    assert calibration.rows()["device:device-1"]["surprise"]
    assert calibration.rows(["device:never"]) == {"device:never": {"revision": 0}}


def test_only_the_rows_of_the_context_are_needed_to_predict() -> None:
    calibration = Calibration()
    learn(calibration, context(), 5, 2.0)
    learn(calibration, context(device="other"), 5, 0.5)
    some = Calibration.from_rows(calibration.rows(scopes_of(context())))
    assert predict(some, context()).p95_ms.tolist() == predict(calibration, context()).p95_ms.tolist()


def test_offsets_of_a_borrowed_profile_end_when_the_device_measures_itself() -> None:
    calibration = Calibration()
    learn(calibration, context(), 15, slow=3.0, profiles=profiles(source="server"))
    borrowed = predict(calibration, context(), profiles(source="server"))
    assert np.median(borrowed.service_ms / predict(Calibration(), context()).service_ms) == pytest.approx(3.0, rel=0.25)
    own = predict(calibration, context(), profiles(source="server") + profiles(factor=3.0))
    truth = predict(Calibration(), context(), profiles(factor=3.0))
    assert own.service_ms == pytest.approx(truth.service_ms, rel=0.2)


NOTHING = [
    {"measurement": Measurement(requests=0, service_ms=10.0)},
    {"measurement": Measurement(requests=10)},
    {"candidates": interaction().candidates},
]


@pytest.mark.parametrize("changes", NOTHING)
def test_nothing_to_compare_changes_nothing(changes: dict[str, Any]) -> None:
    calibration = Calibration()
    entry = replace(replace(lease(calibration, context(), 1), chosen=0), **changes)
    assert calibration.update(entry) == set()
    assert calibration.rows() == {}


@pytest.mark.parametrize("field", ["service_ms", "p95_ms", "cpu_ms_per_request"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_bad_measurement_changes_nothing(field: str, bad: Any) -> None:
    calibration = Calibration()
    learn(calibration, context(), 2, 1.0)
    before = calibration.rows()
    entry = lease(calibration, context(), 9)
    with pytest.raises(InvalidInput, match=field):
        calibration.update(replace(entry, measurement=Measurement(**{"requests": 5, field: bad})))
    assert calibration.rows() == before


def test_absurd_but_valid_measurements_leave_finite_predictions() -> None:
    calibration = Calibration()
    for number in range(40):
        entry = lease(calibration, context(), number)
        wild = 1e-9 if number % 2 else 1e12
        measured = Measurement(requests=10**9, service_ms=wild, p95_ms=wild, cpu_ms_per_request=wild)
        calibration.update(replace(entry, measurement=measured))
    known = predict(calibration, context())
    assert np.isfinite(known.p95_ms).all()
    assert np.isfinite(known.log_sd).all()


@pytest.mark.parametrize(
    "rows",
    [
        {"nowhere": {"revision": 1}},
        {"class": {"revision": 1}},
        {"fleet:1": {"revision": 1}},
        {"fleet": {"revision": -1}},
        {"fleet": {"revision": 1, "effects": "x"}},
        {"fleet": {"revision": 1, "effects": {}}},
        {"class:pi4": {"revision": 1, "effects": Level(0).as_row()}},
        {"fleet": {"revision": 1, "surprise": "x"}},
        {"device:pi-7": {"revision": 1, "class": 4}},
        {"fleet": {"revision": 1, "standing": [-5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]}},
        {"fleet": {"revision": 1, "standing": [0.0, 0.0, 0.0, -9.0, 0.0, 0.0, 0.0]}},
        {"fleet": {"revision": 1, "standing": [0.0, 0.0, 0.0, 0.0, 0.0, -9.0, 0.0]}},
        {"fleet": 3},
        {7: {"revision": 1}},
    ],
)
def test_damaged_rows_are_refused(rows: Mapping[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        Calibration.from_rows(rows)


@pytest.mark.parametrize("rows", [None, [], "fleet", 3])
def test_what_are_no_rows_is_refused(rows: Any) -> None:
    with pytest.raises(InvalidInput, match="rows"):
        Calibration.from_rows(rows)


def test_the_most_that_rows_may_hold_still_predicts_and_learns() -> None:
    calibration = Calibration()
    for number in range(100):
        calibration.update(lease(calibration, context(), number))
    rows = calibration.rows()
    for depth, row in enumerate(rows[scope] for scope in scopes_of(context())):
        most = Level.from_row("most", depth, row["effects"])
        most.mean[:], most.covariance[:], most.loadings[:] = LARGEST_EFFECT, LARGEST_EFFECT, LARGEST_LOADING
        row["effects"] = most.as_row()
    calibration = Calibration.from_rows(rows)
    entry = replace(lease(Calibration(), context(), 1), measurement=Measurement(requests=9, p50_ms=1.0, p95_ms=2.0))
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(predict(calibration, context()).p95_ms).all()
        calibration.update(entry)
    learnt = calibration.rows()
    assert Calibration.from_rows(learnt).rows() == learnt


def test_rows_of_an_older_version_know_nothing_until_the_log_is_replayed() -> None:
    old = {"fleet": {"revision": 7, "service": {"overall:own": [0.4, 0.1]}, "standing": [1.0, 0.8, 0.8, 0, 0, 1, 0]}}
    calibration = Calibration.from_rows(old)
    assert predict(calibration, context()).p95_ms.tolist() == predict(Calibration(), context()).p95_ms.tolist()
    assert calibration.revisions(context())["fleet"] == 7
    learn(calibration, context(), 5, slow=2.0)
    assert error(calibration, context(), 2.0) < 0.3


def test_learning_leads_to_no_effect_that_rows_may_not_hold() -> None:
    calibration = Calibration()
    entries = [lease(calibration, context(), number) for number in range(40)]
    for number, entry in enumerate(entries * 5):
        far = 1e12 if entry.chosen % 2 == (number > 100) else LEAST_MEASURED_MS
        extreme = replace(entry.measurement, service_ms=far, p95_ms=far, cpu_ms_per_request=far, requests=10**9)
        calibration.update(replace(entry, measurement=extreme))
    assert Calibration.from_rows(calibration.rows()).rows() == calibration.rows()


@pytest.mark.parametrize("quantity", ["service_ms", "p50_ms", "p95_ms", "cpu_ms_per_request"])
@pytest.mark.parametrize("value", [5e-324, 1e-300, 9e-7])
def test_a_time_too_short_to_be_one_was_not_measured(quantity: str, value: float) -> None:
    calibration = Calibration()
    ranking = ranked(context=context(arrival_rate_rps=1.0))
    sent: dict[str, Any] = {quantity: value}
    measurement = replace(Measurement(requests=500), **sent)
    absurd = closed(ranking, context(arrival_rate_rps=1.0), measurement, 0.5, "decision-1")
    assert calibration.update(absurd) == set()
    assert calibration.rows() == {}
