"""Simulated worlds with a hidden truth: their constants are in `constants.py`, how they are played in
`selector.simulation`.

A world draws what nobody is told: how far devices, classes and variants are from their profiles, what an OS update
changes, and what users like. Sojourn times come from played requests (`sojourns.py`), not from `queueing.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selector.interactions import Action, Context, Measurement, Profile
from selector.reward import QoeFormula
from selector.worlds.fleets import DAYPARTS, GROUPS, Application, DeviceClass, Turbulence, make_fleet
from selector.worlds.hidden import Hidden, Likes, Offsets, Tastes
from selector.worlds.sojourns import Stay
from selector.worlds.timings import Timing

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]

LEASE_SECONDS, FEWEST_REQUESTS, MOST_REQUESTS = 60.0, 20, 3000
OUTLIER_Z, OUTLIER_FACTOR = 1.96, 1.8  # 5 % of the measured times
RATINGS = 6
# What the operator's acceptance test multiplies the usual traffic by.
BASELINE_HEADROOM = 2.0
LOWEST_RATING, HIGHEST_RATING = 0.04, 0.96


@dataclass(frozen=True, slots=True)
class Plan:
    """All constants of one world but its times."""

    classes: tuple[DeviceClass, ...]
    applications: tuple[Application, ...]
    turbulence: Turbulence
    hidden: Hidden
    tastes: Tastes
    profiled_by_class: float = 1.0
    profiled_by_device: bool = False


@dataclass(frozen=True, slots=True)
class _Truth:
    """One step, shape (devices, actions)."""

    stay: Stay
    hit_share: Floats
    cpu_ms: Floats
    rating: Floats
    failed: Mask
    qoe: Floats


class SimulatedWorld:
    """A world made from constants and a seed; deterministic."""

    def __init__(
        self, name: str, plan: Plan, timing: Timing, *, seed: int, devices: int = 50, steps: int = 100
    ) -> None:
        self._name, self._plan, self._timing, self._steps = name, plan, timing, steps
        rng = np.random.default_rng([seed, 77_003])
        self._fleet = make_fleet(
            classes=plan.classes,
            applications=plan.applications,
            turbulence=plan.turbulence,
            devices=devices,
            steps=steps,
            rng=rng,
        )
        self._formulas: tuple[QoeFormula, ...] = tuple(
            plan.applications[index].formula for index in self._fleet.application
        )
        self._declared = np.array([_weights(plan.applications[i].formula) for i in self._fleet.application])
        self._offsets = Offsets(plan.hidden, self._fleet, timing, len(plan.classes), rng)
        self._likes = Likes(
            plan.tastes,
            declared=self._declared,
            fleet=self._fleet,
            timing=timing,
            classes=len(plan.classes),
            rng=rng,
        )
        self._columns = _Columns.of(timing)
        self._profiles = known_profiles(plan, timing, self._fleet.device_class, self._offsets.log_time(False), rng)
        self._bans = _phases(timing, steps)
        self._kept: tuple[int, _Truth] | None = None
        self._baselines = self._choose_baselines()

    @property
    def name(self) -> str:
        """Which kind of world."""
        return self._name

    @property
    def actions(self) -> tuple[Action, ...]:
        """All actions that exist at any time."""
        return self._timing.actions

    @property
    def device_count(self) -> int:
        """Number of devices."""
        return len(self._fleet.device_class)

    @property
    def steps(self) -> int:
        """Decisions per device."""
        return self._steps

    @property
    def drift_step(self) -> int:
        """The first step after the OS update."""
        return self._fleet.drift_step

    @property
    def updated(self) -> Mask:
        """Which devices the OS update changes, shape (devices,)."""
        return self._fleet.updated

    @property
    def plan(self) -> Plan:
        """The constants it was made of, which only frontiers are told."""
        return self._plan

    def device_class(self, device: int) -> str:
        """The class that the device belongs to."""
        return self._plan.classes[int(self._fleet.device_class[device])].name

    def formula(self, device: int) -> QoeFormula:
        """What the operator declared for the device's application."""
        return self._formulas[device]

    def profiles(self, device: int) -> tuple[Profile, ...]:
        """What was measured beforehand."""
        return self._profiles[device]

    def bans(self, step: int) -> Mapping[str, str]:
        """Variants not there now, with reasons."""
        return self._bans[step]

    def context(self, device: int, step: int) -> Context:
        """What the device reports."""
        fleet = self._fleet
        kind = self._plan.classes[fleet.device_class[device]]
        application = self._plan.applications[fleet.application[device]]
        return Context(
            device=f"device-{device}",
            device_class=kind.name,
            application=application.name,
            arrival_rate_rps=float(fleet.reported_rate_rps[step, device]),
            slo_p95_ms=application.formula.slo_p95_ms,
            minimum_accuracy=application.minimum_accuracy,
            cores=kind.cores,
            memory_free_bytes=int(fleet.free_memory[device]),
            cpu_load_share=float(fleet.reported_load[step, device]),
            baseline=self._baselines[device],
            features={
                "temperature": float(fleet.temperature_c[step, device]) / 100.0,
                "battery": float(fleet.battery[step, device]),
                "network": "metered" if fleet.is_metered[step, device] else "unmetered",
                "daypart": DAYPARTS[fleet.daypart[step, device]],
                "group": GROUPS[fleet.group[device]],
            },
        )

    def expected_qoe(self, step: int) -> Floats:
        """True expected reward before any charge for switching, shape (devices, actions)."""
        return self._truth(step).qoe

    def slo_missed(self, step: int) -> Mask:
        """Whether the true p95 is above the SLO, or the action fails."""
        truth = self._truth(step)
        limit = np.array([each.slo_p95_ms for each in self._formulas])[:, None]
        return np.asarray((truth.stay.p95_ms > limit) | truth.failed)

    def out_of_memory(self, step: int) -> Mask:
        """Whether the action fails for want of memory."""
        return self._truth(step).failed

    def alone_ms(self, step: int) -> Floats:
        """True time of one request alone as things are, shape (devices, actions); only frontiers are told."""
        return self._one_ms(self._lot(step))

    def slowdown(self, step: int) -> Floats:
        """How many times longer that is because of heat, other processes and further callers, shape (devices,
        actions); only frontiers are told."""
        lot, timing = self._lot(step), self._timing
        usual = timing.one_ms[lot.device_class] * np.exp(lot.log_time[:, timing.pair_variant])
        usual = usual[:, timing.pair] * np.exp(lot.log_configuration[:, timing.configuration])
        return np.asarray(self._one_ms(lot) / usual)

    def measure(self, device: int, step: int, action: int, noise: Floats) -> Measurement:
        """One lease's feedback."""
        truth = self._truth(step)
        requests = int(np.clip(self._fleet.rate_rps[step, device] * LEASE_SECONDS, FEWEST_REQUESTS, MOST_REQUESTS))
        if truth.failed[device, action]:
            return Measurement(requests=requests, errors=requests, failed=True)
        cell = device, action
        times = np.array(
            [truth.stay.p50_ms[cell], truth.stay.p95_ms[cell], truth.stay.service_ms[cell], truth.cpu_ms[cell]]
        )
        outlier = np.where(np.abs(noise[4:8]) > OUTLIER_Z, OUTLIER_FACTOR, 1.0)
        p50, p95, service, cpu = times * np.exp(self._plan.hidden.latency_noise_sd * noise[:4]) * outlier
        share = truth.hit_share[cell]
        share += 0.15 * np.sqrt(share * (1.0 - share)) * noise[8]
        rating = truth.rating[cell] + self._plan.tastes.noise_sd * noise[9]
        return Measurement(
            requests=requests,
            p50_ms=float(p50),
            p95_ms=float(max(p95, p50)),
            slo_hit_share=float(np.clip(share, 0.0, 1.0)),
            cpu_ms_per_request=float(cpu),
            service_ms=float(service),
            batch_mean=float(max(truth.stay.batch[cell] * np.exp(0.03 * noise[10]), 1.0)),
            accuracy=self._measured_accuracy(action, float(noise[11])),
            rating=float(np.clip(rating, 0.0, 1.0)),
            ratings=RATINGS,
        )

    def _measured_accuracy(self, action: int, noise: float) -> float | None:
        """Accuracy on the lease's labelled sample, if there is one."""
        sd = self._plan.hidden.accuracy_noise_sd
        return float(np.clip(self._columns.accuracy[action] + sd * noise, 0.0, 1.0)) if sd > 0 else None

    def _truth(self, step: int) -> _Truth:
        if self._kept is None or self._kept[0] != step:
            self._kept = step, self._work_out(self._lot(step))
        return self._kept[1]

    def _lot(self, step: int) -> _Lot:
        fleet, offsets, likes = self._fleet, self._offsets, self._likes
        return _Lot(
            device_class=fleet.device_class,
            application=fleet.application,
            log_time=offsets.log_time(step >= fleet.drift_step),
            log_configuration=offsets.log_configuration,
            log_cpu=offsets.log_cpu,
            rate_rps=fleet.rate_rps[step],
            load=fleet.load[step],
            heat=fleet.heat[step],
            free_memory=fleet.free_memory,
            user_weights=likes.weights,
            points=likes.points,
            daypart=likes.daypart[step],
        )

    def _work_out(self, lot: _Lot) -> _Truth:
        timing, columns, kind = self._timing, self._columns, lot.device_class
        one_ms = self._one_ms(lot)
        stay = timing.curves.at(timing.kind[kind][:, timing.pair], timing.configuration, one_ms, lot.rate_rps[:, None])
        formulas = [self._plan.applications[index].formula for index in lot.application]
        declared = np.array([_weights(each) for each in formulas])
        hit = stay.share_within(np.array([each.slo_p95_ms for each in formulas])[:, None])
        cpu_ms = stay.service_ms / stay.batch * columns.threads * timing.cpu_share[kind][:, timing.pair]
        cpu_ms = cpu_ms * np.exp(lot.log_cpu)[:, None]
        failed = columns.memory_bytes > lot.free_memory[:, None]
        terms = _terms(formulas, hit, columns.accuracy, cpu_ms)
        rating = np.einsum("dt,tda->da", lot.user_weights / lot.user_weights.sum(axis=1)[:, None], terms)
        rating += lot.points[:, timing.variant] + lot.daypart[:, None] * (terms[1] - terms[2])
        rating = np.clip(rating, LOWEST_RATING, HIGHEST_RATING)
        total = np.einsum("dt,tda->da", declared[:, :3], terms) + declared[:, 3:] * rating
        qoe = np.where(failed, 0.0, total / declared.sum(axis=1)[:, None])
        return _Truth(stay, hit, cpu_ms, rating, failed, qoe)

    def _one_ms(self, lot: _Lot) -> Floats:
        """True time of one request alone, slowed down by heat, by other processes and by further callers."""
        timing, kind, load = self._timing, lot.device_class, lot.load[:, None]
        heating, sharing, cores = (
            np.array([getattr(each, field) for each in self._plan.classes], dtype=np.float64)[kind][:, None]
            for field in ("heating", "sharing", "cores")
        )
        warm = 1.0 + heating * np.clip(lot.heat[:, None] - 0.4, 0.0, 1.0) / 0.6
        pair_ms = timing.one_ms[kind] * np.exp(lot.log_time[:, timing.pair_variant]) * warm
        one_ms = pair_ms[:, timing.pair] * np.exp(lot.log_configuration[:, timing.configuration])
        busy = np.minimum(np.maximum(lot.rate_rps[:, None] * one_ms / 1000.0, 1.0), self._columns.callers)
        crowd = np.clip(busy * self._columns.threads / cores + load - 1.0, 0.0, None)
        return np.asarray(one_ms * (1.0 + sharing * (0.5 * load + crowd**0.8)))

    def _choose_baselines(self) -> tuple[str, ...]:
        """For each device the action that is best on a reference device of its class, nominal and without tastes: what
        an operator's acceptance test finds."""
        classes, applications = len(self._plan.classes), len(self._plan.applications)
        kind, application = (each.ravel() for each in np.indices((classes, applications)))
        count, variants = len(kind), len(self._timing.members)
        traffic = np.array([each.traffic for each in self._plan.classes])[kind]
        usual = np.array([each.rate_rps for each in self._plan.applications])[application]
        declared = np.array([_weights(self._plan.applications[index].formula) for index in application])
        lot = _Lot(
            device_class=kind,
            application=application,
            log_time=self._offsets.by_class[kind],
            log_configuration=np.zeros((count, int(self._timing.configuration.max()) + 1)),
            log_cpu=np.zeros(count),
            rate_rps=usual * traffic * BASELINE_HEADROOM,
            load=np.full(count, 0.3),
            heat=np.full(count, 0.5),
            free_memory=np.array([each.memory_bytes for each in self._plan.classes])[kind] * 0.45,
            user_weights=declared[:, :3],
            points=np.zeros((count, variants)),
            daypart=np.zeros(count),
        )
        qoe = self._work_out(lot).qoe[:, always_there(self._timing)]
        keys = [self._timing.actions[index].key for index in np.flatnonzero(always_there(self._timing))]
        best = np.argmax(qoe, axis=1).reshape(classes, applications)
        chosen = best[self._fleet.device_class, self._fleet.application]
        return tuple(keys[index] for index in chosen.tolist())


