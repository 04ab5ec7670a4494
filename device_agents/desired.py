"""Decides whether a desired document may be followed: signature, addressee, expiry and version. Follows nothing."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from pydantic import ValidationError

from device_agents.errors import DesiredRefused
from device_agents.trust import is_signed
from device_agents.wire import DesiredState, SignedDesired, TrustedKey


def open_desired(
    signed: SignedDesired, *, trusted_keys: Iterable[TrustedKey], device_id: str, seen_version: int, now: datetime
) -> DesiredState:
    """The document inside, if any trusted key signed it and it is new, unexpired and for this device.

    Raises DesiredRefused with the reason. The signature is checked over the UTF-8 bytes of the text before
    anything in it is read.
    """
    if not is_signed(signed.document, signed.signatures, trusted_keys=trusted_keys):
        raise DesiredRefused("no signature by a trusted key")
    try:
        state = DesiredState.model_validate_json(signed.document)
    except ValidationError as error:
        raise DesiredRefused(f"the document cannot be read: {error.error_count()} problems") from error
    if state.device_id != device_id:
        raise DesiredRefused(f"the document is for device {state.device_id}")
    if state.version <= seen_version:
        raise DesiredRefused(f"version {state.version} is not above {seen_version}")
    if state.expires_at <= now:
        raise DesiredRefused(f"the document expired at {state.expires_at.isoformat()}")
    return state
