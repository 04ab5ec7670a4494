"""Plays contenders in simulated worlds: what a world tells, what a contender is, and one run step by step.

A world knows the truth and tells a contender only what a real service would know; the worlds themselves are in
`selector.worlds`. Every random number comes from a seed, and two contenders under one seed meet the same noise.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from selector.calibration import Calibration
from selector.errors import NoFeasibleAction
from selector.interactions import Action, Context, Interaction, Measurement, Profile, Ranking
from selector.policy import Policy
from selector.ranking import Exploration, rank
from selector.reward import QoeFormula
from selector.validation import number

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]
Role = Literal["ours", "ablation", "reference", "peer", "hosted"]

# Standard normal numbers that one measurement may use.
NOISE_COLUMNS = 12
# Variants that fit on a device beside each other; the one unused for longest goes first.
MOST_CACHED = 4
EVERYTHING = 1000


class World(Protocol):
    """A fleet with a hidden truth. Devices and actions are named by their positions; steps count from 0.

    A step is one decision of every device.
    """

    @property
    def name(self) -> str:
        """Which kind of world."""
        ...

    @property
    def actions(self) -> tuple[Action, ...]:
        """All actions that exist at any time: one kept tuple."""
        ...

    @property
    def device_count(self) -> int:
        """Number of devices."""
        ...

    @property
    def steps(self) -> int:
        """Decisions per device."""
        ...

    @property
    def drift_step(self) -> int:
        """The first step after the OS update."""
        ...

    def device_class(self, device: int) -> str:
        """The class that the device belongs to."""
        ...

    def formula(self, device: int) -> QoeFormula:
        """What the operator declared for the device's application."""
        ...

    def profiles(self, device: int) -> tuple[Profile, ...]:
        """What was measured beforehand, on other machines: one kept tuple, not the truth."""
        ...

    def bans(self, step: int) -> Mapping[str, str]:
        """Digests of variants that are not there now, with reasons: not released yet, or withdrawn."""
        ...

    def context(self, device: int, step: int) -> Context:
        """What the device reports; the runner adds what runs and what is cached."""
        ...

    def expected_qoe(self, step: int) -> Floats:
        """True expected reward before any charge for switching, shape (devices, actions); 0 where it fails."""
        ...

    def slo_missed(self, step: int) -> Mask:
        """Whether the true p95 is above the SLO, or the action fails, shape (devices, actions)."""
        ...

    def out_of_memory(self, step: int) -> Mask:
        """Whether the action fails for want of memory, shape (devices, actions)."""
        ...

    def measure(self, device: int, step: int, action: int, noise: Floats) -> Measurement:
        """One lease's feedback; ``noise`` holds NOISE_COLUMNS standard normal numbers."""
        ...


@dataclass(frozen=True)
class Contender:
    """One way to choose, as the benchmark plays it.

    ``make_policy`` takes the seed. Without ``calibrates`` predictions stay as the profiles give them; without
    ``masks`` neither memory, accuracy nor the probability of missing the SLO forbids an action; what devices
    themselves refuse (more threads than cores, a download on a metered network or a low battery) is refused to all.
    ``exploration.shortlist_size`` EVERYTHING shows the policy all actions. ``uses_prediction`` says whether
    the policy reads ``candidate.prediction``: it divides the learning peers in the report.
    """

    name: str
    make_policy: Callable[[int], Policy]
    role: Role = "peer"
    calibrates: bool = False
    masks: bool = True
    uses_prediction: bool = False
    exploration: Exploration = field(default_factory=lambda: Exploration(epsilon=0.002, holdout=0.0))


@dataclass(frozen=True, slots=True)
class Feedback:
    """When and how feedback arrives: after ``delay`` more decisions of its device, some later, some never.

    ``late_share`` of the decisions wait up to ``latest`` steps longer; ``reward_noise`` is the standard
    deviation of noise added to the reward that is learnt from, on top of the world's own.
    """

    delay: int = 0
    late_share: float = 0.1
    latest: int = 3
    missing_share: float = 0.02
    reward_noise: float = 0.0

    def __post_init__(self) -> None:
        """Raise InvalidInput naming the field that makes no sense."""
        number("delay", self.delay, 0, 1e6)
        number("late_share", self.late_share, 0, 1)
        number("latest", self.latest, 1, 1e6)
        number("missing_share", self.missing_share, 0, 1)
        number("reward_noise", self.reward_noise, 0, 10)


