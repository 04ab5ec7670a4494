"""What users like and no formula says, learnt from what leases turned out to be worth.

The residual of a lease (reward less predicted QoE) is a sum of effects of each scope that the decision belongs to: the
device, its class, its application, and every word of its telemetry (``group=staff``). In each scope there is a level, a
slope over accuracy, energy and latency, an effect of the precision and one of the variant. As in ``calibration.py`` one
scalar Kalman step with a diagonal covariance shares the innovation out by variance, so that a device is shrunk towards
those it is like (West & Harrison, *Bayesian Forecasting and Dynamic Models*, ch. 4). What is uncertain is hoped for
a little (Auer, *JMLR* 2002), or what is disliked by mistake would never be tried again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from selector.errors import InvalidInput
from selector.interactions import Candidate, Context, Interaction
from selector.stored import LEAST_SHARE, Stored, mostly
from selector.trust import LEAST_SQUARE, Trust
from selector.validation import check_candidates, check_context, check_interaction, number

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Effects = dict[str, tuple[float, float]]

LEVEL, *SLOPES = "level", "accuracy", "energy", "latency"
# Standard deviations before anything is known, in QoE (of a slope: per unit of its term), by kind of scope. That all
# of an application's ratings lie below or above what is predicted is ordinary, and no taste.
PRIOR_SD = {
    "device": {LEVEL: 0.04, "slope": 0.08, "precision": 0.02, "variant": 0.03},
    "class": {LEVEL: 0.02, "slope": 0.06, "precision": 0.02, "variant": 0.035},
    "application": {LEVEL: 0.15, "slope": 0.06, "precision": 0.02, "variant": 0.035},
    "word": {LEVEL: 0.02, "slope": 0.06, "precision": 0.02, "variant": 0.035},
}
# So many words of telemetry count in full; more have smaller effects each, or much telemetry would mean strong tastes.
WORDS_IN_FULL = 3
# How far an effect may wander from one of its leases to the next, as a share of its prior variance.
WANDERED = 0.0003
# Noise of one lease's reward, before it is learnt; as if so many leases had shown it.
NOISE_SD, NOISE_LEASES, NOISE_KEPT = 0.05, 20.0, 0.999
OUTLIER_Z = 3.0
# How many standard deviations are hoped for.
OPTIMISM = 0.25
BELIEVED_FROM_THE_START = 0.02
# Terms are measured from here, so that a slope says little about the level.
_ACCURACY_FROM, _ACCURACY_UNIT, _ENERGY_REFERENCE_CPU_MS, _ENERGY_FROM, _LATENCY_FROM = 0.85, 0.3, 50.0, 0.5, 0.9
# Beyond so many scopes those that learnt nothing for longest are forgotten.
MOST_SCOPES = 50_000
LARGEST = 10.0
_NOTHING: Effects = {}


@dataclass(frozen=True, slots=True)
class Liking:
    """What users like or dislike about each candidate beyond its prediction, in QoE, shape (candidates,); ``hope`` is
    for what is not known of its variant and precision. What is not known of slopes gives none: it is the same whichever
    candidate shows it."""

    mean: Floats
    hope: Floats


@dataclass(slots=True)
class Noise:
    """Running variance of what no effect explains in a lease's reward."""

    leases: float = NOISE_LEASES
    square: float = NOISE_LEASES * NOISE_SD**2

    @property
    def variance(self) -> float:
        """In QoE squared."""
        return self.square / self.leases

    def learn(self, surprise: float, known: float) -> None:
        """One lease: how much it surprised, and the variance that the effects had."""
        square = min(surprise**2, OUTLIER_Z**2 * (known + self.variance))
        self.square = max(NOISE_KEPT * self.square + max(square - known, 0.1 * square), LEAST_SQUARE)
        self.leases = NOISE_KEPT * self.leases + 1.0


