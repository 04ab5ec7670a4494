"""Which variants of an application are worth having on a class of devices, by what was measured there and nowhere else.

A dominated variant is marked with the reason, never deleted: another class of devices may measure otherwise.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qoe_service.catalogue import accuracies
from qoe_service.catalogue.accuracies import Accuracies, Accuracy
from qoe_service.catalogue.models import Application, Profile, Variant
from qoe_service.catalogue.places import SERVER, Place

SAME_SPEED = 0.03  # times closer than this are the same: two runs of one model differ as much


@dataclass(frozen=True, slots=True)
class Point:
    """A variant on one class of devices; times are of a single row on one thread. ``root`` is the imported model."""

    name: str
    digest: str
    accuracy: float
    accuracy_high: float
    latency_ms: float
    size_bytes: int
    cpu_ms: float | None = None
    root: str = ""

    @property
    def is_compressed(self) -> bool:
        """Whether it was derived from another variant."""
        return bool(self.root) and self.root != self.name


@dataclass(frozen=True, slots=True)
class Standing:
    """What a measured variant is worth on one class of devices, and why."""

    point: Point
    dominated_by: str = ""
    reason: str = ""

    @property
    def is_on_front(self) -> bool:
        """Whether nothing measured beats it."""
        return not self.dominated_by


def front(points: Sequence[Point]) -> list[Standing]:
    """Each point's standing on accuracy, latency, size and CPU time, in the order given.

    A compressed variant that is slower than the model it came from is dominated by that model even where it is
    smaller, unless it is more accurate than that model's 95 % interval allows for.
    """
    roots = {point.name: point for point in points if not point.is_compressed}
    return [_standing(point, points, roots.get(point.root)) for point in points]


def recommended(points: Sequence[Point]) -> list[Point]:
    """The front. It holds no compressed variant that is slower than its base and no better."""
    return [standing.point for standing in front(points) if standing.is_on_front]


def fronts(application: Application, known: Accuracies | None = None) -> dict[Place, list[Standing]]:
    """Standings per place, the server's among them. A variant whose speed, or whose accuracy on these instruction sets,
    was not measured is not in the list. ``known`` is ``accuracies.of(application)``, where that was read already."""
    rows = Profile.objects.filter(variant__application=application, variant__retired_at=None, threads=1)
    rows = rows.exclude(variant__accuracy=None).select_related("variant__artifact", "device")
    measured: dict[Place, dict[int, list[Profile]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        measured[place_of(row)][row.variant_id].append(row)
    names, known = _root_names(application), accuracies.of(application) if known is None else known
    points = {
        place: [
            _point(found, accuracy, names)
            for found in variants.values()
            if (accuracy := accuracy_at(place, found[0].variant, known)) is not None
        ]
        for place, variants in sorted(measured.items())
    }
    return {place: front(found) for place, found in points.items() if found}


def place_of(row: Profile) -> Place:
    """Where a profile holds."""
    return Place(row.device.device_class, row.isa) if row.device else SERVER


def accuracy_at(place: Place, variant: Variant, known: Accuracies) -> Accuracy | None:
    """What was measured on the place's instruction sets; None where nothing was, whatever other places say."""
    return accuracies.of_variant(variant) if place == SERVER else known.get((variant.pk, place.isa))


def _standing(point: Point, points: Sequence[Point], root: Point | None) -> Standing:
    if root is not None and point.is_compressed and _is_slower(point, root) and point.accuracy <= root.accuracy_high:
        times = point.latency_ms / root.latency_ms
        return Standing(
            point, root.name, f"no more accurate than {root.name} beyond chance and {times:.1f} times slower"
        )
    better = [other for other in points if _dominates(other, point)]
    if not better:
        return Standing(point)
    best = min(better, key=lambda other: (other.latency_ms, -other.accuracy, other.size_bytes, other.name))
    return Standing(point, best.name, f"no more accurate and {_losses(point, best)} than {best.name}")


def _dominates(one: Point, other: Point) -> bool:
    """At least as good in everything and better in something; speeds that differ by chance alone count as the same."""
    if one.accuracy < other.accuracy or _is_slower(one, other) or one.size_bytes > other.size_bytes:
        return False
    if _is_costlier(one, other):
        return False
    is_leaner = one.size_bytes < other.size_bytes or _is_costlier(other, one)
    return one.accuracy > other.accuracy or is_leaner or _is_slower(other, one)


def _is_slower(one: Point, other: Point) -> bool:
    return one.latency_ms > other.latency_ms * (1 + SAME_SPEED)


def _is_costlier(one: Point, other: Point) -> bool:
    """Whether it takes more CPU time, which stands for energy; unknown counts as no."""
    return one.cpu_ms is not None and other.cpu_ms is not None and one.cpu_ms > other.cpu_ms * (1 + SAME_SPEED)


def _losses(point: Point, best: Point) -> str:
    parts = []
    if _is_slower(point, best):
        parts.append(f"{point.latency_ms / best.latency_ms:.1f} times slower")
    elif point.cpu_ms and best.cpu_ms and _is_costlier(point, best):  # one that is slower mostly is both
        parts.append(f"{point.cpu_ms / best.cpu_ms:.1f} times costlier in CPU time")
    if point.size_bytes > best.size_bytes:
        parts.append(f"{point.size_bytes / best.size_bytes:.1f} times larger")
    return " and ".join(parts) or "no faster or smaller"


def _point(rows: Sequence[Profile], accuracy: Accuracy, root_names: dict[int, str]) -> Point:
    variant = rows[0].variant
    cpu = [row.cpu_ms_per_row for row in rows if row.cpu_ms_per_row is not None]
    return Point(
        name=variant.name,
        digest=variant.artifact_id,
        accuracy=accuracy.value,
        accuracy_high=accuracy.high,
        latency_ms=statistics.median(row.a_ms + row.b_ms for row in rows),
        size_bytes=variant.artifact.size_bytes,
        cpu_ms=statistics.median(cpu) if cpu else None,
        root=root_names[variant.pk],
    )


def _root_names(application: Application) -> dict[int, str]:
    variants = {each.pk: each for each in Variant.objects.filter(application=application)}
    found = {}
    for key, variant in variants.items():
        root = variant
        while root.base_id is not None and root.base_id in variants:
            root = variants[root.base_id]
        found[key] = root.name
    return found