STRESS = Feedback(delay=20, missing_share=0.3, reward_noise=0.1)


@dataclass(frozen=True, slots=True)
class Trace:
    """What came of one run; arrays of shape (steps, devices) unless said otherwise.

    ``qoe`` is the true expected QoE of the chosen action less the charge for what it downloaded, ``oracle``
    that of the best action there is in this context, free of charge, ``baseline`` that of the operator's
    baseline. ``learnt`` counts the interactions that were learnt; ``seconds`` is the time that ranking took.
    """

    qoe: Floats
    oracle: Floats
    baseline: Floats
    chosen: Indices
    slo_missed: Mask
    out_of_memory: Mask
    reward: Floats
    learnt: int
    seconds: float


def play(
    world: World,
    contender: Contender,
    seed: int,
    feedback: Feedback | None = None,
    calibration: Calibration | None = None,
) -> Trace:
    """Let the contender decide for all devices, step by step, and learn as feedback arrives; into ``calibration`` if
    one is given. Deterministic but for ``seconds``."""
    return _Run(world, contender, seed, feedback or Feedback(), calibration or Calibration()).trace()


@dataclass(slots=True)
class _Device:
    """What the device remembers: what runs, and which variants it still has, the most recent last."""

    incumbent: str | None = None
    cached: OrderedDict[str, None] = field(default_factory=OrderedDict)
    known: frozenset[str] = frozenset()

    def run(self, action: Action) -> int:
        """Switch to this action; bytes that had to be downloaded."""
        digest = action.variant.digest
        missing = digest not in self.cached
        self.incumbent = action.key
        self.cached[digest] = None
        self.cached.move_to_end(digest)
        if missing:
            while len(self.cached) > MOST_CACHED:
                self.cached.popitem(last=False)
            self.known = frozenset(self.cached)
        return action.variant.size_bytes if missing else 0


