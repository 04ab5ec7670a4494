"""The verdict: right about worlds whose answer is known, and silent without evidence."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from selector.errors import InvalidInput
from selector.interactions import Candidate, Interaction, Measurement
from selector.policy import sample, seed_of
from selector.verdict import Verdict, best_fixed_action, verdict
from tests.selector.builders import action, candidate, context

MEANS = (0.8, 0.6, 0.4)


def log(
    devices: int = 20, leases: int = 40, shares: tuple[float, ...] = (0.8, 0.1, 0.1), means: tuple[float, ...] = MEANS
) -> list[Interaction]:
    """Every device takes action k with probability shares[k] and earns means[k]; the logged predictions
    are wrong."""
    rng = np.random.default_rng(11)
    some = tuple(candidate(number, 0.5, share) for number, share in enumerate(shares))
    entries = []
    for device in range(devices):
        for lease in range(leases):
            name = f"d-{device}-{lease}"
            chosen = sample(shares, seed_of(name))
            reward = float(np.clip(means[chosen] + rng.normal(0, 0.05), 0, 1))
            measured = Measurement(requests=10, p95_ms=100.0 if chosen == 2 else 10.0)
            entries.append(Interaction(name, context(device=f"device-{device}"), some, chosen, measured, reward))
    return entries


def test_lift_over_uniform_is_what_the_world_says() -> None:
    found = verdict(log())
    assert found.uniform is not None
    assert found.lift_over_uniform is not None
    assert found.qoe is not None
    assert found.uniform.mean == pytest.approx(0.6, abs=0.05)
    assert found.lift_over_uniform.low <= (0.8 * 0.8 + 0.1 + 0.0) - 0.6 + 0.05
    assert found.lift_over_uniform.low > 0
    assert found.lift_over_uniform.mean == pytest.approx(found.qoe.mean - found.uniform.mean)
    assert (found.decisions, found.devices, found.reason) == (800, 20, "")


def test_a_policy_that_explores_loses_to_the_best_fixed_action_in_a_world_without_contexts() -> None:
    found = verdict(log(shares=(0.6, 0.2, 0.2)))
    assert found.best_fixed_action == action(0).key
    assert found.best_fixed is not None
    assert found.lift_over_best_fixed is not None
    assert found.best_fixed.mean == pytest.approx(0.8, abs=0.03)
    assert found.lift_over_best_fixed.high < 0


def test_uniform_logging_has_no_lift_over_uniform() -> None:
    found = verdict(log(shares=(1 / 3, 1 / 3, 1 / 3)))
    assert found.lift_over_uniform is not None
    assert found.lift_over_uniform.low <= 0.0 <= found.lift_over_uniform.high


def test_the_best_fixed_action_is_not_flattered_by_being_chosen_on_its_own_data() -> None:
    """Forty actions that are all the same: the best of a noisy lot must not look better than the others."""
    count = 40
    rng = np.random.default_rng(1)
    some = tuple(candidate(number, 0.5, 1 / count) for number in range(count))
    entries = []
    for index in range(4000):
        name = f"d-{index}"
        reward = float(rng.random() < 0.5)
        chosen = sample([1 / count] * count, seed_of(name))
        situation = context(device=f"device-{index % 40}")
        entries.append(Interaction(name, situation, some, chosen, Measurement(requests=1), reward))
    found = verdict(entries)
    assert found.best_fixed is not None
    assert found.best_fixed.low <= 0.5 <= found.best_fixed.high


def test_the_order_of_devices_does_not_matter() -> None:
    entries = log(devices=6)
    backwards = sorted(entries, key=lambda each: each.context.device, reverse=True)
    one, other = verdict(entries), verdict(backwards)
    assert one.best_fixed_action == other.best_fixed_action
    assert one.best_fixed is not None
    assert other.best_fixed is not None
    assert one.best_fixed.mean == pytest.approx(other.best_fixed.mean)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([], "no closed decisions"),
        (log(devices=1), "needs at least 2 devices"),
        (log(devices=2, leases=5), "effective sample"),
        (log(shares=(1.0 - 2e-9, 1e-9, 1e-9)), "effective sample"),
    ],
)
def test_without_evidence_nothing_is_claimed(entries: list[Interaction], reason: str) -> None:
    found: Verdict = verdict(entries)
    assert reason in found.reason
    assert found.lift_over_uniform is None


@pytest.mark.parametrize(
    ("spoilt", "field"),
    [
        ((candidate(0, 0.5, 0.8), candidate(1, 0.5, math.nan)), "probability"),
        ((candidate(0, 0.5, 0.8), candidate(1, 0.5, -0.1)), "probability"),
        ((candidate(0, 0.5, 0.8), candidate(1, 0.5, math.inf)), "probability"),
        ((candidate(0, 0.5, 0.8), candidate(1, 0.5, 0.9)), "probabilities"),
        ((candidate(0, 0.5, 0.8), candidate(1, math.nan, 0.2)), "qoe"),
        ((candidate(0, 0.5, 0.5), candidate(1, 0.5, 0.2), candidate(1, 0.5, 0.2)), "twice"),
        ((candidate(0, 0.5, 0.8, hard_masks=("memory",)), candidate(1, 0.5, 0.2)), "hard_masks"),
    ],
)
def test_a_decision_that_cannot_have_been_logged_is_refused(spoilt: tuple[Candidate, ...], field: str) -> None:
    entries = log(devices=4)
    bad = next(index for index, each in enumerate(entries) if each.chosen == 0)
    entries[bad] = replace(entries[bad], candidates=spoilt)
    with pytest.raises(InvalidInput, match=field):
        verdict(entries)


def test_only_actions_that_nearly_all_decisions_allow_can_be_the_best_fixed() -> None:
    entries = [
        Interaction(
            each.decision_id,
            each.context,
            (candidate(0, 0.5, 0.0, hard_masks=("memory",)), *each.candidates[1:])
            if index % 4 == 0
            else each.candidates,
            each.chosen if index % 4 or each.chosen else 1,
            each.measurement,
            each.reward,
        )
        for index, each in enumerate(log())
    ]
    assert best_fixed_action(entries) == action(1).key


def test_slo_misses_are_counted_over_measured_leases() -> None:
    entries = log()
    missed = sum(each.chosen == 2 for each in entries) / len(entries)
    assert verdict(entries).slo_violation_share == pytest.approx(missed)
