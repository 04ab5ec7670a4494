"""Decides whether a desired document may be followed: signature, addressee, expiry and version. Follows nothing."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from datetime import datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from device_agents.errors import DesiredRefused
from device_agents.wire import DesiredState, Signature, SignedDesired, TrustedKey


def open_desired(
    signed: SignedDesired, *, trusted_keys: Iterable[TrustedKey], device_id: str, seen_version: int, now: datetime
) -> DesiredState:
    """The document inside, if any trusted key signed it and it is new, unexpired and for this device.

    Raises DesiredRefused with the reason. The signature is checked over the UTF-8 bytes of the text before
    anything in it is read.
    """
    document = signed.document.encode()
    keys = {key.key_id: key for key in trusted_keys}
    if not any(_is_valid(signature, document, keys.get(signature.key_id)) for signature in signed.signatures):
        raise DesiredRefused("no signature by a trusted key")
    try:
        state = DesiredState.model_validate_json(document)
    except ValidationError as error:
        raise DesiredRefused(f"the document cannot be read: {error.error_count()} problems") from error
    if state.device_id != device_id:
        raise DesiredRefused(f"the document is for device {state.device_id}")
    if state.version <= seen_version:
        raise DesiredRefused(f"version {state.version} is not above {seen_version}")
    if state.expires_at <= now:
        raise DesiredRefused(f"the document expired at {state.expires_at.isoformat()}")
    return state


def _is_valid(signature: Signature, document: bytes, key: TrustedKey | None) -> bool:
    if key is None:
        return False
    try:
        public_key = Ed25519PublicKey.from_public_bytes(base64.b64decode(key.public_key, validate=True))
        public_key.verify(base64.b64decode(signature.value, validate=True), document)
    except (InvalidSignature, ValueError, binascii.Error):
        return False
    return True
