"""Metrics that follow from rows: read when scraped, and the same whichever web process is asked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import datetime

from django.conf import settings
from django.db import Error as DatabaseError
from django.db.models import Count, F, Max, Min
from django.db.models.functions import Coalesce
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from prometheus_client import REGISTRY as PROCESS_REGISTRY
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from qoe_service.catalogue.models import Application, Job, Variant
from qoe_service.decisions.models import Decision, Feedback, JoinedEvent, Learner, Orphan
from qoe_service.fleet.models import Device
from qoe_service.observability import REGISTRY
from qoe_service.rollouts import ranking_times, reconcile


def metrics(request: HttpRequest) -> HttpResponse:  # noqa: ARG001  (a Django view)
    """Everything that Prometheus may want to know."""
    body = generate_latest(REGISTRY) + generate_latest(PROCESS_REGISTRY)
    return HttpResponse(body, content_type=CONTENT_TYPE_LATEST)


class DatabaseCollector(Collector):
    """Asks the database at every scrape; a database that is away answers with no metrics and ``qoe_database_up`` 0."""

    def collect(self) -> Iterable[Metric]:
        try:
            yield from list(_families(timezone.now()))
        except DatabaseError:
            yield GaugeMetricFamily("qoe_database_up", "Whether the database answers", value=0)
        else:
            yield GaugeMetricFamily("qoe_database_up", "Whether the database answers", value=1)

    def describe(self) -> Iterable[Metric]:
        return ()


def _families(now: datetime) -> Iterator[Metric]:
    yield from _devices(now)
    yield from _decisions(now)
    yield from _choices()
    yield from _learners(now)
    yield from _feedback()
    yield from _queues(now)
    yield _rankings()


def _devices(now: datetime) -> Iterator[Metric]:
    active = Device.objects.filter(revoked_at=None)
    overdue = sum(device.is_overdue(now) for device in active.only("next_check_in_due_at").iterator())
    yield GaugeMetricFamily("qoe_devices", "Enrolled devices that are not revoked", value=active.count())
    yield GaugeMetricFamily("qoe_devices_overdue", "Devices that missed their check-in", value=overdue)


def _decisions(now: datetime) -> Iterator[Metric]:
    lag = GaugeMetricFamily(
        "qoe_join_lag_seconds", "Age of the oldest closed lease without a reward", labels=["application"]
    )
    closed = Decision.objects.filter(state=Decision.State.CLOSED).order_by()
    for application, oldest in closed.values_list("application").annotate(Min("closed_at")):
        lag.add_metric([application], _age_s(oldest, now))
    yield lag
    states = GaugeMetricFamily("qoe_decisions", "Decisions by their state now", labels=["application", "state"])
    counts = Decision.objects.order_by().values_list("application", "state").annotate(Count("pk"))
    for application, state, count in counts:
        states.add_metric([application, state], count)
    yield states


def _choices() -> Iterator[Metric]:
    variants = GaugeMetricFamily("qoe_variants", "Variants that decisions may choose", labels=["application"])
    selectable = Variant.objects.filter(accuracy__isnull=False, retired_at=None).order_by()
    for application, count in selectable.values_list("application").annotate(Count("pk")):
        variants.add_metric([application], count)
    yield variants
    number = GaugeMetricFamily("qoe_policy_number", "Newest policy version, 0 before the first", labels=["application"])
    newest = Application.objects.order_by().annotate(newest=Coalesce(Max("policy_versions__number"), 0))
    for application, value in newest.values_list("name", "newest"):
        number.add_metric([application], value)
    yield number


def _learners(now: datetime) -> Iterator[Metric]:
    events = GaugeMetricFamily("qoe_learner_lag_events", "Rewards not learnt yet", labels=["application"])
    seconds = GaugeMetricFamily("qoe_learner_lag_seconds", "Age of the oldest of them", labels=["application"])
    for learner in Learner.objects.all():
        events.add_metric([learner.application_id], learner.last_event_number - learner.learnt_through)
        waiting = JoinedEvent.objects.filter(application=learner.application_id, number__gt=learner.learnt_through)
        oldest = waiting.order_by("number").values_list("joined_at", flat=True).first()
        seconds.add_metric([learner.application_id], _age_s(oldest, now))
    yield events
    yield seconds


def _feedback() -> Iterator[Metric]:
    accepted = CounterMetricFamily("qoe_feedback", "Accepted feedback", labels=["source", "late"])
    for source, is_late, count in Feedback.objects.order_by().values_list("source", "is_late").annotate(Count("pk")):
        accepted.add_metric([source, str(is_late).lower()], count)
    yield accepted
    yield GaugeMetricFamily("qoe_orphans", "Kept feedback about decisions nobody made", value=Orphan.objects.count())


def _queues(now: datetime) -> Iterator[Metric]:
    age = GaugeMetricFamily("qoe_queue_age_seconds", "Age of the oldest work that waits", labels=["queue"])
    length = GaugeMetricFamily("qoe_queue_length", "Work that waits", labels=["queue"])
    due = reconcile.due().annotate(since=F("reported_at"))
    jobs = Job.objects.filter(state=Job.State.QUEUED)
    for queue, rows, oldest in (
        ("reconcile", due.count(), due.aggregate(oldest=Min("since"))["oldest"]),
        ("compress", jobs.count(), jobs.aggregate(oldest=Min("created_at"))["oldest"]),
    ):
        length.add_metric([queue], rows)
        age.add_metric([queue], _age_s(oldest, now))
    if not settings.REDIS_URL:
        ages_s = [time.time() - modified for modified in _message_times()]
        length.add_metric(["messages"], len(ages_s))
        age.add_metric(["messages"], max(ages_s, default=0.0))
    yield length
    yield age


def _message_times() -> Iterator[float]:
    for path in settings.BROKER_DIR.glob("*.msg"):
        try:
            yield path.stat().st_mtime
        except FileNotFoundError:  # a worker took it meanwhile
            continue


def _rankings() -> Metric:
    buckets, total_s = ranking_times.histogram()
    family = HistogramMetricFamily("qoe_ranking_seconds", "Time to rank the actions of one decision, in all processes")
    named = [("+Inf" if bound == float("inf") else str(bound), float(count)) for bound, count in buckets]
    family.add_metric([], named, total_s)
    return family


def _age_s(moment: datetime | None, now: datetime) -> float:
    return 0.0 if moment is None else max(0.0, (now - moment).total_seconds())


REGISTRY.register(DatabaseCollector())