@dataclass(frozen=True, slots=True)
class _Lot:
    """Devices and what holds for them at one step; first axis devices."""

    device_class: Indices
    application: Indices
    log_time: Floats
    log_configuration: Floats
    log_cpu: Floats
    rate_rps: Floats
    load: Floats
    heat: Floats
    free_memory: Floats
    user_weights: Floats
    points: Floats
    daypart: Floats


@dataclass(frozen=True, slots=True)
class _Columns:
    """What the truth needs of each action, shape (actions,)."""

    threads: Floats
    callers: Floats
    accuracy: Floats
    memory_bytes: Floats

    @classmethod
    def of(cls, timing: Timing) -> _Columns:
        bounds = [action.configuration for action in timing.actions]
        batch = np.array([each.max_batch for each in bounds], dtype=np.float64)
        memory = np.array([timing.members[index].memory_bytes for index in timing.variant], dtype=np.float64)
        return cls(
            threads=np.array([each.threads for each in bounds], dtype=np.float64),
            callers=np.array([each.max_concurrency for each in bounds], dtype=np.float64),
            accuracy=np.array([timing.members[index].accuracy for index in timing.variant]),
            memory_bytes=memory * (0.95 + 0.002 * batch),
        )


def always_there(timing: Timing) -> Mask:
    """Which actions exist from the first step to the last."""
    there = [each.available_from <= 0 and each.available_until >= 1 for each in timing.members]
    return np.array(there, dtype=np.bool_)[timing.variant]


