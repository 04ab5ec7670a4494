"""Who may tell this device what to do: Ed25519 signatures over exact text, and how one set of keys follows another."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from device_agents.errors import KeysRefused
from device_agents.wire import KeySet, Signature, SignedKeySet, TrustedKey


def is_signed(document: str, signatures: Iterable[Signature], *, trusted_keys: Iterable[TrustedKey]) -> bool:
    """Whether any trusted key signed the UTF-8 bytes of the text."""
    message, keys = document.encode(), {key.key_id: key for key in trusted_keys}
    return any(_is_valid(signature, message, keys.get(signature.key_id)) for signature in signatures)


def open_keys(signed: SignedKeySet, *, trusted_keys: Iterable[TrustedKey], seen_version: int) -> KeySet:
    """The keys to trust from now on, if a key that is trusted now signed them and they are newer.

    Raises KeysRefused with the reason. A set that lost a key ends the trust in it; older sets cannot bring it back.
    """
    if not is_signed(signed.document, signed.signatures, trusted_keys=trusted_keys):
        raise KeysRefused("no signature by a trusted key")
    try:
        found = KeySet.model_validate_json(signed.document)
    except ValidationError as error:
        raise KeysRefused(f"the key set cannot be read: {error.error_count()} problems") from error
    if found.version <= seen_version:
        raise KeysRefused(f"version {found.version} is not above {seen_version}")
    return found


def _is_valid(signature: Signature, message: bytes, key: TrustedKey | None) -> bool:
    if key is None:
        return False
    try:
        public_key = Ed25519PublicKey.from_public_bytes(base64.b64decode(key.public_key, validate=True))
        public_key.verify(base64.b64decode(signature.value, validate=True), message)
    except (InvalidSignature, ValueError, binascii.Error):
        return False
    return True
