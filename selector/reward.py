"""The application's QoE formula: what a measured lease was worth, and what a predicted one would be, on one
scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selector.errors import InvalidInput
from selector.interactions import Measurement
from selector.queueing import share_within
from selector.validation import check_measurement, number, whole

Floats = NDArray[np.float64]
_POSITIVE = ("slo_p95_ms", "energy_reference_cpu_ms", "switching_reference_bytes")
_WEIGHTS = ("weight_latency", "weight_accuracy", "weight_energy", "weight_rating")


@dataclass(frozen=True, slots=True)
class QoeFormula:
    """Weights and scales of one application's quality of experience, versioned: history can be re-scored.

    QoE is the weighted mean of four terms in [0, 1] less a charge for switching, clipped to [0, 1]:

    * latency: share of requests answered without error within the SLO;
    * accuracy: 0 at ``accuracy_floor``, 1 at perfect accuracy, linear;
    * energy: ``reference / (reference + CPU ms per request)``, so 0.5 at the reference;
    * rating: the mean of the users' ratings, in [0, 1]; 0 is a rating, None is none.

    A term that was not measured leaves the mean and the other weights are renormalised. The charge is
    ``switching_weight * bytes / (bytes + reference)``. A lease that failed has ``failure_reward`` instead.
    """

    version: int = 1
    weight_latency: float = 1.0
    weight_accuracy: float = 1.0
    weight_energy: float = 0.5
    weight_rating: float = 1.0
    slo_p95_ms: float = 100.0
    accuracy_floor: float = 0.0
    energy_reference_cpu_ms: float = 50.0
    switching_weight: float = 0.02
    switching_reference_bytes: float = 20e6
    failure_reward: float = 0.0

    def __post_init__(self) -> None:
        """Raise InvalidInput naming the field that makes no sense."""
        whole("version", self.version, 0, 2**31)
        for field in _WEIGHTS:
            number(field, getattr(self, field), 0, 1e6)
        for field in _POSITIVE:
            number(field, getattr(self, field), 1e-6, 1e15)
        number("accuracy_floor", self.accuracy_floor, 0, 0.9999)
        number("switching_weight", self.switching_weight, 0, 1)
        number("failure_reward", self.failure_reward, 0, 1)
        if self.weight_latency + self.weight_accuracy + self.weight_energy <= 0:
            raise InvalidInput("weight_latency", "must be positive, or the accuracy or energy weight must be")

    def reward(self, measurement: Measurement, accuracy: float | None = None) -> float:
        """What the lease was worth, in [0, 1]. ``accuracy`` is the variant's own, used where none was
        measured.

        >>> formula = QoeFormula(weight_accuracy=0, weight_energy=0)
        >>> formula.reward(Measurement(requests=8, slo_hit_share=0.75, rating=0.0))
        0.375
        """
        check_measurement(measurement)
        if measurement.failed:
            return self.failure_reward
        total = weight = 0.0
        for each, term in self.terms(measurement, accuracy).items():
            total += getattr(self, f"weight_{each}") * term
            weight += getattr(self, f"weight_{each}")
        if weight <= 0:
            raise InvalidInput("measurement", "has no component that the formula weighs")
        return float(np.clip(total / weight - self._switching(measurement.download_bytes), 0.0, 1.0))

    def can_score(self, measurement: Measurement, accuracy: float | None = None) -> bool:
        """Whether anything that the formula weighs was measured: otherwise ``reward`` raises."""
        terms = () if measurement.failed else self.terms(measurement, accuracy)
        return measurement.failed or any(getattr(self, f"weight_{each}") > 0 for each in terms)

    def terms(self, measurement: Measurement, accuracy: float | None = None) -> dict[str, float]:
        """The measured terms by name, each in [0, 1]; what was not measured is left out."""
        found: dict[str, float] = {}
        share = self._hit_share(measurement)
        if share is not None:
            found["latency"] = share
        known = measurement.accuracy if measurement.accuracy is not None else accuracy
        if known is not None:
            found["accuracy"] = float(self._accuracy(number("accuracy", known, 0, 1)))
        if measurement.cpu_ms_per_request is not None:
            found["energy"] = float(self._energy(measurement.cpu_ms_per_request))
        if measurement.rating is not None:
            found["rating"] = float(measurement.rating)
        return found

    def predicted(
        self,
        accuracy: ArrayLike,
        slo_hit_share: ArrayLike,
        cpu_ms_per_request: ArrayLike,
        download_bytes: ArrayLike,
    ) -> Floats:
        """Expected reward of leases with these properties; arguments broadcast.

        Prior for the rating: its expectation is the weighted mean of the other terms, so it drops out. What
        users value otherwise is for the policy to learn.

        >>> formula = QoeFormula(weight_accuracy=0, weight_energy=0)
        >>> float(formula.predicted(0.9, 0.75, 10.0, 0))
        0.75
        """
        total = (
            self.weight_latency * np.asarray(slo_hit_share, dtype=np.float64)
            + self.weight_accuracy * self._accuracy(accuracy)
            + self.weight_energy * self._energy(cpu_ms_per_request)
        )
        weight = self.weight_latency + self.weight_accuracy + self.weight_energy
        return _unit(total / weight - self._switching(download_bytes))

    def as_record(self) -> dict[str, Any]:
        """JSON-able; exact."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The formula that ``as_record`` wrote; unknown fields are ignored, missing ones take their
        defaults."""
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})

    def _hit_share(self, measurement: Measurement) -> float | None:
        failed = (
            min(measurement.errors / measurement.requests, 1.0)
            if measurement.requests
            else float(measurement.errors > 0)
        )
        share = measurement.slo_hit_share
        if share is None and measurement.p50_ms is not None and measurement.p95_ms is not None:
            share = float(
                share_within(self.slo_p95_ms, measurement.p50_ms, max(measurement.p95_ms, measurement.p50_ms))
            )
        if share is None:
            return 0.0 if failed >= 1.0 else None
        return share * (1.0 - failed)

    def _accuracy(self, accuracy: ArrayLike) -> Floats:
        return _unit((np.asarray(accuracy, dtype=np.float64) - self.accuracy_floor) / (1 - self.accuracy_floor))

    def _energy(self, cpu_ms: ArrayLike) -> Floats:
        return self.energy_reference_cpu_ms / (self.energy_reference_cpu_ms + np.asarray(cpu_ms, dtype=np.float64))

    def _switching(self, download_bytes: ArrayLike) -> Floats:
        size = np.asarray(download_bytes, dtype=np.float64)
        return self.switching_weight * size / (size + self.switching_reference_bytes)


def _unit(values: Floats) -> Floats:
    """Within [0, 1]; several times cheaper than ``np.clip`` on short columns."""
    return np.minimum(np.maximum(values, 0.0), 1.0)