def known_profiles(
    plan: Plan, timing: Timing, device_class: Indices, log_time: Floats, rng: np.random.Generator
) -> tuple[tuple[Profile, ...], ...]:
    """Per device: laboratory measurements on its class for some variants, on the server for all, its own if planned."""
    sd = plan.hidden.profile_sd
    pairs = len(timing.pair_variant)
    server = _profiles(timing, int(np.argmin([each.slowness for each in plan.classes])), np.zeros(pairs), "server")
    by_class = []
    for index in range(len(plan.classes)):
        order = rng.permutation(len(timing.members))
        there = {int(each) for each in order[: round(plan.profiled_by_class * len(order))]}
        noise = sd * rng.standard_normal(pairs)
        by_class.append(server + _profiles(timing, index, noise, "class", there))
    if not plan.profiled_by_device:
        return tuple(by_class[index] for index in device_class.tolist())
    own = log_time[:, timing.pair_variant] + sd * rng.standard_normal((len(device_class), pairs))
    return tuple(
        by_class[index] + _profiles(timing, index, own[device], "device")
        for device, index in enumerate(device_class.tolist())
    )


def _profiles(
    timing: Timing, index: int, log_error: Floats, source: str, variants: set[int] | None = None
) -> tuple[Profile, ...]:
    factor = np.exp(log_error) * timing.one_ms[index]
    fixed = timing.fixed[index]
    return tuple(
        Profile(
            digest=timing.actions[int(np.argmax(timing.variant == variant))].variant.digest,
            threads=int(timing.pair_threads[pair]),
            a_ms=float(factor[pair] * (1.0 - fixed[pair])),
            b_ms=float(factor[pair] * fixed[pair]),
            memory_bytes=timing.members[variant].memory_bytes,
            source=source,
        )
        for pair, variant in enumerate(timing.pair_variant.tolist())
        if variants is None or variant in variants
    )