class _Run:
    def __init__(
        self, world: World, contender: Contender, seed: int, feedback: Feedback, calibration: Calibration
    ) -> None:
        self._world, self._contender, self._seed, self._feedback = world, contender, seed, feedback
        self._rng = np.random.default_rng([seed, 20_611])
        self._policy, self._calibration = contender.make_policy(seed), calibration
        self._devices = [_Device() for _ in range(world.device_count)]
        self._position = {action.key: index for index, action in enumerate(world.actions)}
        self._due: dict[int, list[Interaction]] = {}
        self._exploration = contender.exploration
        if not contender.masks:
            self._exploration = replace(self._exploration, slo_violation_limit=1.0)
        shape = world.steps, world.device_count
        self._qoe, self._oracle, self._baseline, self._reward = (np.zeros(shape) for _ in range(4))
        self._chosen = np.zeros(shape, dtype=np.intp)
        self._slo_missed, self._out_of_memory = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
        self._seconds, self._learnt = 0.0, 0

    def trace(self) -> Trace:
        for step in range(self._world.steps):
            self._learn(self._due.pop(step, []))
            self._step(step)
        return Trace(
            self._qoe,
            self._oracle,
            self._baseline,
            self._chosen,
            self._slo_missed,
            self._out_of_memory,
            self._reward,
            self._learnt,
            self._seconds,
        )

    def _step(self, step: int) -> None:
        world, every = self._world, np.arange(self._world.device_count)
        noise = self._rng.standard_normal((world.device_count, NOISE_COLUMNS))
        fate = self._rng.random((world.device_count, 2))
        reward_noise = self._feedback.reward_noise * self._rng.standard_normal(world.device_count)
        arrivals = self._arrivals(step, fate)
        qoe = world.expected_qoe(step)
        self._oracle[step] = qoe[:, available(world, step)].max(axis=1, initial=0.0)
        for device in range(world.device_count):
            interaction = self._decide(device, step, noise[device], float(reward_noise[device]))
            if interaction is not None and arrivals[device] >= 0:
                self._due.setdefault(int(arrivals[device]), []).append(interaction)
        chosen = self._chosen[step]
        self._qoe[step] += qoe[every, chosen]
        self._slo_missed[step] = world.slo_missed(step)[every, chosen]
        self._out_of_memory[step] = world.out_of_memory(step)[every, chosen]

    def _arrivals(self, step: int, fate: Floats) -> Indices:
        """Step at which each device's feedback will be learnt, shape (devices,); -1 for never."""
        later = np.where(
            fate[:, 0] < self._feedback.late_share,
            1 + np.floor(self._feedback.latest * fate[:, 0] / max(self._feedback.late_share, 1e-12)),
            0,
        )
        arrivals = step + 1 + self._feedback.delay + later.astype(np.intp)
        return np.where(fate[:, 1] < self._feedback.missing_share, -1, arrivals)

    def _decide(self, device: int, step: int, noise: Floats, reward_noise: float) -> Interaction | None:
        """Rank, run, measure. None if nothing was feasible: then what runs stays, and nothing is learnt."""
        context = self._context(device, step)
        formula = self._world.formula(device)
        decision_id = f"{self._world.name}-{self._seed}-{step}-{device}"
        ranking = self._ranked(decision_id, context, device, step)
        chosen = self._fallback(context) if ranking is None else ranking.chosen
        action = self._world.actions[chosen]
        downloaded = self._devices[device].run(action)
        measured = replace(self._world.measure(device, step, chosen, noise), download_bytes=downloaded)
        reward = formula.reward(measured, action.variant.accuracy)
        self._chosen[step, device] = chosen
        self._qoe[step, device] = -switching_charge(formula, downloaded)
        self._reward[step, device] = reward
        if ranking is None:
            return None
        learnt = min(max(reward + reward_noise, 0.0), 1.0)
        return Interaction(decision_id, context, ranking.candidates, chosen, measured, learnt)

    def _context(self, device: int, step: int) -> Context:
        memory = self._devices[device]
        context = replace(self._world.context(device, step), incumbent=memory.incumbent, cached_digests=memory.known)
        if context.baseline is not None:
            self._baseline[step, device] = self._world.expected_qoe(step)[device, self._position[context.baseline]]
        if self._contender.masks:
            return context
        return replace(context, memory_free_bytes=0, minimum_accuracy=0.0, supported_operators=frozenset())

    def _ranked(self, decision_id: str, context: Context, device: int, step: int) -> Ranking | None:
        start = time.perf_counter()
        try:
            return rank(
                decision_id=decision_id,
                context=context,
                actions=self._world.actions,
                profiles=self._world.profiles(device),
                calibration=self._calibration,
                formula=self._world.formula(device),
                policy=self._policy,
                policy_version=1,
                best_fixed=None,
                exploration=self._exploration,
                bans=self._world.bans(step),
            )
        except NoFeasibleAction:
            return None
        finally:
            self._seconds += time.perf_counter() - start

    def _fallback(self, context: Context) -> int:
        key = context.incumbent or context.baseline
        return self._position[key] if key is not None else 0

    def _learn(self, interactions: list[Interaction]) -> None:
        for interaction in interactions:
            if self._contender.calibrates:
                self._calibration.update(interaction)
            self._policy.learn(interaction)
        self._learnt += len(interactions)


def available(world: World, step: int) -> Mask:
    """Which actions exist at this step, shape (actions,)."""
    bans = world.bans(step)
    return np.array([action.variant.digest not in bans for action in world.actions], dtype=np.bool_)


def switching_charge(formula: QoeFormula, downloaded_bytes: int) -> float:
    """What the formula charges for this download, in QoE."""
    return formula.switching_weight * downloaded_bytes / (downloaded_bytes + formula.switching_reference_bytes)
