"""Simulated worlds: deterministic, vectorised, hard, honest about what they measure, and fixed."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.latency_table import load
from selector.errors import InvalidInput
from selector.simulation import NOISE_COLUMNS, available
from selector.worlds.constants import REPORTED_SEEDS, TUNING_SEEDS, WORLDS, make_world
from selector.worlds.fleets import DeviceClass
from selector.worlds.hardness import Hardness, hardness
from selector.worlds.simulated import SimulatedWorld
from selector.worlds.sojourns import LOADS, FormulaTimes, ReplayedTimes, play_requests
from selector.worlds.timings import Member, TableRow, Timing, table_timing

REPORTED = ("queueing", "table", "quirks")
FIXED = {
    "queueing": "82ef50194ead349ec8a4a433387a1bfff216d5afa93851e87686176392e4ae1f",
    "table": "764b727225219cc619d2a3f56c00645c5afe466d7a9105ce3d0b8e9b3d77cc7f",
    "quirks": "c2cdf1e3094140fc35df6776bfaa6db2dceecb6c66fe7f63456bb5bc09b5587c",
}


def world(name: str = "queueing", seed: int = 1000, devices: int = 16, steps: int = 20) -> SimulatedWorld:
    return make_world(name, seed, devices, steps, load()[0] if name.startswith("table") else ())


@pytest.mark.parametrize("name", REPORTED)
def test_the_reported_constants_are_those_that_were_fixed_before_tuning(name: str) -> None:
    assert hashlib.sha256(repr(WORLDS[name]).encode()).hexdigest() == FIXED[name]


@pytest.mark.parametrize("name", REPORTED)
def test_tuning_and_reported_worlds_share_neither_constants_nor_seeds(name: str) -> None:
    reported, tuning = WORLDS[name].plan, WORLDS[f"{name}-tuning"].plan
    assert not {each.name for each in reported.classes} & {each.name for each in tuning.classes}
    assert not set(reported.applications) & set(tuning.applications)
    assert reported.hidden != tuning.hidden
    assert not set(REPORTED_SEEDS) & set(TUNING_SEEDS)


def test_the_same_seed_makes_the_same_world_and_another_seed_another() -> None:
    one, same, other = world(), world(), world(seed=1001)
    assert np.array_equal(one.expected_qoe(15), same.expected_qoe(15))
    assert [one.context(3, 7), one.profiles(3)] == [same.context(3, 7), same.profiles(3)]
    assert not np.allclose(one.expected_qoe(15), other.expected_qoe(15))


@pytest.mark.parametrize("name", REPORTED)
def test_the_truth_of_a_step_is_one_array_over_devices_and_actions(name: str) -> None:
    made = world(name, devices=9)
    assert 180 <= len(made.actions) <= 220
    for step in (0, made.drift_step, made.steps - 1):
        qoe = made.expected_qoe(step)
        assert qoe.shape == made.slo_missed(step).shape == made.out_of_memory(step).shape == (9, len(made.actions))
        assert np.isfinite(qoe).all()
        assert (qoe >= 0).all()
        assert (qoe <= 1).all()
        assert (qoe[made.out_of_memory(step)] == 0).all()


@pytest.mark.parametrize("name", REPORTED)
def test_rewards_have_the_expected_qoe_as_their_mean(name: str) -> None:
    made, rng = world(name), np.random.default_rng(3)
    errors = []
    for _ in range(60):
        device, action = int(rng.integers(16)), int(rng.integers(len(made.actions)))
        accuracy = made.actions[action].variant.accuracy
        rewards = [
            made.formula(device).reward(made.measure(device, 5, action, noise), accuracy)
            for noise in rng.standard_normal((40, NOISE_COLUMNS))
        ]
        errors.append(float(np.mean(rewards)) - made.expected_qoe(5)[device, action])
    # 60 x 40 rewards with a standard deviation of at most 0.04: five standard errors are 0.004.
    assert abs(float(np.mean(errors))) < 0.004


def test_frontiers_are_told_the_time_of_one_request_alone_and_what_slows_it_down() -> None:
    """An action without batches is measured at that time; only the step's conditions and the update change it."""
    made = world(devices=16, steps=20)
    alone_ms, noiseless = made.alone_ms(3), np.zeros(NOISE_COLUMNS)
    single = [index for index, each in enumerate(made.actions) if each.configuration.max_batch == 1]
    fits = [(device, index) for device in range(16) for index in single if not made.out_of_memory(3)[device, index]]
    measured = [made.measure(device, 3, index, noiseless).service_ms for device, index in fits]
    assert measured == pytest.approx([alone_ms[cell] for cell in fits], rel=0.1)
    slowdown = [made.slowdown(step) for step in range(made.steps)]
    assert min(each.min() for each in slowdown) >= 1.0
    usual = [made.alone_ms(step) / slowdown[step] for step in range(made.steps)]
    changed = [~np.isclose(usual[0], each).all(axis=1) for each in usual]
    assert not any(each.any() for each in changed[: made.drift_step])
    assert all(np.array_equal(each, made.updated) for each in changed[made.drift_step :])