def _phases(timing: Timing, steps: int) -> tuple[Mapping[str, str], ...]:
    """Per step the variants that are not there; steps alike share one mapping."""
    digests = {action.variant.name: action.variant.digest for action in timing.actions}
    kept: dict[tuple[tuple[str, str], ...], Mapping[str, str]] = {}
    phases = []
    for step in range(steps):
        away = tuple(
            (digests[each.name], "not released" if step < each.available_from * steps else "withdrawn")
            for each in timing.members
            if not each.available_from * steps <= step < each.available_until * steps
        )
        phases.append(kept.setdefault(away, dict(away)))
    return tuple(phases)


def _weights(formula: QoeFormula) -> tuple[float, float, float, float]:
    return formula.weight_latency, formula.weight_accuracy, formula.weight_energy, formula.weight_rating


def _terms(formulas: list[QoeFormula], hit: Floats, accuracy: Floats, cpu_ms: Floats) -> Floats:
    """Latency, accuracy and energy terms as the formula defines them, shape (3, devices, actions)."""
    floor = np.array([each.accuracy_floor for each in formulas])[:, None]
    reference = np.array([each.energy_reference_cpu_ms for each in formulas])[:, None]
    accurate = np.clip((accuracy - floor) / (1.0 - floor), 0.0, 1.0)
    return np.stack([hit, accurate, reference / (reference + cpu_ms)])
