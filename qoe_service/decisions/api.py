"""Feedback over HTTP, for devices and apps, and what became of a decision."""

from __future__ import annotations

from datetime import datetime
from typing import cast

from django.db.models import Count, Q
from django.http import HttpRequest
from django.utils import timezone
from ninja import Router, Schema

from device_agents import wire
from qoe_service.decisions import feedback
from qoe_service.decisions.models import Decision
from qoe_service.errors import NotFound, NotPermitted
from qoe_service.fleet.api import DeviceOrApplicationAuth
from qoe_service.fleet.models import ApplicationKey, Device

router = Router(tags=["decisions"], auth=DeviceOrApplicationAuth())


class DecisionStatus(Schema):
    """Where a decision stands, as its device or app may know it."""

    id: str
    application: str
    device_id: str
    state: str
    variant_digest: str
    configuration: wire.ServingConfiguration
    propensity: float
    policy_number: int
    decided_at: datetime
    active_at: datetime | None
    closed_at: datetime | None
    reward: float | None
    feedback: int
    late_feedback: int


def author_of(request: HttpRequest) -> feedback.Author:
    """Who sent the request, by the credential it carries."""
    who = cast("Device | ApplicationKey", getattr(request, "auth", None))
    return feedback.DeviceAuthor(who) if isinstance(who, Device) else feedback.ApplicationAuthor(who)


@router.post("/feedback", response=wire.FeedbackResult)
def send_feedback(request: HttpRequest, body: wire.Feedback) -> wire.FeedbackResult:
    """One report about one decision. Sending it again does nothing."""
    return feedback.accept_one(item=body, author=author_of(request), now=timezone.now())


@router.post("/feedback/batch", response=wire.FeedbackBatchReply)
def send_feedback_batch(request: HttpRequest, body: wire.FeedbackBatch) -> wire.FeedbackBatchReply:
    """Up to 500 reports, each with its own result, in order. Sending them again does nothing."""
    results = feedback.accept(items=body.items, author=author_of(request), now=timezone.now())
    return wire.FeedbackBatchReply(results=tuple(results))


@router.get("/decisions/{decision_id}", response=DecisionStatus)
def decision_status(request: HttpRequest, decision_id: wire.Identifier) -> DecisionStatus:
    """Where a decision of yours stands: pending, active, closed, joined, never_active or dropped."""
    counts = {"all_feedback": Count("feedback"), "late": Count("feedback", filter=Q(feedback__is_late=True))}
    rows = Decision.objects.defer("context", "candidates").select_related("joined").annotate(**counts)
    decision = rows.filter(pk=decision_id).first()
    if decision is None:
        raise NotFound(f"no decision {decision_id}", field="decision_id")
    if not author_of(request).owns(decision):
        raise NotPermitted("the decision belongs to somebody else", field="decision_id")
    joined = getattr(decision, "joined", None)
    return DecisionStatus(
        id=decision.pk,
        application=decision.application_id,
        device_id=decision.device_id,
        state=decision.state,
        variant_digest=decision.variant_digest,
        configuration=wire.ServingConfiguration.model_validate(decision.configuration),
        propensity=decision.propensity,
        policy_number=decision.policy_number,
        decided_at=decision.decided_at,
        active_at=decision.active_at,
        closed_at=decision.closed_at,
        reward=joined.reward if joined else None,
        feedback=getattr(decision, "all_feedback", 0),
        late_feedback=getattr(decision, "late", 0),
    )
