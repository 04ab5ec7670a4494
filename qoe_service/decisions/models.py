"""Decisions, the feedback about them, the log that is learnt from, and the policies that were learnt."""

from __future__ import annotations

from django.db import models
from django.db.models import Q

from qoe_service.catalogue.models import Application
from qoe_service.fleet.models import Device


class PolicyVersion(models.Model):
    """The learner's frozen, hashed state after the joined events up to ``trained_through``."""

    application = models.ForeignKey(Application, on_delete=models.CASCADE, related_name="policy_versions")
    number = models.PositiveIntegerField()
    state = models.BinaryField(null=True, help_text="null once pruned; replaying the log rebuilds it")
    sha256 = models.CharField(max_length=64)
    arguments = models.TextField()
    feature_schema = models.CharField(max_length=64)
    probes = models.JSONField(default=list)
    trained_through = models.PositiveBigIntegerField(help_text="number of the last joined event learnt")
    best_fixed = models.CharField(max_length=100, blank=True, help_text="key of the best fixed action so far")
    fencing_number = models.PositiveBigIntegerField()
    created_at = models.DateTimeField()

    class Meta:
        ordering = ("application", "-number")
        constraints = [models.UniqueConstraint(fields=("application", "number"), name="one_policy_per_number")]

    def __str__(self) -> str:
        return f"{self.application_id} v{self.number}"


class CalibrationRow(models.Model):
    """Calibration of the latency model for one scope: ``fleet``, ``class:NAME`` or ``device:ID``."""

    application = models.ForeignKey(Application, on_delete=models.CASCADE, related_name="+")
    scope = models.CharField(max_length=100)
    revision = models.PositiveBigIntegerField()
    state = models.JSONField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=("application", "scope"), name="one_calibration_per_scope")]


class Learner(models.Model):
    """Who may learn for an application, and how far the log has come. Its row lock orders the log."""

    application = models.OneToOneField(Application, on_delete=models.CASCADE, primary_key=True, related_name="learner")
    owner = models.CharField(max_length=100, blank=True)
    fencing_number = models.PositiveBigIntegerField(default=0)
    lease_expires_at = models.DateTimeField(null=True, blank=True)
    last_event_number = models.PositiveBigIntegerField(default=0)
    learnt_through = models.PositiveBigIntegerField(default=0)


class Decision(models.Model):
    """An immutable record of one choice, but for the times of its life."""

    class State(models.TextChoices):
        PENDING = "pending", "not yet active on the device"
        ACTIVE = "active", "running on the device"
        CLOSED = "closed", "lease over, waiting for late ratings"
        JOINED = "joined", "became a reward"
        NEVER_ACTIVE = "never_active", "replaced before it became active; not learnt"
        DROPPED = "dropped", "silent, overridden or empty; not learnt"

    id = models.CharField(primary_key=True, max_length=64)
    application = models.ForeignKey(Application, on_delete=models.CASCADE, related_name="decisions")
    device = models.ForeignKey(Device, on_delete=models.CASCADE, related_name="decisions")
    state = models.CharField(max_length=16, choices=State, default=State.PENDING)
    reason = models.CharField(max_length=32, help_text="why a decision was due: enrolment, lease_over, rollback, …")
    context = models.JSONField()
    candidates = models.JSONField(help_text="selector candidates as records: predictions, masks, probabilities")
    chosen = models.PositiveIntegerField()
    action_key = models.CharField(max_length=100)
    variant_digest = models.CharField(max_length=64)
    configuration = models.JSONField()
    propensity = models.FloatField()
    kind = models.CharField(max_length=32)
    seed = models.CharField(max_length=32)
    policy_number = models.PositiveIntegerField(default=0, help_text="0: before the first policy")
    formula_version = models.PositiveIntegerField()
    calibration_revisions = models.JSONField(default=dict)
    trace_id = models.CharField(max_length=32, blank=True)
    decided_at = models.DateTimeField()
    active_at = models.DateTimeField(null=True, blank=True)
    closed_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ("-decided_at",)
        indexes = [
            models.Index(fields=("application", "state", "decided_at"), name="decision_by_state"),
            models.Index(fields=("device", "application", "-decided_at"), name="decision_by_device"),
        ]
        constraints = [
            models.CheckConstraint(
                condition=Q(propensity__gt=0, propensity__lte=1), name="decision_propensity_is_positive"
            )
        ]

    def __str__(self) -> str:
        return self.id


class Feedback(models.Model):
    """One accepted report about a decision, from the device or from an app."""

    feedback_id = models.CharField(max_length=64)
    decision = models.ForeignKey(Decision, on_delete=models.CASCADE, related_name="feedback")
    source = models.CharField(max_length=16, choices=(("device", "device"), ("app", "app")))
    sender = models.CharField(max_length=100, blank=True, help_text="which device or key; ids are the sender's own")
    components = models.JSONField(null=True, blank=True)
    rating = models.FloatField(null=True, blank=True)
    lease_closed = models.BooleanField(default=False)
    overridden = models.BooleanField(default=False)
    active_s = models.FloatField(default=0)
    controller_version = models.CharField(max_length=256, blank=True)
    is_late = models.BooleanField(default=False)
    observed_at = models.DateTimeField(null=True, blank=True)
    received_at = models.DateTimeField()

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=("decision", "source", "sender", "feedback_id"), name="feedback_is_idempotent"
            ),
        ]


class Orphan(models.Model):
    """Feedback about a decision that nobody made, kept for the operator."""

    feedback_id = models.CharField(max_length=64)
    decision_id = models.CharField(max_length=64)
    source = models.CharField(max_length=100)
    received_at = models.DateTimeField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=("decision_id", "source", "feedback_id"), name="orphan_is_idempotent"),
        ]


class JoinedEvent(models.Model):
    """A closed decision with its reward, in the order in which it is learnt. ``number`` has no gaps."""

    application = models.ForeignKey(Application, on_delete=models.CASCADE, related_name="joined_events")
    number = models.PositiveBigIntegerField()
    decision = models.OneToOneField(Decision, on_delete=models.CASCADE, related_name="joined")
    measurement = models.JSONField(help_text="selector.interactions.Measurement as a record")
    reward = models.FloatField()
    formula_version = models.PositiveIntegerField()
    joined_at = models.DateTimeField()

    class Meta:
        ordering = ("application", "number")
        constraints = [
            models.UniqueConstraint(fields=("application", "number"), name="log_has_one_order"),
            models.CheckConstraint(condition=Q(reward__gte=0, reward__lte=1), name="reward_is_a_share"),
        ]


class Ban(models.Model):
    """Forbids a variant on one device, or everywhere when the device is null, until it expires or is lifted."""

    application = models.ForeignKey(Application, on_delete=models.CASCADE, related_name="bans")
    device = models.ForeignKey(Device, null=True, blank=True, on_delete=models.CASCADE, related_name="bans")
    variant_digest = models.CharField(max_length=64)
    reason = models.CharField(max_length=200)
    created_at = models.DateTimeField()
    expires_at = models.DateTimeField(null=True, blank=True)
