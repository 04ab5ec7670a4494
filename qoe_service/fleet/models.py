"""Devices, and the secrets by which devices, apps and new agents prove who they are. Secrets are stored as SHA-256."""

from __future__ import annotations

from datetime import datetime, timedelta

from django.db import models

OVERDUE_GRACE = timedelta(seconds=30)


class EnrolmentToken(models.Model):
    """Lets a number of new agents enrol."""

    label = models.CharField(max_length=100)
    secret_sha256 = models.CharField(max_length=64, unique=True)
    uses_left = models.PositiveIntegerField()
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField()

    def is_usable(self, now: datetime) -> bool:
        """Whether an agent may enrol with it at ``now``."""
        return self.revoked_at is None and self.uses_left > 0 and (self.expires_at is None or now < self.expires_at)


class Device(models.Model):
    """One enrolled agent. Telemetry is the latest that it reported."""

    id = models.CharField(primary_key=True, max_length=64)
    name = models.CharField(max_length=64)
    device_class = models.CharField(max_length=64, db_index=True)
    credential_sha256 = models.CharField(max_length=64, unique=True)
    labels = models.JSONField(default=dict, blank=True)
    hardware = models.JSONField(default=dict, blank=True)
    telemetry = models.JSONField(default=dict, blank=True)
    agent_version = models.CharField(max_length=256, blank=True)
    serving_url = models.CharField(max_length=256, blank=True)
    clock_offset_s = models.FloatField(default=0)
    dropped = models.JSONField(default=dict, blank=True)
    enrolled_at = models.DateTimeField()
    revoked_at = models.DateTimeField(null=True, blank=True)
    last_seen_at = models.DateTimeField(null=True, blank=True)
    next_check_in_due_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name

    def is_overdue(self, now: datetime) -> bool:
        """Whether the device missed the check-in that it was told to make."""
        return self.next_check_in_due_at is not None and now > self.next_check_in_due_at + OVERDUE_GRACE


class ApplicationKey(models.Model):
    """Lets an app rate the decisions of one application and of no other."""

    application = models.CharField(max_length=64, db_index=True)
    label = models.CharField(max_length=100)
    secret_sha256 = models.CharField(max_length=64, unique=True)
    created_at = models.DateTimeField()
    revoked_at = models.DateTimeField(null=True, blank=True)


class SigningKey(models.Model):
    """An Ed25519 key that signs desired documents; the newest that is not retired signs."""

    key_id = models.CharField(max_length=64, primary_key=True)
    private_key = models.BinaryField()
    public_key = models.BinaryField()
    created_at = models.DateTimeField()
    retired_at = models.DateTimeField(null=True, blank=True)


class AuditEntry(models.Model):
    """Who did what to which thing, and when."""

    at = models.DateTimeField(db_index=True)
    actor = models.CharField(max_length=150)
    verb = models.CharField(max_length=64)
    subject = models.CharField(max_length=150)
    detail = models.JSONField(default=dict, blank=True)
