"""The Decision page: why this one, and what came of it."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from qoe_service.decisions.models import Decision, Feedback
from qoe_service.rollouts.models import AttemptOutcome
from selector.interactions import Action, Candidate, Configuration, Prediction, Variant
from selector.records import candidates_record
from tests import builders
from tests.web.reading import fragment, text_of

pytestmark = pytest.mark.django_db
NAMES = ("digits-wide", "digits-medium", "digits-narrow", "digits-banned")


def candidate(name: str, qoe: float, probability: float, **fields: object) -> Candidate:
    variant = Variant(builders.sha256_of(f"digits/{name}"), name, 100_000, 0.9)
    prediction = Prediction(10.0, 20.0 + 100 * qoe, 0.2, 3.21, 0.04, qoe, 8.0)
    return Candidate(Action(variant, Configuration(4, 2, 1)), prediction, probability=probability, **fields)  # type: ignore[arg-type]  # masks and flags


CANDIDATES = (
    candidate("digits-banned", 0.99, 0.0, hard_masks=("banned:rolled back", "memory")),
    candidate("digits-narrow", 0.60, 0.05, soft_masks=("slo_violation_likely",)),
    candidate("digits-wide", 0.80, 0.55, shortlisted=True),
    candidate("digits-medium", 0.75, 0.40, shortlisted=True),
)


@pytest.fixture
def decision() -> Decision:
    application, device = builders.make_application(), builders.make_device()
    variants = {name: builders.make_variant(application, name) for name in NAMES}
    return builders.make_decision(
        device,
        application,
        variants["digits-medium"],
        id="d" * 32,
        configuration={"max_batch": 4, "max_concurrency": 2, "threads": 1},
        candidates=candidates_record(CANDIDATES),
        chosen=3,
        propensity=0.4,
        policy_number=7,
        kind="exploit",
        reason="lease_over",
        seed="123456789",
        trace_id="ab" * 16,
        context={"arrival_rate_rps": 6.0, "memory_free_bytes": 512_000_000, "incumbent": CANDIDATES[2].action.key},
        decided_at=timezone.now() - timedelta(seconds=20),
        active_at=timezone.now() - timedelta(seconds=18),
    )


def path(decision: Decision) -> str:
    return f"/decisions/{decision.pk}/"


def test_candidates_stand_by_probability_with_predictions_and_the_chosen_one_is_marked(
    operator: Client, decision: Decision
) -> None:
    answer = operator.get(path(decision))
    names = re.findall(r"<b>(digits-[a-z]+)</b>", answer.content.decode())
    assert names == ["digits-wide", "digits-medium", "digits-narrow", "digits-banned"]
    page = text_of(answer)
    row = "digits-medium chosen batch 4 · 2 at once · 1 thread 40.0 % 95.0 ms 3.21 ms 4 % 0.75 shortlisted"
    assert row in page
    assert page.count(" chosen batch ") == 1


def test_masks_are_told_with_their_reasons(operator: Client, decision: Decision) -> None:
    page = text_of(operator.get(path(decision)))
    assert re.search(r"digits-banned .{0,80}0\.0 %.{0,60}0\.99 banned:rolled back memory", page) or re.search(
        r"digits-banned .*0 % .*banned:rolled back memory", page
    )
    assert "slo violation likely exploration only" in page


def test_how_it_was_drawn_is_told_in_words(operator: Client, decision: Decision) -> None:
    page = text_of(operator.get(path(decision)))
    assert "Its predicted QoE of 0.75 is number 2 of 3 feasible actions; the highest is 0.80." in page
    assert "drawn with a probability of 40.0 %" in page
    assert "v7 ranked 2 of 3 feasible actions" in page
    Decision.objects.update(policy_number=0, kind="uniform")
    page = text_of(operator.get(path(decision)))
    assert "Exploration drawn uniformly over all feasible actions" in page
    assert "before the first policy" in page


def test_the_record_names_seed_trace_and_context(operator: Client, decision: Decision) -> None:
    page = text_of(operator.get(path(decision)))
    for shown in (
        *("Seed 123456789", "Trace " + "ab" * 16, "requests arrive 6.0/s", "memory free 512 MB"),
        "running before digits-wide, batch 4 · 2 at once · 1 thread",
    ):
        assert shown in page, shown


def test_what_came_of_it_stands_beside_the_prediction(operator: Client, decision: Decision) -> None:
    assert "The lease has not become a reward yet: running on the device" in text_of(operator.get(path(decision)))
    measured = {"requests": 42, "errors": 1, "p95_ms": 101.0, "slo_hit_share": 0.9, "rating": 0.0, "ratings": 3}
    builders.make_joined_event(decision, reward=0.71, measurement=measured, joined_at=timezone.now())
    builders.make_policy_version(decision.application, 8, trained_through=1, created_at=timezone.now())
    Feedback.objects.create(
        feedback_id="r", decision=decision, source="app", rating=0.0, is_late=True, received_at=timezone.now()
    )
    Decision.objects.update(state=Decision.State.JOINED, closed_at=timezone.now() - timedelta(seconds=9))
    page = text_of(operator.get(path(decision)))
    assert "p95 latency 95.0 ms 101 ms" in page
    assert "SLO violations 4.0 % 10.0 %" in page
    assert "QoE 0.75 0.71" in page
    assert "Users' rating 0.00 mean of 3" in page
    assert "app rated 0.00 late" in page
    life = page[page.index("Its life") :]
    moments = ("Decided", "Active on the device", "Lease closed", "Became a reward", "Learnt")
    places = [life.index(each) for each in moments]
    assert places == sorted(places)
    assert "first in policy version 8" in life


def test_a_rollback_is_part_of_its_life(operator: Client, decision: Decision) -> None:
    AttemptOutcome.objects.create(
        device=decision.device,
        application=decision.application,
        decision_id=decision.pk,
        outcome="rolled_back",
        reason="errors in the soak",
        at=timezone.now(),
    )
    assert re.search(r"Rolled back just now errors in the soak", text_of(operator.get(path(decision))))


def test_neighbouring_decisions_are_a_click_away(operator: Client, decision: Decision) -> None:
    variant = decision.application.variants.get(name="digits-wide")
    before, after = (
        builders.make_decision(
            decision.device, decision.application, variant, decided_at=decision.decided_at + timedelta(seconds=offset)
        )
        for offset in (-9, 9)
    )
    body = operator.get(path(decision)).content.decode()
    assert f'href="/decisions/{before.pk}/" rel="prev"' in body
    assert f'href="/decisions/{after.pk}/" rel="next"' in body


def test_an_unreadable_record_still_shows_the_rest(operator: Client, decision: Decision) -> None:
    Decision.objects.update(candidates=[])
    page = text_of(operator.get(path(decision)))
    assert "Why this one" in page
    assert "The candidates of this decision cannot be read" in page
    assert "Seed 123456789" in page


def test_the_page_takes_few_queries(operator: Client, decision: Decision) -> None:
    fragment(operator, path(decision))
    with CaptureQueriesContext(connection) as queries:
        fragment(operator, path(decision))
    assert len(queries) <= 9
