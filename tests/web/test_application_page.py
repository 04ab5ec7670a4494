"""The Application page: is the bandit worth it, what runs where, variants, jobs, and what QoE means."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from qoe_service.catalogue.models import Job
from qoe_service.decisions.models import Decision
from selector.reward import QoeFormula
from tests import builders
from tests.web.demo_rows import seed_fleet
from tests.web.reading import fragment, text_of

pytestmark = pytest.mark.django_db
PATH = "/applications/digits/"


def test_a_new_application_says_what_to_do_next(operator: Client) -> None:
    builders.make_application()
    page = text_of(operator.get(PATH))
    for shown in (
        "No device runs this application yet",
        "manage.py import_model digits MODEL.onnx",
        "No job yet",
        "manage.py create_application FILE.json",
        "No closed lease yet",
        "Exploring uniformly first policy expected after 12 more leases; no lease is running yet",
    ):
        assert shown in page, shown


def test_without_evidence_the_verdict_says_so_instead_of_a_number(operator: Client) -> None:
    builders.make_application()
    line = text_of(fragment(operator, f"{PATH}verdict/"))
    assert "– mean QoE now" in line
    assert line.count("Not enough evidence no closed decisions") == 2
    assert "Decisions 0" in line


def test_the_verdict_line_shows_lifts_with_intervals_their_kind_and_the_effective_sample(operator: Client) -> None:
    seed_fleet(now=timezone.now(), leases=24)
    line = text_of(fragment(operator, f"{PATH}verdict/"))
    number = r"[+\u2212]0\.\d\d"
    assert Decision.objects.filter(state="joined", application="digits").count() == 144
    assert "Decisions 144" in line
    assert "against the best fixed action" in line
    lift = rf"against uniform choice {number} {number} to {number} .{{4,40}} · effective sample \d+"
    assert re.search(lift, line), line
    assert "Intervals 95 %, for one look" in line


def test_the_chart_has_the_curve_and_the_references_as_level_lines(operator: Client) -> None:
    seed_fleet(now=timezone.now(), leases=24)
    figure = json.loads(operator.get(f"{PATH}qoe.json").content)
    names = [trace["name"] for trace in figure["data"]]
    assert names[:2] == ["Each stretch of time", "This system, running mean"]
    assert "Uniform choice" in names
    uniform = figure["data"][names.index("Uniform choice")]
    assert len(set(uniform["y"])) == 1
    assert sum(figure["data"][0]["customdata"]) == 144
    words = text_of(fragment(operator, f"{PATH}qoe/"))
    assert "The running mean of QoE went from 0." in words
    assert "over 144 leases" in words
    assert "uniform choice would have earned 0." in words


def test_an_empty_chart_has_no_traces(operator: Client) -> None:
    builders.make_application()
    assert json.loads(operator.get(f"{PATH}qoe.json").content)["data"] == []


def test_only_the_page_with_a_chart_loads_plotly_and_allows_its_styles(operator: Client) -> None:
    builders.make_application()
    chart, fleet = operator.get(PATH), operator.get("/")
    assert b"plotly/plotly.min.js" in chart.content
    assert b"plotly" not in fleet.content
    assert "style-src 'self' 'unsafe-inline'" in chart.headers["Content-Security-Policy"]
    assert "unsafe" not in fleet.headers["Content-Security-Policy"]


def test_what_runs_where_is_counted_by_what_devices_say(operator: Client) -> None:
    application = builders.make_application()
    small, large = builders.make_variant(application), builders.make_variant(application, "digits-large")
    for name, variant in (("a", small), ("b", small), ("c", small), ("d", large)):
        device = builders.make_device(name)
        builders.make_assignment(device, application, builders.make_decision(device, application, variant))
    builders.make_assignment(builders.make_device("silent"), application)
    page = text_of(operator.get(PATH))
    assert "digits-small batch 1 · 1 at once · 1 thread 75 % a, b, c" in page
    assert "digits-large batch 1 · 1 at once · 1 thread 25 % d" in page
    assert "1 device has not reported a running variant yet" in page


def test_variants_show_size_accuracy_with_interval_and_where_it_was_measured(operator: Client) -> None:
    application = builders.make_application()
    base = builders.make_variant(application, "digits-wide", size_bytes=2_140_000)
    derived = builders.make_variant(
        application,
        "digits-wide-int8",
        base=base,
        compression_pass="static_int8",
        accuracy=0.937,
        accuracy_low=0.926,
        accuracy_high=0.947,
        accuracy_samples=3594,
        accuracy_isa="avx2",
    )
    builders.make_variant(application, "digits-new", accuracy=None, accuracy_samples=0)
    builders.make_profile(derived, a_ms=3.5, b_ms=0.4)
    page = text_of(operator.get(PATH))
    assert "digits-wide " in page
    assert "2.14 MB" in page
    assert "static int8 from digits-wide 100 kB 93.7 % 92.6 % to 94.7 % 3 594 held-out samples avx2 3.90 ms" in page
    assert "being measured" in page


def test_jobs_show_progress_and_failures_their_reason(operator: Client) -> None:
    application = builders.make_application()
    base = builders.make_variant(application, "digits-wide")
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("running", {"progress": 0.4}),
        ("failed", {"error": "operator Einsum <i>"}),
        ("queued", {}),
    ]
    for number, (state, fields) in enumerate(jobs):
        Job.objects.create(
            application=application,
            base=base,
            compression_pass=f"pass_{number}",
            state=state,
            created_at=timezone.now(),
            **fields,
        )
    page = text_of(operator.get(PATH))
    assert "pass 0 of digits-wide 40 %" in page
    assert "pass 1 of digits-wide failed operator Einsum <i>" in page
    assert "pass 2 of digits-wide queued" in page


def test_the_formula_is_told_in_words(operator: Client) -> None:
    formula = QoeFormula(
        weight_latency=2, weight_accuracy=1, weight_energy=1, weight_rating=0, slo_p95_ms=50, failure_reward=0.1
    )
    builders.make_application(formula=formula.as_record(), epsilon=0.07, silence_reward=None)
    page = text_of(operator.get(PATH))
    assert "Latency 50 % share of requests answered without error within 50 ms" in page
    assert "Energy 25 %" in page
    assert "Rating" not in page
    assert "A lease that fails counts 0.1" in page
    assert "Explores uniformly 7 % of decisions" in page
    assert "A silent lease is not learnt from" in page


@pytest.mark.parametrize("where", ["key", "device"])
def test_simulated_users_are_called_so_wherever_a_label_says_it(operator: Client, where: str) -> None:
    application = builders.make_application()
    assert "simulated" not in text_of(operator.get(PATH))
    if where == "key":
        builders.make_application_key(label="simulated users")
    else:
        builders.make_assignment(builders.make_device(labels={"users": "simulated"}), application)
    assert "ratings by simulated users" in text_of(operator.get(PATH))


def test_queries_do_not_grow_with_variants_and_devices(operator: Client) -> None:
    application = builders.make_application()
    builders.make_policy_version(application)
    counts = []
    for number in range(3):
        variant = builders.make_variant(application, f"v-{number}")
        device = builders.make_device(f"n-{number}")
        builders.make_profile(variant, device)
        builders.make_assignment(device, application, builders.make_decision(device, application, variant))
        with CaptureQueriesContext(connection) as queries:
            fragment(operator, PATH)
        counts.append(len(queries))
    assert len(set(counts)) == 1
    assert counts[0] <= 16
