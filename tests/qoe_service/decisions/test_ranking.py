"""Rows in, a complete decision record out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_django import Settings

from qoe_service.decisions import features, policies, ranking
from qoe_service.decisions.models import CalibrationRow, Decision, PolicyVersion
from qoe_service.decisions.record import interaction_of
from qoe_service.errors import Unavailable
from qoe_service.observability import take_rankings
from selector.baselines import RandomPolicy
from selector.feasibility import EXPLORATION_BUDGET
from selector.interactions import Candidate, Context
from selector.records import candidates_from_record, context_from_record
from tests.builders import NOW, make_application, make_device
from tests.qoe_service.decisions.scenes import Scene, make_scene

pytestmark = pytest.mark.django_db


@pytest.fixture
def scene(settings: Settings) -> Scene:
    settings.FIRST_POLICY_AFTER = 4
    return make_scene()


def test_before_the_first_policy_decisions_are_uniform_over_what_is_feasible(scene: Scene) -> None:
    decision = scene.decide()
    candidates = candidates_from_record(decision.candidates)
    assert len(candidates) == 6
    assert [candidate.probability for candidate in candidates] == [pytest.approx(1 / 6)] * 6
    assert (decision.kind, decision.policy_number) == ("uniform", 0)


def overdrawn(scene: Scene) -> Decision:
    """The next decision of a device that earned next to nothing where its baseline would have earned 0.9 each time."""
    scene.application.baseline_digest = scene.variants[0].artifact_id
    scene.application.baseline_configuration = scene.application.configurations[0]
    scene.application.save()
    standing = [50.0, 5.0, 45.0, 10.0, 0.0, 40.0, -0.8]
    CalibrationRow.objects.create(
        application=scene.application,
        scope="device:d-device-0",
        revision=1,
        state={"revision": 1, "standing": standing},
    )
    return scene.decide()


def test_a_device_that_lost_too_much_is_brought_back_to_its_baseline(scene: Scene) -> None:
    decision = overdrawn(scene)
    candidates = candidates_from_record(decision.candidates)
    baseline = next(each for each in candidates if each.action.key == context_from_record(decision.context).baseline)
    held_back = [each for each in candidates if EXPLORATION_BUDGET in each.soft_masks]
    assert len(held_back) == len(candidates) - 1
    assert baseline not in held_back
    assert all(0 < each.probability < 0.1 * baseline.probability for each in held_back)


def test_an_operator_may_set_no_budget(scene: Scene) -> None:
    scene.application.exploration_budget = 1
    scene.application.save()
    candidates = candidates_from_record(overdrawn(scene).candidates)
    assert not any(each.soft_masks for each in candidates)


def test_a_decision_records_all_that_it_was_made_from(scene: Scene) -> None:
    scene.pass_leases(3)
    scene.learn()
    take_rankings()
    decision = Decision.objects.get(pk=scene.decide(cached_digests={scene.variants[0].artifact_id}).pk)
    candidates = candidates_from_record(decision.candidates)
    context = context_from_record(decision.context)
    chosen = candidates[decision.chosen]
    assert sum(each.probability for each in candidates) == pytest.approx(1)
    assert chosen.probability == decision.propensity > 0
    assert (chosen.action.key, chosen.action.variant.digest) == (decision.action_key, decision.variant_digest)
    assert all(each.prediction.source == "server" and each.prediction.p95_ms > 0 for each in candidates)
    assert (context.device, context.arrival_rate_rps) == ("d-device-0", 5.0)
    assert context.incumbent == scene.incumbents["d-device-0"].action_key
    assert context.cached_digests == {scene.variants[0].artifact_id}
    assert context.features["isa"] == "avx2"
    assert decision.policy_number == 1
    assert decision.calibration_revisions["device:d-device-0"] > 0
    assert (decision.trace_id, decision.reason, decision.state) == ("a" * 32, "lease_over", "pending")
    assert int(decision.seed) >= 0
    assert len(take_rankings()) == 1


def test_telemetry_and_labels_that_matter_reach_the_context(scene: Scene) -> None:
    device = make_device(
        "tablet",
        labels={"preference": "fast", "serial": "x-123"},
        telemetry={"temperature_c": 60.0, "battery_share": 0.5, "charging": False, "network": "metered"},
        hardware={"cores": 4, "cpu_quota_cores": 1.5, "cpu_quota_period_ms": 20.0},
    )
    context = context_from_record(scene.decide(device).context)
    assert context.cores == 2
    assert context.features == {
        "network": "metered",
        "throttled": 0.0,
        "cpu_quota": 1.5,
        "cpu_quota_period": 0.02,
        "temperature": 0.6,
        "battery": 0.5,
        "charging": 0.0,
        "label_preference": "fast",
    }


def test_without_reported_traffic_the_application_s_assumption_counts(scene: Scene) -> None:
    assert scene.decide(arrival_rate_rps=None).context["arrival_rate_rps"] == scene.application.arrival_rate_rps


def test_a_reported_standstill_is_no_missing_report(scene: Scene) -> None:
    assert scene.decide(arrival_rate_rps=0.0).context["arrival_rate_rps"] == 0.0


@pytest.mark.parametrize("fields", [{"epsilon": 0, "holdout": 0}, {"formula": {"weight_latency": "much"}}])
def test_an_application_that_the_selector_refuses_keeps_its_last_decision(fields: dict[str, Any]) -> None:
    scene = make_scene(**fields)
    with pytest.raises(Unavailable, match="keeps its last decision"):
        scene.decide()


def test_unmeasured_and_retired_variants_are_no_candidates(scene: Scene) -> None:
    retired, unmeasured, left = scene.variants
    type(retired).objects.filter(pk=retired.pk).update(retired_at=NOW)
    type(retired).objects.filter(pk=unmeasured.pk).update(accuracy=None)
    assert {each["digest"] for each in scene.decide().candidates["variants"]} == {left.artifact_id}


def test_a_banned_variant_is_masked_with_its_reason_until_the_ban_ends(scene: Scene) -> None:
    banned = scene.variants[0]
    policies.ban(
        application=scene.application,
        device=scene.devices[0],
        variant_digest=banned.artifact_id,
        reason="rolled back",
        now=scene.now,
        ttl_s=60,
    )
    here = candidates_from_record(scene.decide().candidates)
    masks = {each.action.variant.digest: each.hard_masks for each in here if each.hard_masks}
    assert masks == {banned.artifact_id: ("banned:rolled back",)}
    assert all(each.probability == 0 for each in here if each.hard_masks)
    assert all(each.is_feasible for each in candidates_from_record(scene.decide(scene.devices[1]).candidates))
    scene.now += timedelta(seconds=60)
    assert all(each.is_feasible for each in candidates_from_record(scene.decide().candidates))


def test_a_lifted_ban_masks_no_more(scene: Scene) -> None:
    ban = policies.ban(
        application=scene.application, device=None, variant_digest="f" * 64, reason="operator", now=scene.now
    )
    assert policies.bans_of(application=scene.application, device=scene.devices[0], now=scene.now)
    policies.lift_ban(ban_id=ban.pk, now=scene.now)
    policies.lift_ban(ban_id=ban.pk, now=scene.now)
    assert not policies.bans_of(application=scene.application, device=scene.devices[0], now=scene.now)


def test_when_nothing_is_feasible_the_last_decision_stays_and_the_error_says_why(scene: Scene) -> None:
    for variant in scene.variants:
        policies.ban(
            application=scene.application, device=None, variant_digest=variant.artifact_id, reason="bad", now=NOW
        )
    with pytest.raises(Unavailable, match=r"keeps its last decision.*banned:bad"):
        scene.decide()
    assert not Decision.objects.exists()


def test_an_application_without_variants_has_no_decision() -> None:
    bare = Scene(make_application(), [], [make_device()])
    with pytest.raises(Unavailable):
        bare.decide()


def test_a_new_policy_version_is_used_by_the_very_next_decision(scene: Scene) -> None:
    scene.pass_leases(2)
    numbers = [scene.decide().policy_number]
    for _ in range(2):
        scene.learn()
        numbers.append(scene.decide().policy_number)
        scene.pass_leases(1)
    assert numbers == [0, 1, 2]


def test_a_corrupt_policy_is_passed_over_for_the_last_good_one_and_that_is_visible(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        scene.pass_leases(2)
        scene.learn()
    newest = PolicyVersion.objects.get(number=2)
    PolicyVersion.objects.filter(pk=newest.pk).update(state=bytes(newest.state or b"")[:-40], sha256="0" * 64)
    assert scene.decide().policy_number == 1
    assert any("digits v2" in problem for problem in policies.problems())
    assert "policy refused" in caplog.text


def name_baseline(scene: Scene) -> str:
    """Makes the slowest variant the baseline, which no prediction would choose, without a budget; its action's key."""
    scene.application.baseline_digest = scene.variants[2].artifact_id
    scene.application.baseline_configuration = scene.application.configurations[0]
    scene.application.exploration_budget = 1.0
    scene.application.save()
    return features.baseline_of(scene.application) or ""


