"""The words of the selector as frozen values: what is known, what can be done, what was done, what came of
it.

No arithmetic lives here. Times are milliseconds, energy is CPU milliseconds per request, QoE and rewards are
in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, order=True)
class Configuration:
    """Bounds given to the device: largest batch, largest concurrency, thread budget, controller on or off."""

    max_batch: int = 1
    max_concurrency: int = 1
    threads: int = 1
    controller: bool = False

    @property
    def key(self) -> str:
        """Short name, for example ``b4c2t1``."""
        return f"b{self.max_batch}c{self.max_concurrency}t{self.threads}" + ("a" if self.controller else "")


@dataclass(frozen=True, slots=True)
class Variant:
    """One ONNX artifact and the facts about it that hold on every device."""

    digest: str
    name: str
    size_bytes: int
    accuracy: float
    precision: str = "fp32"
    memory_bytes: int = 0
    operators: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Action:
    """One joint choice of variant and configuration ("arm" in the literature)."""

    variant: Variant
    configuration: Configuration

    @property
    def key(self) -> str:
        """Stable identity, for example ``3f2a9c01b7de/b4c2t1``."""
        return f"{self.variant.digest[:12]}/{self.configuration.key}"


@dataclass(frozen=True, slots=True)
class Profile:
    """Measured or borrowed service time of one variant with ``threads`` threads: ``a_ms * n + b_ms`` per
    batch of n.

    ``source`` is ``device``, ``class`` or ``server``: whose measurement it is.
    """

    digest: str
    threads: int
    a_ms: float
    b_ms: float
    memory_bytes: int = 0
    source: str = "device"


@dataclass(frozen=True, slots=True)
class Context:
    """What is known when deciding.

    ``cpu_load_share`` is the share of all cores that *other* processes use; ``memory_free_bytes`` 0 means
    unknown; an empty ``supported_operators`` means that the device runs every operator. ``unmeasured_digests`` are
    variants that nobody of the device's kind has measured, and nobody allowed to be tried without.
    """

    device: str
    device_class: str
    application: str
    arrival_rate_rps: float
    slo_p95_ms: float
    minimum_accuracy: float = 0.0
    cores: int = 1
    memory_free_bytes: int = 0
    cpu_load_share: float = 0.0
    incumbent: str | None = None
    baseline: str | None = None
    cached_digests: frozenset[str] = frozenset()
    features: Mapping[str, float | str] = field(default_factory=dict)
    supported_operators: frozenset[str] = frozenset()
    unmeasured_digests: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the latency model and the QoE formula expect of one action in one context.

    ``service_ms`` is the wall time of one executed batch of the expected size ``batch``; ``log_sd`` is the standard
    deviation of the logarithm of ``p95_ms``. The ``raw_`` values are what was expected before calibration (of the CPU
    time: before its own, in batches of the expected size), so that the calibration learns the same whichever revision
    predicted; ``source`` says whose profile they come from (``device``, ``device_scaled``, ``class``,
    ``server``, ``size``). ``bonus`` is what finding out may be worth, less what the risk of missing the SLO
    costs: added to ``qoe`` when choosing, never when learning. ``held_back`` says how many
    times longer than a run its device is taken by it (a CPU quota).
    """

    p50_ms: float
    p95_ms: float
    log_sd: float
    cpu_ms_per_request: float
    slo_violation_probability: float
    qoe: float
    service_ms: float
    batch: float = 1.0
    slo_hit_share: float = 0.0
    raw_a_ms: float = 0.0
    raw_b_ms: float = 0.0
    raw_cpu_ms: float = 0.0
    source: str = ""
    bonus: float = 0.0
    held_back: float = 1.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One action as it stood in one decision. ``probability`` is the marginal one, over shortlist randomness
    too."""

    action: Action
    prediction: Prediction
    hard_masks: tuple[str, ...] = ()
    soft_masks: tuple[str, ...] = ()
    shortlisted: bool = False
    probability: float = 0.0

    @property
    def is_feasible(self) -> bool:
        """Whether no hard mask forbids the action."""
        return not self.hard_masks


@dataclass(frozen=True, slots=True)
class Ranking:
    """The outcome of one decision, complete enough to be logged, explained and evaluated off-policy.

    ``kind`` says which part of the mixture drew the action: ``exploit`` (the policy), ``uniform``,
    ``holdout_uniform`` or ``holdout_best_fixed``; it is for people, the propensity is
    ``candidates[chosen].probability``.
    """

    candidates: Sequence[Candidate]
    chosen: int
    seed: int
    kind: str
    policy_version: int
    calibration_revisions: Mapping[str, int] = field(default_factory=dict)

    @property
    def action(self) -> Action:
        """The action that was sampled."""
        return self.candidates[self.chosen].action

    @property
    def propensity(self) -> float:
        """The probability with which it was sampled."""
        return self.candidates[self.chosen].probability


@dataclass(frozen=True, slots=True)
class Measurement:
    """All feedback of one lease, folded. None where nothing was measured.

    ``slo_hit_share`` is the share of *answered* requests within the SLO (errors are charged on top),
    ``service_ms`` the mean wall time of one executed batch, ``batch_mean`` its mean size; ``accuracy`` and
    ``rating`` lie in [0, 1].
    """

    requests: int = 0
    errors: int = 0
    p50_ms: float | None = None
    p95_ms: float | None = None
    slo_hit_share: float | None = None
    cpu_ms_per_request: float | None = None
    accuracy: float | None = None
    service_ms: float | None = None
    batch_mean: float | None = None
    rating: float | None = None
    ratings: int = 0
    download_bytes: int = 0
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Interaction:
    """One closed decision: what was known, what could be done and how likely, what was done, what came of
    it."""

    decision_id: str
    context: Context
    candidates: Sequence[Candidate]
    chosen: int
    measurement: Measurement
    reward: float

    @property
    def propensity(self) -> float:
        """Probability with which the chosen action was sampled."""
        return self.candidates[self.chosen].probability
