"""Which variants are worth having: the front, what is dominated and why, and that nothing is lent between places."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qoe_service.catalogue import pareto
from qoe_service.catalogue.models import Application, Artifact
from qoe_service.catalogue.pareto import Point
from qoe_service.catalogue.places import SERVER, Place
from tests.builders import NOW, make_application, make_device, make_isa_accuracy, make_profile, make_variant

BASE = Point("base", "0" * 64, accuracy=0.834, accuracy_high=0.851, latency_ms=0.06, size_bytes=50_000, root="base")


def point(name: str, **changed: Any) -> Point:
    return replace(BASE, name=name, digest=name, **changed)


def test_a_compressed_variant_slower_than_its_base_is_dominated_even_where_it_is_smaller() -> None:
    # the demo's digits-small and its static int8, as docs/demo-models.md measured them
    quantised = point("base-static-int8", accuracy=0.836, latency_ms=0.10, size_bytes=20_000)
    first, second = pareto.front([BASE, quantised])
    assert (first.is_on_front, second.dominated_by) == (True, "base")
    assert second.reason == "no more accurate than base beyond chance and 1.7 times slower"
    assert pareto.recommended([BASE, quantised]) == [BASE]


def test_a_slower_variant_that_is_more_accurate_beyond_chance_stays() -> None:
    better = point("better", accuracy=0.9, latency_ms=0.10)
    assert pareto.recommended([BASE, better]) == [BASE, better]


def test_an_imported_student_is_not_held_against_the_larger_model() -> None:
    large = point("large", accuracy=0.95, latency_ms=9.0, size_bytes=4_000_000, root="large")
    assert pareto.recommended([BASE, large]) == [BASE, large]


def test_what_is_beaten_in_everything_says_by_what() -> None:
    fast = point("fast", latency_ms=0.02, size_bytes=10_000)
    standings = {each.point.name: each for each in pareto.front([BASE, fast])}
    assert standings["base"].reason == "no more accurate and 3.0 times slower and 5.0 times larger than fast"
    assert standings["fast"].is_on_front


def test_times_that_differ_by_chance_alone_decide_nothing() -> None:
    twin = point("twin", latency_ms=BASE.latency_ms * 1.02)
    assert all(each.is_on_front for each in pareto.front([BASE, twin]))


@pytest.mark.parametrize(("cpu_ms", "stays"), [(0.02, True), (0.06, False), (None, False)])
def test_energy_counts_where_both_have_it(cpu_ms: float | None, stays: bool) -> None:
    first, slower = replace(BASE, cpu_ms=0.05), point("slower", latency_ms=0.07, root="slower", cpu_ms=cpu_ms)
    assert pareto.front([first, slower])[1].is_on_front is stays


def test_what_takes_more_energy_and_is_no_better_otherwise_is_dominated_and_says_so() -> None:
    costly = point("costly", cpu_ms=0.10)
    standings = pareto.front([replace(BASE, cpu_ms=0.05), costly])
    assert [each.is_on_front for each in standings] == [True, False]
    assert standings[1].reason == "no more accurate and 2.0 times costlier in CPU time than base"
    smaller = point("smaller", size_bytes=10_000, cpu_ms=0.02)
    assert pareto.front([smaller, costly])[1].reason == (
        "no more accurate and 5.0 times costlier in CPU time and 5.0 times larger than smaller"
    )


@pytest.mark.django_db
def test_each_class_of_devices_has_its_own_front_of_what_was_measured_there() -> None:
    application = make_application()
    base = make_variant(application, "base")
    quick = make_variant(application, "quick", base=base)
    make_profile(base, None, a_ms=2.0, b_ms=0.5)
    make_profile(quick, None, a_ms=1.0, b_ms=0.5)
    for number, a_ms in enumerate((1.0, 2.0, 9.0)):
        make_profile(base, make_device(f"phone-{number}", device_class="phone"), a_ms=a_ms, b_ms=0.0)
    fronts = pareto.fronts(application)
    phone = Place("phone", "x86_64 avx2")
    assert {place: [each.point.name for each in found] for place, found in fronts.items()} == {
        phone: ["base"],
        SERVER: ["base", "quick"],
    }
    assert fronts[phone][0].point.latency_ms == 2.0
    assert [each.is_on_front for each in fronts[SERVER]] == [False, True]


@pytest.mark.django_db
def test_no_accuracy_is_copied_between_instruction_sets() -> None:
    dataset, _ = Artifact.objects.get_or_create(digest="d" * 64, defaults={"size_bytes": 1, "created_at": NOW})
    variant = make_variant(make_application(samples=dataset), accuracy=0.9, accuracy_isa="x86_64 avx2 vnni")
    old, new = (
        make_device(name, device_class="board", hardware={"isa": isa, "architecture": "x86_64"})
        for name, isa in (("old", ["avx2"]), ("new", ["vnni", "avx2"]))
    )
    for device in (old, new):
        make_profile(variant, device)
    with_vnni, without = Place("board", "x86_64 avx2 vnni"), Place("board", "x86_64 avx2")
    assert set(pareto.fronts(variant.application)) == {with_vnni}, "a class of two kinds of devices is two places"
    make_isa_accuracy(variant, old, value=0.6, low=0.5, high=0.7)
    fronts = pareto.fronts(variant.application)
    assert [fronts[place][0].point.accuracy for place in (with_vnni, without)] == [0.9, 0.6]
    Application.objects.update(samples=None)
    variant.application.refresh_from_db()
    assert without not in pareto.fronts(variant.application), "what was measured on other samples counts no more"
