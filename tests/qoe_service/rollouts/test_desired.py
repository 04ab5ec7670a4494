from __future__ import annotations

import base64
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from django.conf import LazySettings
from pytest_django import DjangoAssertNumQueries

from device_agents.wire import DesiredState, SignedDesired
from qoe_service.catalogue.models import Variant
from qoe_service.fleet import keys
from qoe_service.rollouts import changes, desired
from tests.builders import NOW, make_application, make_assignment, make_decision
from tests.qoe_service import calls
from tests.qoe_service.rollouts.conftest import Site

if TYPE_CHECKING:
    from tests.qoe_service.calls import Answer

pytestmark = pytest.mark.django_db


def ask(site: Site, **headers: str) -> Answer:
    return calls.get(f"/api/v1/devices/{site.device.pk}/desired", **headers)


def document(answer: Answer) -> DesiredState:
    return DesiredState.model_validate_json(SignedDesired.model_validate_json(answer.content).document)


def test_the_document_says_what_to_run_and_is_signed_by_a_trusted_key(site: Site) -> None:
    decision = make_decision(site.device, site.application, site.small, state="pending", trace_id="b" * 32)
    make_assignment(site.device, site.application, decision)
    changes.announce(device_id=site.device.pk, now=NOW)
    answer = ask(site)
    envelope = SignedDesired.model_validate_json(answer.content)
    [key] = keys.trusted_keys(now=NOW)
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(key.public_key))
    public.verify(base64.b64decode(envelope.signatures[0].value), envelope.document.encode())
    state = document(answer)
    [application] = state.applications
    assert (state.device_id, state.version, answer["ETag"]) == (site.device.pk, 1, '"1"')
    assert (application.decision_id, application.trace_id) == (decision.pk, "b" * 32)
    assert application.variant.digest == site.small.artifact_id
    assert application.variant.url == f"/artifacts/sha256/{site.small.artifact_id}"
    assert application.variant.size_bytes == site.small.artifact.size_bytes
    assert application.serving.max_batch == decision.configuration["max_batch"]
    assert (application.lease_s, application.slo_p95_ms) == (8.0, 50.0)


def test_an_unchanged_document_is_not_sent_again(site: Site) -> None:
    first = ask(site)
    assert first.status_code == 200
    for tags in (first["ETag"], f'W/"x", {first["ETag"]}'):
        again = ask(site, If_None_Match=tags)
        assert (again.status_code, again.content, again["ETag"]) == (304, b"", first["ETag"])
    changes.announce(device_id=site.device.pk, now=NOW)
    assert ask(site, If_None_Match=first["ETag"]).status_code == 200


def test_versions_only_grow(site: Site) -> None:
    seen = [changes.announce(device_id=site.device.pk, now=NOW) for _ in range(5)]
    assert seen == [1, 2, 3, 4, 5]
    assert document(ask(site)).version == 5


def test_a_document_ends(site: Site, settings: LazySettings) -> None:
    settings.DESIRED_TTL_S = 60
    state = document(ask(site))
    assert state.expires_at - state.issued_at == timedelta(seconds=60)


@pytest.mark.parametrize(
    ("last_good", "baseline", "expected"),
    [
        ("large", "small", "large"),
        ("", "large", "large"),
        ("small", "large", "large"),
        ("", "small", None),
        ("", "", None),
        ("gone", "large", "large"),
    ],
)
def test_the_fallback_is_the_last_good_variant_or_the_baseline_but_never_the_one_tried(
    site: Site, last_good: str, baseline: str, expected: str | None
) -> None:
    digests = {"small": site.small.artifact_id, "large": site.large.artifact_id, "gone": "0" * 64, "": ""}
    site.application.baseline_digest = digests[baseline]
    site.application.save()
    decision = make_decision(site.device, site.application, site.small, state="pending")
    make_assignment(site.device, site.application, decision, last_good_digest=digests[last_good])
    [application] = desired.document(device=site.device, version=1, now=NOW).applications
    found = application.fallback.digest if application.fallback else None
    assert found == (digests[expected] if expected else None)


def test_a_fleet_that_looks_at_once_costs_no_look_at_variants_and_keys_each_time(
    site: Site, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    make_assignment(site.device, site.application, make_decision(site.device, site.application, site.small))
    first, later = NOW, NOW + timedelta(seconds=1)
    keys.create_signing_key(actor="anna", now=NOW)
    for now, queries in ((first, 4), (first, 2), (later, 4)):  # always: what is assigned, what is to be profiled
        with django_assert_num_queries(queries):
            found = desired.signed(device=site.device, version=1, now=now)
        [application] = DesiredState.model_validate_json(found.document).applications
        assert application.variant.digest == site.small.artifact_id


def test_what_is_remembered_of_a_variant_is_of_its_application(site: Site) -> None:
    other = make_application("parity")
    artifact = site.small.artifact
    for application in (site.application, other):
        if application is other:
            Variant.objects.create(application=other, artifact=artifact, name="same-file", created_at=NOW)
        make_assignment(site.device, application, make_decision(site.device, application, site.small))
        named = {each.application: each.variant.name for each in document(ask(site)).applications}
    assert named == {site.application.name: site.small.name, "parity": "same-file"}


def test_the_health_gate_is_the_applications(site: Site) -> None:
    site.application.health_gate = {"min_requests": 3, "soak_s": 0.5}
    site.application.save()
    make_assignment(site.device, site.application, make_decision(site.device, site.application, site.small))
    [application] = desired.document(device=site.device, version=1, now=NOW).applications
    assert (application.health_gate.min_requests, application.health_gate.soak_s) == (3, 0.5)
