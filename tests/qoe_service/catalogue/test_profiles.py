from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from device_agents.wire import ProfileReport
from qoe_service.catalogue import artifacts, profiles
from qoe_service.catalogue.models import Profile
from tests.builders import NOW, make_application, make_device, make_profile, make_variant, sha256_of
from tests.qoe_service.catalogue.tiny_models import conv_model, write_model

pytestmark = pytest.mark.django_db


def report(digest: str, **changes: Any) -> ProfileReport:
    return ProfileReport.model_validate({"digest": digest, "threads": 1, "a_ms": 2.0, "b_ms": 0.5, **changes})


def test_reports_are_kept_and_newer_ones_replace_them() -> None:
    device, variant = make_device(), make_variant(make_application())
    digest = variant.artifact_id
    profiles.record_reports(device=device, reports=[report(digest), report(digest, threads=2)], now=NOW)
    profiles.record_reports(device=device, reports=[report(digest, a_ms=3.0, memory_bytes=7)], now=NOW)
    rows = Profile.objects.order_by("threads")
    assert [(row.threads, row.a_ms, row.b_ms, row.memory_bytes) for row in rows] == [(1, 3.0, 0.5, 7), (2, 2.0, 0.5, 0)]


def test_unknown_digests_are_counted_and_harm_nothing() -> None:
    device, variant = make_device(), make_variant(make_application())
    reports = [report(sha256_of("unknown")), report(variant.artifact_id)]
    assert profiles.record_reports(device=device, reports=reports, now=NOW) == (1, 1)
    assert Profile.objects.get().variant == variant


def test_a_run_that_took_no_time_is_counted_and_not_kept() -> None:
    device, variant = make_device(), make_variant(make_application())
    reports = [report(variant.artifact_id, a_ms=0.0, b_ms=0.0), report(variant.artifact_id, threads=2, a_ms=0.0)]
    assert profiles.record_reports(device=device, reports=reports, now=NOW) == (1, 1)
    assert [(row.threads, row.b_ms) for row in Profile.objects.all()] == [(2, 0.5)]


def test_an_unusable_profile_is_lent_to_nobody() -> None:
    variant = make_variant(make_application())
    make_profile(variant, make_device("peer"), a_ms=0.0, b_ms=0.0)
    make_profile(variant, None, a_ms=0.0, b_ms=0.0)
    assert profiles.profiles_for(device=make_device(), application=variant.application) == ()


def test_the_last_of_several_reports_about_the_same_wins() -> None:
    device, variant = make_device(), make_variant(make_application())
    reports = [report(variant.artifact_id, a_ms=value) for value in (1.0, 9.0)]
    profiles.record_reports(device=device, reports=reports, now=NOW)
    assert Profile.objects.get().a_ms == 9.0


def test_a_model_shared_by_two_applications_is_measured_for_both() -> None:
    device, first = make_device(), make_variant(make_application("digits"))
    second = make_variant(make_application("letters"), digest=first.artifact_id)
    profiles.record_reports(device=device, reports=[report(first.artifact_id)], now=NOW)
    assert {row.variant for row in Profile.objects.all()} == {first, second}


def test_no_reports_are_no_work() -> None:
    assert profiles.record_reports(device=make_device(), reports=[], now=NOW) == (0, 0)


def test_a_device_is_lent_what_its_class_and_the_server_measured() -> None:
    application = make_application()
    variant = make_variant(application)
    device = make_device("mine")
    make_profile(variant, None, a_ms=0.3)
    make_profile(variant, device, a_ms=1.0, memory_bytes=5)
    for index, a_ms in enumerate([2.0, 4.0, 90.0]):
        make_profile(variant, make_device(f"peer-{index}"), a_ms=a_ms, b_ms=a_ms / 2)
    make_profile(variant, make_device("stranger", device_class="server"), a_ms=70.0)
    make_profile(make_variant(make_application("letters"), "other"), device, a_ms=50.0)
    found = profiles.profiles_for(device=device, application=application)
    assert [(each.source, each.a_ms, each.b_ms, each.memory_bytes) for each in found] == [
        ("device", 1.0, 0.1, 5),
        ("class", 4.0, 2.0, 0),
        ("server", 0.3, 0.1, 0),
    ]
    assert {each.digest for each in found} == {variant.artifact_id}


def test_the_server_measures_with_the_command_that_devices_run(tmp_path: Path) -> None:
    digest = artifacts.store(write_model(tmp_path / "conv.onnx", conv_model()), now=NOW).digest
    variant = make_variant(make_application(), digest=digest)
    profiles.measure_on_server(variant=variant, now=NOW)
    profile = variant.profiles.get(device=None)
    assert profile.threads == 1
    assert 0 < profile.a_ms + profile.b_ms < 1000
    assert profile.memory_bytes > 0
    variant.refresh_from_db()
    assert variant.memory_bytes == profile.memory_bytes


def test_a_model_whose_speed_cannot_be_measured_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    variant = make_variant(make_application(), digest=artifacts.store(path, now=NOW).digest)
    profiles.measure_on_server(variant=variant, now=NOW)
    assert not variant.profiles.exists()