@dataclass(slots=True)
class Tastes:
    """Effects by scope and name, each ``(mean, variance)``, the noise around them, and how far they are trusted."""

    effects: dict[str, Effects] = field(default_factory=dict)
    noise: Noise = field(default_factory=Noise)
    trust: Trust = field(default_factory=lambda: Trust(BELIEVED_FROM_THE_START, BELIEVED_FROM_THE_START))

    def liking(self, context: Context, candidates: Sequence[Candidate]) -> Liking:
        """As far as it is trusted; without the levels, which tell no candidates apart."""
        variants = (each.action.variant for each in candidates)
        names, index = _columns(tuple(_names_of(each.precision, each.digest) for each in variants))
        scopes = _scopes(context)
        rows = (
            map(self.effects.get(key, _NOTHING).get, names, _priors(names, kind, crowd)) for key, kind, crowd in scopes
        )
        flat = chain.from_iterable(chain.from_iterable(rows))
        known = np.fromiter(flat, np.float64, 2 * len(scopes) * len(names))
        known = known.reshape(len(scopes), len(names), 2).sum(axis=0)
        terms = np.array([_terms(each) for each in candidates])
        share, slopes = self.trust.share, len(SLOPES)
        mean, variance = known[index].sum(axis=1).T
        return Liking(share * (mean + terms @ known[:slopes, 0]), share * OPTIMISM * np.sqrt(variance))

    def learn(self, context: Context, candidate: Candidate, residual: float) -> None:
        """One closed lease of a valid context and candidate: reward less predicted QoE. One that failed counts too: who
        lost a lease to a variant likes it less."""
        residual = min(max(residual, -1.0), 1.0)
        variant = candidate.action.variant
        names = (LEVEL, *SLOPES, *_names_of(variant.precision, variant.digest))
        values = (1.0, *_terms(candidate), 1.0, 1.0)
        parts = []
        for scope, kind, crowd in _scopes(context):
            row = self._row(scope)
            for each, value in zip(names, values, strict=True):
                prior = _prior(each, kind, crowd)[1]
                mean, variance = row.get(each, (0.0, prior))
                parts.append((row, each, value, mean, max(min(variance + WANDERED * prior, prior), variance)))
        foretold = sum(value * mean for _, _, value, mean, _ in parts)
        level = sum(mean for _, each, _, mean, _ in parts if each == LEVEL)
        known = sum(value**2 * variance for _, _, value, _, variance in parts)
        self.trust.learn(foretold - level, residual - level)
        surprise, total = residual - foretold, known + self.noise.variance
        self.noise.learn(surprise, known)
        # What is hardly believed makes hardly surer.
        believed = min(1.0, OUTLIER_Z * math.sqrt(total) / max(abs(surprise), 1e-12))
        for row, each, value, mean, variance in parts:
            gain = believed * variance * value / total
            learnt = min(max(mean + gain * surprise, -LARGEST), LARGEST)
            row[each] = _short(learnt), _short(variance * (1.0 - gain * value))

    def state(self) -> dict[str, Any]:
        """JSON-able; exact. Scopes in the order in which they will be forgotten."""
        effects = [[scope, {each: list(pair) for each, pair in row.items()}] for scope, row in self.effects.items()]
        return {"effects": effects, "noise": asdict(self.noise), "trust": asdict(self.trust)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Raises InvalidInput, ValueError, KeyError, TypeError or AttributeError for what ``state`` does not write."""
        noise = Noise(
            number("noise.leases", state["noise"]["leases"], 1e-9, 1e9),
            number("noise.square", state["noise"]["square"], LEAST_SQUARE, 1e9),
        )
        effects = {
            str(scope): {str(each): (mean, variance) for each, (mean, variance) in row.items()}
            for scope, row in state["effects"]
        }
        pairs = [pair for row in effects.values() for pair in row.values()]
        known = np.array(pairs, dtype=np.float64).reshape(len(pairs), 2)
        if not ((np.abs(known) <= LARGEST).all() and (known[:, 1] >= 0).all()):  # NaN is at most nothing
            raise InvalidInput("effects", f"must be means and variances within {LARGEST:g}")
        return cls(effects, noise, Trust.from_record(state["trust"]))

    def _row(self, scope: str) -> Effects:
        """To be written to: the scope is the last to be forgotten now."""
        row = self.effects.pop(scope, None)
        if row is None:
            row = {}
            if len(self.effects) >= MOST_SCOPES:
                del self.effects[next(iter(self.effects))]
        self.effects[scope] = row
        return row


class TastePolicy(Stored):
    """The best predicted QoE with its bonus and what users like: all that ours knows, without Vowpal Wabbit."""

    kind = "tastes"

    def __init__(self, tastes: Tastes | None = None) -> None:
        self._tastes = tastes or Tastes()

    def state(self) -> dict[str, Any]:
        """What was learnt."""
        return self._tastes.state()

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Raises InvalidInput, ValueError, KeyError, TypeError or AttributeError for what ``state`` does not write."""
        return cls(Tastes.from_state(state))

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Nearly all on the best; ties go to the first."""
        check_context(context)
        check_candidates(candidates)
        liking = self._tastes.liking(context, candidates)
        value = np.array([each.prediction.qoe + each.prediction.bonus for each in candidates])
        return mostly(int(np.argmax(value + liking.mean + liking.hope)), len(candidates), LEAST_SHARE)

    def learn(self, interaction: Interaction) -> None:
        """One step. Raises InvalidInput, unchanged."""
        check_interaction(interaction)
        chosen = interaction.candidates[interaction.chosen]
        self._tastes.learn(interaction.context, chosen, interaction.reward - chosen.prediction.qoe)


def _scopes(context: Context) -> list[tuple[str, str, float]]:
    """Keys of the scopes of a decision, their kinds, and by how much their prior variances are divided."""
    words = [f"word:{key!r}={value!r}" for key, value in sorted(context.features.items()) if isinstance(value, str)]
    crowd = max(len(words) / WORDS_IN_FULL, 1.0)
    return [
        (f"device:{context.device}", "device", 1.0),
        (f"class:{context.device_class}", "class", 1.0),
        (f"application:{context.application}", "application", 1.0),
        *((word, "word", crowd) for word in words),
    ]


def _short(value: float) -> float:
    """As many digits as matter: states of many devices are stored often."""
    return float(f"{value:.6g}")


@lru_cache(maxsize=8192)
def _prior(effect: str, kind: str, crowd: float) -> tuple[float, float]:
    """Mean and variance of an effect of this name before anything is known."""
    what = "slope" if effect in SLOPES else effect.partition(":")[0]
    return 0.0, PRIOR_SD[kind][what] ** 2 / crowd


@lru_cache(maxsize=1024)
def _priors(effects: tuple[str, ...], kind: str, crowd: float) -> tuple[tuple[float, float], ...]:
    return tuple(_prior(each, kind, crowd) for each in effects)


@lru_cache(maxsize=1024)
def _columns(pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, ...], Indices]:
    """Names of all effects of candidates that have these pairs, the slopes first, and where each finds its pair, shape
    (candidates, 2)."""
    names = tuple(dict.fromkeys(chain(SLOPES, *pairs)))
    return names, np.array([[names.index(each) for each in pair] for pair in pairs], dtype=np.intp)


@lru_cache(maxsize=4096)
def _names_of(precision: str, digest: str) -> tuple[str, str]:
    return f"precision:{precision}", f"variant:{digest[:12]}"


def _terms(candidate: Candidate) -> tuple[float, float, float]:
    """In the order of ``SLOPES``."""
    prediction = candidate.prediction
    energy = _ENERGY_REFERENCE_CPU_MS / (_ENERGY_REFERENCE_CPU_MS + max(prediction.cpu_ms_per_request, 0.0))
    return (
        (candidate.action.variant.accuracy - _ACCURACY_FROM) / _ACCURACY_UNIT,
        energy - _ENERGY_FROM,
        prediction.slo_hit_share - _LATENCY_FROM,
    )
