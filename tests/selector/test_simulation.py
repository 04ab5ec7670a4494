"""Playing a contender: deterministic, fair between contenders, feedback late or lost as announced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from selector.baselines import FixedPolicy, PredictionPolicy
from selector.errors import InvalidInput
from selector.interactions import Candidate, Context, Interaction
from selector.ranking import Exploration
from selector.simulation import EVERYTHING, STRESS, Contender, Feedback, Trace, World, play, switching_charge
from selector.worlds.constants import make_world
from selector.worlds.simulated import SimulatedWorld

NEARLY_NONE = Exploration(epsilon=1e-9, holdout=0.0)
ALL = Exploration(epsilon=1e-9, holdout=0.0, shortlist_size=EVERYTHING)
PROMPT = Feedback(late_share=0.0, missing_share=0.0)


class Diary(PredictionPolicy):
    """Follows the prediction and writes down what happens: ("decided" or "learnt", step)."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[str, str]] = []
        self.decisions = 0

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        self.decisions += 1
        return super().probabilities(context, candidates)

    def learn(self, interaction: Interaction) -> None:
        super().learn(interaction)
        self.entries.append((interaction.decision_id, str(self.decisions)))


def small(devices: int = 4, steps: int = 12) -> SimulatedWorld:
    return make_world("quirks", 7, devices, steps)


def diary_of(feedback: Feedback, world: World | None = None) -> tuple[Diary, Trace]:
    policy = Diary()
    contender = Contender("diary", lambda _: policy, exploration=NEARLY_NONE)
    return policy, play(world or small(), contender, 5, feedback)


def step_of(decision_id: str) -> int:
    return int(decision_id.split("-")[-2])


def test_one_seed_gives_one_trace() -> None:
    contender = Contender("calibrated", lambda _: PredictionPolicy(), calibrates=True)
    one, same = play(small(), contender, 5, STRESS), play(small(), contender, 5, STRESS)
    other = play(small(), contender, 6, STRESS)
    for field in ("qoe", "oracle", "baseline", "chosen", "slo_missed", "out_of_memory", "reward"):
        assert np.array_equal(getattr(one, field), getattr(same, field))
    assert not np.array_equal(one.reward, other.reward)


def test_contenders_that_choose_alike_earn_alike_whatever_they_learn() -> None:
    world = small()
    key = world.actions[-1].key
    traces = [
        play(
            world,
            Contender("fixed", lambda _: FixedPolicy(key), calibrates=each, masks=False, exploration=ALL),
            5,
        )
        for each in (True, False)
    ]
    same = traces[0].chosen == traces[1].chosen
    assert same.mean() > 0.8
    assert np.array_equal(traces[0].reward[same], traces[1].reward[same])


def test_nobody_beats_the_oracle_and_the_first_download_is_charged() -> None:
    world = small(devices=8)
    trace = diary_of(PROMPT, world)[1]
    assert trace.qoe.shape == (12, 8)
    assert (trace.qoe <= trace.oracle + 1e-12).all()
    for device in range(8):
        variant = world.actions[trace.chosen[0, device]].variant
        charge = switching_charge(world.formula(device), variant.size_bytes)
        expected = world.expected_qoe(0)[device, trace.chosen[0, device]]
        assert trace.qoe[0, device] == pytest.approx(expected - charge)
    stayed = np.all(trace.chosen == trace.chosen[0], axis=0)
    assert stayed.any()
    qoe = np.array([world.expected_qoe(step)[range(8), trace.chosen[step]] for step in range(12)])
    assert trace.qoe[1:, stayed] == pytest.approx(qoe[1:, stayed])


def test_delayed_feedback_arrives_in_order_and_not_before_its_time() -> None:
    diary, trace = diary_of(Feedback(delay=3, late_share=0.0, missing_share=0.0))
    steps = [step_of(decision_id) for decision_id, _ in diary.entries]
    assert steps == sorted(steps)
    assert [int(decisions) // 4 for _, decisions in diary.entries] == [step + 4 for step in steps]
    assert trace.learnt == len(diary.entries) == (12 - 4) * 4


def test_late_feedback_comes_later_than_the_rest_but_comes_once() -> None:
    diary, _ = diary_of(Feedback(late_share=0.5, latest=3, missing_share=0.0), small(steps=40))
    waits = [int(decisions) // 4 - step_of(decision_id) for decision_id, decisions in diary.entries]
    assert set(waits) == {1, 2, 3, 4}
    assert len({decision_id for decision_id, _ in diary.entries}) == len(diary.entries)


def test_missing_feedback_is_never_learnt() -> None:
    assert diary_of(Feedback(missing_share=1.0))[0].entries == []
    diary, trace = diary_of(Feedback(late_share=0.0, missing_share=0.3), small(steps=60))
    # 236 decisions, each learnt with probability 0.7: five standard deviations are 0.15.
    assert trace.learnt == len(diary.entries)
    assert abs(trace.learnt / 236 - 0.7) < 0.15


def test_noise_on_what_is_learnt_leaves_what_is_earned() -> None:
    quiet, noisy = (diary_of(Feedback(reward_noise=noise))[1] for noise in (0.0, 0.3))
    assert np.array_equal(quiet.qoe, noisy.qoe)


def test_feedback_that_makes_no_sense_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="missing_share"):
        Feedback(missing_share=1.5)


def test_where_nothing_may_run_what_runs_stays_and_nothing_is_learnt() -> None:
    class Withdrawn(SimulatedWorld):
        def bans(self, step: int) -> Mapping[str, str]:
            return {each.variant.digest: "withdrawn" for each in self.actions} if step == 2 else super().bans(step)

    world = small(steps=4)
    world.__class__ = Withdrawn
    diary, trace = diary_of(PROMPT, world)
    assert np.array_equal(trace.chosen[2], trace.chosen[1])
    assert {step_of(decision_id) for decision_id, _ in diary.entries} == {0, 1}
    assert trace.learnt == 2 * 4