def test_variants_come_and_go() -> None:
    made = world(steps=20)
    names = [
        {each.variant.name for each in made.actions if each.variant.digest in made.bans(step)} for step in (0, 10, 19)
    ]
    assert names == [{"medium-int8", "small-fp16"}, set(), {"medium-fp16"}]
    assert available(made, 0).sum() == len(made.actions) * 10 // 12
    assert made.bans(0) is made.bans(7)


def test_the_update_changes_three_devices_in_ten_and_no_other() -> None:
    made = world(devices=40, steps=100)
    calm = replace(WORLDS["queueing"].plan.turbulence, burst_share=0.0)
    assert calm.drift_share == pytest.approx(made.updated.mean())
    before, after = made.drift_step - 1, made.drift_step
    change = np.abs(made.expected_qoe(after) - made.expected_qoe(before)).mean(axis=1)
    assert change[made.updated].mean() > 2 * change[~made.updated].mean()


def bounds_are_met(found: list[Hardness]) -> bool:
    mean = {field: float(np.mean([getattr(each, field) for each in found])) for field in Hardness.__slots__}
    return (
        mean["random_pct"] <= 60
        and mean["best_fixed_pct"] <= 90
        and mean["best_per_class_pct"] <= 96
        and mean["changed_pct"] >= 25
    )


@pytest.mark.parametrize("name", REPORTED)
def test_reported_worlds_are_hard(name: str) -> None:
    assert bounds_are_met([hardness(world(name, seed, devices=48, steps=40)) for seed in list(REPORTED_SEEDS)[:5]])


def rows(factor: float = 1.0) -> tuple[TableRow, ...]:
    return tuple(
        TableRow(
            name, quota, 1, callers, batch, tuple(factor * ms * batch / (quota or 2) * x for x in (1.0, 1.1, 3.0)), 1.0
        )
        for name, ms in (("one", 4.0), ("two", 1.0))
        for quota in (0.0, 0.5)
        for callers in (1, 2)
        for batch in (1, 4)
    )


def timing(table: tuple[TableRow, ...]) -> Timing:
    members = tuple(Member(name, 1.0, 0.9, "fp32", 1000, 1000) for name in ("one", "two"))
    classes = (DeviceClass("fast", 1.0), DeviceClass("slow", 2.0))
    return table_timing(classes, (0.0, 0.5), members, table)


def test_a_table_world_replays_the_table_it_is_given() -> None:
    made, slower = timing(rows()), timing(rows(2.0))
    assert len(made.actions) == 8
    assert made.one_ms[:, 0].tolist() == pytest.approx([4.0 * 1.1 / 2, 4.0 * 1.1 / 0.5 * 2])
    assert slower.one_ms.tolist() == (2 * made.one_ms).tolist()


def test_a_table_without_a_measured_combination_is_refused_by_its_name() -> None:
    with pytest.raises(InvalidInput, match=r"lack two with 1 threads, 2 callers, batch 4 at quota 0\.5"):
        timing(rows()[:-1])
    with pytest.raises(InvalidInput, match="one of queueing"):
        make_world("nowhere", 1)


def test_replayed_times_are_samples_of_the_smallest_measured_batch_that_holds_them() -> None:
    samples = np.arange(12.0).reshape(1, 2, 2, 3)
    source = ReplayedTimes(samples, np.full((1, 2, 2), 3), np.array([1, 4]))
    kind, uniform = np.zeros(4, dtype=np.intp), np.array([0.0, 0.34, 0.99, 0.5])
    times = source.times(kind, np.array([1, 2, 3, 4]), np.array([False, False, False, True]), uniform)
    assert times.tolist() == [0.0, 4.0, 5.0, 10.0]


def test_requests_wait_longer_under_load_and_batches_grow() -> None:
    source = FormulaTimes(fixed=np.array([0.5]), cliff=np.ones(1), cliff_from=np.full(1, 99.0), hiccup_share=0.0)
    curves = play_requests(source, [(1, 1), (8, 1), (8, 2)], seed=1)
    one_ms = np.full((3, 3), 10.0)
    rates = 100.0 * np.array([[LOADS[0]], [0.7], [3.0]])
    stay = curves.at(np.zeros((3, 3), dtype=np.intp), np.arange(3)[None].repeat(3, axis=0), one_ms, rates)
    assert stay.p50_ms[0] == pytest.approx([10.0] * 3, rel=0.05)
    assert (np.diff(stay.p95_ms, axis=0) > 0).all()
    assert stay.batch[2, 0] == 1
    assert stay.batch[2, 1] > 2
    assert stay.p95_ms[2, 0] > 2 * stay.p95_ms[2, 1] > 4 * stay.p95_ms[2, 2]


def test_the_share_within_a_limit_agrees_with_the_quantiles() -> None:
    made = world("quirks")
    stay = made._truth(4).stay  # the arithmetic under every number of the benchmark
    assert stay.share_within(stay.p95_ms) == pytest.approx(np.full(stay.p95_ms.shape, 0.95), abs=1e-6)
    assert (stay.share_within(stay.p95_ms * 0.9) <= 0.95).all()
    assert (stay.share_within(np.asarray(0.0)) == 0).all()
