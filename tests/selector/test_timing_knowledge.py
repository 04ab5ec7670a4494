"""What the frontier of times plays with: a joint filter, and what is told to whom."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.contenders import ours
from benchmarks.timing_knowledge import Gaussian, InformedCalibration, ToldCalibration
from selector.calibration import Calibration
from selector.simulation import play
from selector.worlds.constants import make_world


def test_a_joint_filter_knows_what_all_noisy_sums_together_tell() -> None:
    """Sums learnt one by one against the posterior of all at once, while effects are still being added."""
    rng, known = np.random.default_rng(3), Gaussian()
    prior_sd, rows = rng.uniform(0.1, 0.6, 90), [rng.choice(90, 4, replace=False) for _ in range(60)]
    came, noise = rng.standard_normal(60), rng.uniform(0.01, 0.1, 60)
    place: dict[int, int] = {}
    for row, value, variance in zip(rows, came, noise, strict=True):
        place |= {each: known.place(each, float(prior_sd[each])) for each in row.tolist()}
        known.learn(np.array([place[each] for each in row.tolist()]), float(value), float(variance))
    design = np.zeros((60, 90))
    for index, row in enumerate(rows):
        design[index, row] = 1.0
    precision = np.diag(prior_sd**-2) + design.T @ (design / noise[:, None])
    covariance = np.linalg.inv(precision)
    mean = covariance @ (design.T @ (came / noise))
    asked = np.array([[place[each] for each in row.tolist()] for row in rows])
    found_mean, found_variance = known.sums(asked)
    assert found_mean == pytest.approx(design @ mean, abs=1e-9)
    assert found_variance == pytest.approx(np.einsum("ij,jk,ik->i", design, covariance, design), abs=1e-9)


def test_a_sum_that_may_have_been_an_outlier_makes_less_sure() -> None:
    sure, unsure = Gaussian(), Gaussian()
    for known, doubt in ((sure, 0.0), (unsure, 0.05)):
        known.learn(np.array([known.place("device", 0.3)]), 0.5, 0.01, doubt=doubt)
    row = np.array([[0]])
    assert sure.sums(row)[0] == unsure.sums(row)[0]
    assert sure.sums(row)[1] < unsure.sums(row)[1] < 0.3**2


def test_who_knows_more_of_times_is_nearer_to_the_oracle() -> None:
    """Over a run with the OS update."""
    regret: dict[str, float] = {}
    for name, make in (("learnt", lambda _: Calibration()), ("sizes", InformedCalibration), ("times", ToldCalibration)):
        world = make_world("queueing-tuning", 101, devices=16, steps=30)
        trace = play(world, ours(), 101, calibration=make(world))
        regret[name] = float((trace.oracle - trace.qoe).sum() / trace.oracle.sum())
    assert regret["times"] < 0.8 * regret["sizes"] < 0.8 * 0.9 * regret["learnt"]
