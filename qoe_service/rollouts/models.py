"""Desired against reported state of each (device, application), and how attempts to bring them together ended."""

from __future__ import annotations

from django.db import models

from device_agents.wire import Outcome, UpdateState
from qoe_service.catalogue.models import Application
from qoe_service.decisions.models import Decision
from qoe_service.fleet.models import Device


class DesiredVersion(models.Model):
    """The version of a device's desired document; only ever grows."""

    device = models.OneToOneField(Device, on_delete=models.CASCADE, primary_key=True, related_name="desired_version")
    version = models.PositiveBigIntegerField(default=0)
    changed_at = models.DateTimeField()


class Change(models.Model):
    """Says that a device's desired state changed. Watchers read rows above the last id that they saw; old rows go."""

    device = models.ForeignKey(Device, on_delete=models.CASCADE, related_name="+")
    version = models.PositiveBigIntegerField()
    changed_at = models.DateTimeField(db_index=True)


class Assignment(models.Model):
    """What one application on one device should run, and what the device says it runs."""

    device = models.ForeignKey(Device, on_delete=models.CASCADE, related_name="assignments")
    application = models.ForeignKey(Application, on_delete=models.CASCADE, related_name="assignments")
    decision = models.ForeignKey(Decision, null=True, blank=True, on_delete=models.SET_NULL, related_name="+")
    desired_at = models.DateTimeField(null=True, blank=True)
    last_good_digest = models.CharField(max_length=64, blank=True)
    reported_state = models.CharField(max_length=16, choices=[(s.value, s.value) for s in UpdateState], blank=True)
    reported_digest = models.CharField(max_length=64, blank=True)
    reported_decision_id = models.CharField(max_length=64, blank=True)
    reported_active_s = models.FloatField(default=0)
    reported_rps = models.FloatField(null=True, blank=True)
    cached_digests = models.JSONField(default=list, blank=True)
    reported_at = models.DateTimeField(null=True, blank=True)
    undecided_until = models.DateTimeField(null=True, blank=True, help_text="nothing could be chosen: not before this")
    undecided_wait_s = models.FloatField(default=0)
    undecided_why = models.CharField(max_length=500, blank=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=("device", "application"), name="one_assignment_each")]
        ordering = ("device", "application")


class AttemptOutcome(models.Model):
    """How one attempt of a device to follow a decision ended, in the device's words."""

    device = models.ForeignKey(Device, on_delete=models.CASCADE, related_name="outcomes")
    application = models.ForeignKey(Application, on_delete=models.CASCADE, related_name="outcomes")
    decision_id = models.CharField(max_length=64)
    outcome = models.CharField(max_length=32, choices=[(o.value, o.value) for o in Outcome])
    reason = models.CharField(max_length=1024, blank=True)
    evidence = models.CharField(max_length=16, default="none")
    download_bytes = models.PositiveBigIntegerField(default=0)
    swap_ms = models.FloatField(default=0)
    at = models.DateTimeField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=("device", "decision_id", "outcome"), name="outcome_is_idempotent"),
        ]
        ordering = ("-at",)


class RankingTime(models.Model):
    """How many rankings took a time in one bucket of ``observability.RANKING_BUCKETS_S``."""

    bucket = models.PositiveSmallIntegerField(primary_key=True)
    count = models.PositiveBigIntegerField(default=0)
    total_s = models.FloatField(default=0)