def assert_baseline_decides(decision: Decision, baseline: str) -> None:
    """Mostly the baseline; epsilon and holdout stay uniform over all six actions, so that propensities are exact."""
    shares = {each.action.key: each.probability for each in candidates_from_record(decision.candidates)}
    left = decision.application.epsilon + decision.application.holdout
    assert shares[baseline] == pytest.approx(1 - left + left / 6, abs=2e-3)
    assert min(shares.values()) == pytest.approx(left / 6, abs=2e-3)
    assert decision.propensity == shares[decision.action_key]
    assert decision.policy_number == 0


@pytest.mark.parametrize("lost", [{"state": None}, {"state": b"edge-qoe vw 1\nrubbish", "sha256": "1" * 64}])
def test_without_any_good_policy_the_baseline_decides_and_that_is_visible(scene: Scene, lost: dict[str, Any]) -> None:
    baseline = name_baseline(scene)
    scene.pass_leases(2)
    scene.learn()
    PolicyVersion.objects.update(**lost)
    policies.forget()
    assert_baseline_decides(scene.decide(), baseline)
    assert policies.problems()


def test_probe_vectors_catch_bytes_that_load_but_predict_something_else(scene: Scene) -> None:
    scene.pass_leases(2)
    version = scene.learn()
    assert version is not None
    assert policies.problems() == []
    other = [[0.25] * 4, [0.25] * 4]
    PolicyVersion.objects.filter(pk=version.pk).update(probes=other)
    policies.forget()
    assert policies.champion(scene.application).number == 0


