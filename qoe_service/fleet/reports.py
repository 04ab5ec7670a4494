"""What a device says of itself at a check-in, kept on its row."""

from __future__ import annotations

from datetime import datetime, timedelta

from device_agents.wire import CheckIn
from qoe_service.fleet.models import Device


def record_check_in(*, device: Device, check_in: CheckIn, interval_s: float, now: datetime) -> None:
    """Telemetry, hardware, drops, clock offset, and when the device is due again."""
    device.telemetry = check_in.telemetry.model_dump(mode="json")
    device.dropped = dict(check_in.dropped)
    device.agent_version = check_in.agent_version or device.agent_version
    device.serving_url = check_in.serving_url
    device.clock_offset_s = _offset_s(check_in.sent_at, now)
    device.last_seen_at = now
    device.next_check_in_due_at = now + timedelta(seconds=interval_s)
    fields = [
        "telemetry",
        "dropped",
        "agent_version",
        "serving_url",
        "clock_offset_s",
        "last_seen_at",
        "next_check_in_due_at",
    ]
    if check_in.hardware is not None:
        device.hardware = check_in.hardware.model_dump(mode="json")
        fields.append("hardware")
    device.save(update_fields=fields)


def _offset_s(sent_at: datetime, now: datetime) -> float:
    # A clock without a zone is taken as UTC; refusing the check-in would keep such a device out for good.
    aware = sent_at if sent_at.tzinfo is not None else sent_at.replace(tzinfo=now.tzinfo)
    return (aware - now).total_seconds()
