"""What a measured grid and measured runs say about the demo's promises."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from demo.grid import Cell
from demo.judgement import Grid, cpu_finding, fewest_covering, fixed_gap, judge, largest_ratio, table
from demo.proof import NEVER_S, Run, summarise
from demo.proof import judge as judge_runs

START = datetime(2026, 1, 1, tzinfo=UTC)


def cell(qoe: float, p95_ms: float = 10.0) -> Cell:
    return Cell(requests=50, failed=0, p50_ms=p95_ms / 2, p95_ms=p95_ms, cpu_ms=1.0, rating=qoe, qoe=qoe)


def grid(**devices: tuple[float, float, float]) -> Grid:
    """QoE of three actions per device; the first device is ten times as fast as the others."""
    return {
        device: dict(
            zip(("small", "medium", "large"), (cell(qoe, 100.0 if row else 10.0) for qoe in values), strict=True)
        )
        for row, (device, values) in enumerate(devices.items())
    }


VARIED = grid(fast=(0.5, 0.7, 0.9), middle=(0.5, 0.8, 0.5), slow=(0.7, 0.5, 0.1))
ALIKE = grid(fast=(0.5, 0.7, 0.9), middle=(0.5, 0.7, 0.9), slow=(0.5, 0.7, 0.9))


def test_devices_that_differ_keep_the_promises() -> None:
    assert all(finding.is_kept for finding in judge(VARIED))
    assert largest_ratio(VARIED)[1] == pytest.approx(10)
    fixed, gap = fixed_gap(VARIED)
    assert fixed == "medium"
    assert gap == pytest.approx((0.9 + 0.8 + 0.7) / 3 - 2.0 / 3)


def test_devices_that_are_alike_break_them() -> None:
    kept = {finding.name: finding.is_kept for finding in judge(ALIKE)}
    assert not kept["best_actions"]
    assert not kept["fixed_gap"]


def test_near_ties_do_not_count_as_different_best_actions() -> None:
    nearly = grid(fast=(0.89, 0.90, 0.89), middle=(0.90, 0.89, 0.89), slow=(0.89, 0.89, 0.90))
    assert len(fewest_covering(nearly)) == 1
    assert len(fewest_covering(VARIED)) == 3


@pytest.mark.parametrize(("share", "is_kept"), [(0.59, True), (0.61, False)])
def test_the_baseline_must_leave_cpu_to_spare(share: float, is_kept: bool) -> None:
    assert cpu_finding(share).is_kept is is_kept


def test_the_table_stars_the_best_action_of_each_device() -> None:
    rows = {line.split()[0]: line for line in table(VARIED).splitlines()[1:]}
    assert [rows[name].count("*") for name in ("small", "medium", "large")] == [1, 1, 1]


GOOD = Run(6.0, 60.0, 110, 0.7, 60, 9000, 0, 0, 0.7, 0.1, 0.05)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (replace(GOOD, console_up_s=91), "console_up_in_90_s"),
        (replace(GOOD, first_learnt_push_s=NEVER_S), "first_learnt_push_in_180_s"),
        (replace(GOOD, closed_decisions=99), "100_closed_decisions_in_180_s"),
        (replace(GOOD, push_median_s=2.5), "push_median_in_2_s"),
        (replace(GOOD, failed=1), "no_failed_request"),
        (replace(GOOD, lift_low=-0.01), "lift_clear_of_zero_in_9_of_10"),
    ],
)
def test_each_broken_promise_is_named(broken: Run, promise: str) -> None:
    assert all(judge_runs([GOOD]).values())
    assert [name for name, is_kept in judge_runs([broken]).items() if not is_kept] == [promise]


def test_one_unclear_run_of_ten_is_allowed_and_two_are_not() -> None:
    unclear = replace(GOOD, lift_low=-0.01)
    assert judge_runs([GOOD] * 9 + [unclear])["lift_clear_of_zero_in_9_of_10"]
    assert not judge_runs([GOOD] * 8 + [unclear] * 2)["lift_clear_of_zero_in_9_of_10"]


def decision(pk: str, policy: int, decided_s: float, active_s: float | None, kind: str = "exploit") -> dict[str, Any]:
    active_at = None if active_s is None else (START + timedelta(seconds=active_s)).isoformat()
    decided_at = (START + timedelta(seconds=decided_s)).isoformat()
    return {"pk": pk, "policy_number": policy, "kind": kind, "decided_at": decided_at, "active_at": active_at}


def summary(decisions: list[dict[str, Any]], outcomes: dict[str, str], lift: dict[str, float] | None) -> Run:
    rows: dict[str, list[dict[str, Any]]] = {
        "decisions.decision": decisions,
        "decisions.joinedevent": [{}] * 3,
        "rollouts.attemptoutcome": [{"decision_id": pk, "outcome": name} for pk, name in outcomes.items()],
    }
    verdict = {"qoe": {"mean": 0.6}, "lift_over_uniform": lift}
    return summarise(5.0, START, verdict, {"requests": 10, "failed": 0, "refused": 0}, rows)


def test_only_exchanged_models_count_as_pushes_and_only_learnt_choices_as_learnt() -> None:
    decisions = [
        decision("before", 0, 1, 2),
        decision("explored", 1, 20, 21, kind="uniform"),
        decision("learnt", 2, 30, 32),
        decision("same-model", 2, 25, 25.1),
        decision("never-active", 2, 22, None),
    ]
    outcomes = dict.fromkeys(("before", "explored", "learnt", "never-active", "unknown"), "committed")
    measured = summary(decisions, outcomes | {"same-model": "already_running"}, {"mean": 0.1, "low": 0.05})
    assert (measured.pushes, measured.push_median_s) == (3, 1.0)
    assert measured.first_learnt_push_s == 32
    assert measured.closed_decisions == 3
    assert measured.is_clear


def test_a_verdict_without_enough_evidence_is_not_clear() -> None:
    measured = summary([], {}, None)
    assert not measured.is_clear
    assert math.isnan(measured.lift)
    assert measured.first_learnt_push_s == NEVER_S