class BrokenPolicy(RandomPolicy):
    """Loads well and then gives no distribution."""

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        return np.full(len(candidates), np.nan)


def test_a_policy_that_gives_no_distribution_is_replaced_by_the_baseline(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = policies.Champion(7, BrokenPolicy(), None)
    monkeypatch.setattr(policies, "champion", lambda application: broken)
    baseline = name_baseline(scene)
    assert_baseline_decides(scene.decide(), baseline)
    assert any("digits v7" in problem for problem in policies.problems())
    policies.forget()


def test_activation_happens_once_and_supersedes_what_never_ran(scene: Scene) -> None:
    first = scene.decide()
    scene.now += timedelta(seconds=1)
    second = scene.decide()
    stranger = scene.devices[1]
    assert not ranking.activate(decision_id=second.pk, device=stranger, now=scene.now)
    assert ranking.activate(decision_id=second.pk, device=second.device, now=scene.now)
    assert not ranking.activate(decision_id=second.pk, device=second.device, now=scene.now + timedelta(seconds=5))
    first.refresh_from_db()
    second.refresh_from_db()
    assert (first.state, second.state, second.active_at) == ("never_active", "active", scene.now)


def test_what_was_logged_is_what_is_learnt(scene: Scene) -> None:
    scene.pass_leases(1)
    event = scene.application.joined_events.select_related("decision").earliest("number")
    interaction = interaction_of(event)
    assert interaction.propensity == event.decision.propensity
    assert interaction.reward == event.reward


def test_the_console_hears_how_far_away_the_first_policy_is(scene: Scene) -> None:
    nothing = policies.first_policy_expected(application=scene.application, now=scene.now)
    assert (nothing and nothing.missing_events, nothing and nothing.seconds) == (4, None)
    for device in scene.devices:
        scene.decide(device)
    running = policies.first_policy_expected(application=scene.application, now=scene.now)
    assert running is not None
    # Two rounds of an 8 s lease, 1 s of waiting and a 2 s rescan.
    assert (running.missing_events, running.seconds) == (4, 22.0)
    scene.pass_leases(2)
    scene.learn()
    assert policies.first_policy_expected(application=scene.application, now=scene.now) is None
