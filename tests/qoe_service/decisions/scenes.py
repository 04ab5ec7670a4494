"""A small fleet whose decisions are made, served, reported and learnt through the room's own functions."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from device_agents import wire
from qoe_service.catalogue.models import Application, Variant
from qoe_service.decisions import feedback, learning, ranking
from qoe_service.decisions.feedback import DeviceAuthor
from qoe_service.decisions.models import Decision, PolicyVersion
from qoe_service.fleet.models import Device
from tests.builders import NOW, make_application, make_device, make_profile, make_variant


@dataclass
class Scene:
    """One application with three variants and some devices; ``now`` moves as leases pass."""

    application: Application
    variants: list[Variant]
    devices: list[Device]
    now: datetime = NOW
    incumbents: dict[str, Decision] = field(default_factory=dict)

    def decide(self, device: Device | None = None, **fields: Any) -> Decision:
        """A decision for one device (the first, unless given)."""
        chosen = device or self.devices[0]
        arguments: dict[str, Any] = {
            "reason": "lease_over",
            "arrival_rate_rps": 5.0,
            "cached_digests": frozenset(),
            "incumbent_decision": self.incumbents.get(chosen.pk),
            "trace_id": "a" * 32,
            **fields,
        }
        return ranking.decide(device=chosen, application=self.application, now=self.now, **arguments)

    def serve(self, decision: Decision) -> None:
        """The device activates the decision and reports its lease; slow variants miss the SLO."""
        slowness = [each.artifact_id for each in self.variants].index(decision.variant_digest)
        components = wire.Components(
            requests=50,
            p50_ms=5.0 + 10 * slowness,
            p95_ms=12.0 + 25 * slowness,
            slo_hit_share=max(1.0 - 0.4 * slowness, 0.0),
            cpu_ms_per_request=4.0 + 9 * slowness,
            service_ms=4.0 + 9 * slowness,
            batch_mean=1.0,
        )
        ranking.activate(decision_id=decision.pk, device=decision.device, now=self.now)
        report = wire.Feedback(
            id="lease", decision_id=decision.pk, components=components, lease_closed=True, active_s=8
        )
        feedback.accept(items=[report], author=DeviceAuthor(decision.device), now=self.now)
        self.incumbents[decision.device_id] = decision

    def pass_leases(self, count: int) -> None:
        """So many rounds: every device decides, serves and reports, then all leases are joined."""
        for _ in range(count):
            for device in self.devices:
                self.serve(self.decide(device))
            self.now += timedelta(seconds=10)
            feedback.close_due(now=self.now)

    def learn(self, owner: str = "learner-1") -> PolicyVersion | None:
        """One call of the learner."""
        self.now += timedelta(seconds=2)
        return learning.learn(application=self.application, owner=owner, now=self.now)


def make_scene(devices: int = 2, **fields: Any) -> Scene:
    """Variants run 3, 12 and 21 ms an item on every device."""
    application = make_application(**fields)
    variants = [
        make_variant(application, name, accuracy=accuracy)
        for name, accuracy in (("small-int8", 0.85), ("medium", 0.9), ("large", 0.95))
    ]
    for index, variant in enumerate(variants):
        make_profile(variant, a_ms=3.0 + 9 * index, b_ms=0.5)
    fleet = [make_device(f"device-{number}") for number in range(devices)]
    return Scene(application, variants, fleet)
