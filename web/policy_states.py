"""Reads how far learning has come: the champion of each application, or when its first policy is expected."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from django.db.models import OuterRef, QuerySet, Subquery

from qoe_service.catalogue.models import Application
from qoe_service.decisions.models import Learner, PolicyVersion
from qoe_service.decisions.policies import FirstPolicy, first_policy_expected
from web import formatting


@dataclass(frozen=True, slots=True)
class PolicyState:
    """The champion of an application, or that there is none yet."""

    application: Application
    number: int | None
    created_at: datetime | None
    trained_through: int
    joined: int
    learnt_through: int
    first: FirstPolicy | None

    @property
    def expectation(self) -> str:
        """When the first policy is expected, in words: "in about 16 s, after 5 more leases"."""
        if self.first is None:
            return "soon"
        leases = f"{self.first.missing_events} more lease" + ("" if self.first.missing_events == 1 else "s")
        if self.first.seconds is None:
            return f"after {leases}; no lease is running yet"
        return f"in about {formatting.seconds(float(round(self.first.seconds)))}, after {leases}"


def policy_states(*, now: datetime) -> list[PolicyState]:
    """The policy of each application: one query, and a few more for those that still explore uniformly."""
    return [_state(row, now) for row in _annotated()]


def policy_state(*, application: Application, now: datetime) -> PolicyState:
    """The policy of one application."""
    return _state(_annotated().get(pk=application.pk), now)


def _annotated() -> QuerySet[Application]:
    newest = PolicyVersion.objects.filter(application=OuterRef("pk")).order_by("-number")
    learner = Learner.objects.filter(application=OuterRef("pk"))
    return Application.objects.annotate(
        policy_number=Subquery(newest.values("number")[:1]),
        policy_at=Subquery(newest.values("created_at")[:1]),
        policy_through=Subquery(newest.values("trained_through")[:1]),
        joined=Subquery(learner.values("last_event_number")[:1]),
        learnt=Subquery(learner.values("learnt_through")[:1]),
    )


def _state(row: Application, now: datetime) -> PolicyState:
    found = vars(row)
    return PolicyState(
        application=row,
        number=found["policy_number"],
        created_at=found["policy_at"],
        trained_through=found["policy_through"] or 0,
        joined=found["joined"] or 0,
        learnt_through=found["learnt"] or 0,
        first=None if found["policy_number"] else first_policy_expected(application=row, now=now),
    )
