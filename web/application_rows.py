"""Reads what the Application page shows, but for its verdict and its chart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db.models import Count, Q

from qoe_service.catalogue.models import Application, Job, Variant
from qoe_service.decisions.models import Decision
from qoe_service.fleet.models import ApplicationKey, Device
from qoe_service.rollouts.models import Assignment
from selector.reward import QoeFormula
from web.drawings import Part
from web.placements import assignments, placements
from web.policy_states import PolicyState, policy_state

COLOURS = 8
_JOBS = 20
SIMULATED = "simulated"


@dataclass(frozen=True, slots=True)
class ActionShare:
    """How many devices run one action."""

    variant: str
    configuration: Mapping[str, Any] | None
    devices: Sequence[Device]
    share: float
    colour: int


@dataclass(frozen=True, slots=True)
class VariantRow:
    """One variant, with where it was measured and runs."""

    variant: Variant
    server_a_ms: float | None
    server_b_ms: float | None
    devices_measured: int
    devices_running: int

    @property
    def server_ms(self) -> float | None:
        """One request on the server: the profile at a batch of one."""
        return None if self.server_a_ms is None or self.server_b_ms is None else self.server_a_ms + self.server_b_ms


@dataclass(frozen=True, slots=True)
class FormulaLine:
    """One term of the QoE formula in words."""

    name: str
    weight_share: float
    meaning: str


@dataclass(frozen=True, slots=True)
class ApplicationDetail:
    """The live parts of the page."""

    policy: PolicyState
    shares: Sequence[ActionShare]
    silent_devices: int
    variants: Sequence[VariantRow]
    jobs: Sequence[Job]
    states: Mapping[str, int]
    formula: Sequence[FormulaLine]
    formula_version: int | None
    formula_extra: str
    has_simulated_users: bool

    @property
    def parts(self) -> Sequence[Part]:
        """The shares as a stacked bar."""
        return [Part(each.variant, each.share, each.colour) for each in self.shares]

    @property
    def open_decisions(self) -> int:
        """Decisions that may still become a reward."""
        return sum(self.states[each] for each in ("pending", "active", "closed"))

    @property
    def unlearnt_decisions(self) -> int:
        """Decisions that ended without a reward."""
        return self.states["never_active"] + self.states["dropped"]


def application_detail(*, application: Application, now: datetime) -> ApplicationDetail:
    """The page of one application, in a fixed number of queries."""
    shares, silent = _shares(application)
    version, formula = _formula(application)
    return ApplicationDetail(
        policy=policy_state(application=application, now=now),
        shares=shares,
        silent_devices=silent,
        variants=_variants(application),
        jobs=list(application.jobs.select_related("base", "result").order_by("-id")[:_JOBS]),
        states=_states(application),
        formula=formula_lines(formula),
        formula_version=version,
        formula_extra=_formula_extra(formula),
        has_simulated_users=_has_simulated_users(application),
    )


def _shares(application: Application) -> tuple[list[ActionShare], int]:
    """Devices by the action that they say they run, grouped by variant, and how many say nothing."""
    rows = assignments().filter(application=application, device__revoked_at=None).select_related("device")
    found = placements(list(rows))
    running: dict[tuple[str, str], list[Device]] = {}
    example: dict[tuple[str, str], Any] = {}
    for each in found:
        if each.running is None:
            continue
        key = (each.running.variant, str(sorted((each.running.configuration or {}).items())))
        running.setdefault(key, []).append(each.assignment.device)
        example[key] = each.running.configuration
    total = sum(len(devices) for devices in running.values())
    of_variant: Counter[str] = Counter()
    for (variant, _), devices in running.items():
        of_variant[variant] += len(devices)
    places = {variant: place for place, (variant, _) in enumerate(of_variant.most_common())}
    ordered = sorted(running.items(), key=lambda item: (places[item[0][0]], -len(item[1]), item[0]))
    shares = [
        ActionShare(key[0], example[key], devices, len(devices) / total, places[key[0]] % COLOURS)
        for key, devices in ordered
    ]
    return shares, len(found) - total


def _variants(application: Application) -> list[VariantRow]:
    rows = application.variants.filter(retired_at=None).select_related("artifact", "base").prefetch_related("profiles")
    running = Counter(Assignment.objects.filter(application=application).values_list("reported_digest", flat=True))
    return [_variant_row(row, running[row.artifact_id]) for row in rows.order_by("-artifact__size_bytes")]


def _variant_row(variant: Variant, running: int) -> VariantRow:
    profiles = list(variant.profiles.all())
    server = min((each for each in profiles if each.device_id is None), key=lambda each: each.threads, default=None)
    return VariantRow(
        variant=variant,
        server_a_ms=server.a_ms if server else None,
        server_b_ms=server.b_ms if server else None,
        devices_measured=len({each.device_id for each in profiles if each.device_id}),
        devices_running=running,
    )


def _states(application: Application) -> dict[str, int]:
    counted = Decision.objects.filter(application=application).order_by().values("state").annotate(n=Count("id"))
    found = {row["state"]: row["n"] for row in counted}
    return {state: found.get(state, 0) for state in Decision.State.values}


def _formula(application: Application) -> tuple[int | None, QoeFormula | None]:
    newest = application.formulas.first()
    return (newest.version, QoeFormula.from_record(newest.definition)) if newest else (None, None)


def formula_lines(formula: QoeFormula | None) -> list[FormulaLine]:
    """The weighted terms of the formula as sentences."""
    if formula is None:
        return []
    weights = {name: getattr(formula, f"weight_{name}") for name in ("latency", "accuracy", "energy", "rating")}
    total = sum(weights.values()) or 1
    meanings = {
        "latency": f"share of requests answered without error within {formula.slo_p95_ms:g} ms",
        "accuracy": f"0 at {formula.accuracy_floor * 100:.0f} % or below, 1 at perfect accuracy, linear between",
        "energy": f"1 for no CPU time, one half at {formula.energy_reference_cpu_ms:g} ms of CPU per request",
        "rating": "mean of the users' ratings; leases without a rating go without this term",
    }
    return [FormulaLine(name.capitalize(), weights[name] / total, meanings[name]) for name in weights if weights[name]]


def _formula_extra(formula: QoeFormula | None) -> str:
    if formula is None:
        return ""
    reference = formula.switching_reference_bytes / 1e6
    return (
        f"Switching to a new download costs up to {formula.switching_weight:g}, half of that at {reference:g} MB. "
        f"A lease that fails counts {formula.failure_reward:g}."
    )


def _has_simulated_users(application: Application) -> bool:
    """Whether a label says that the ratings come from simulated users."""
    keys = ApplicationKey.objects.filter(application=application.name, revoked_at=None, label__icontains=SIMULATED)
    devices = Device.objects.filter(Q(labels__users__icontains=SIMULATED), assignments__application=application)
    return keys.exists() or devices.exists()
