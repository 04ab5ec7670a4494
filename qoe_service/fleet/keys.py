"""Keys of apps, which rate one application's decisions, and the Ed25519 keys that sign desired documents."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterable
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from django.core.cache import cache
from django.db import transaction
from django.db.models import Count

from device_agents.wire import KeySet, Signature, SignedKeySet, TrustedKey
from qoe_service.errors import NotAuthenticated, NotFound
from qoe_service.fleet import audit
from qoe_service.fleet.models import ApplicationKey, SigningKey
from qoe_service.fleet.secrets import is_same, new_secret, sha256_of

# What was read within the present second is forgotten after so long.
REMEMBERED_S = 2.0


def issue_application_key(*, application: str, label: str, actor: str, now: datetime) -> str:
    """A new key for apps of one application; shown this once."""
    secret = new_secret("qoe_app")
    with transaction.atomic():
        key = ApplicationKey.objects.create(
            application=application, label=label, secret_sha256=sha256_of(secret), created_at=now
        )
        audit.record(actor=actor, verb="issue_key", subject=f"application-key:{key.pk}", now=now)
    return secret


def authenticate_application(*, secret: str) -> ApplicationKey:
    """The application key with this secret, unless it is revoked."""
    stored = sha256_of(secret)
    key = ApplicationKey.objects.filter(secret_sha256=stored).first()
    if key is None or not is_same(key.secret_sha256, stored) or key.revoked_at is not None:
        raise NotAuthenticated("unknown or revoked application key")
    return key


def revoke_application_key(*, key_id: int, actor: str, now: datetime) -> None:
    """Refuse the key from now on. Revoking twice changes nothing."""
    with transaction.atomic():
        if ApplicationKey.objects.filter(pk=key_id, revoked_at=None).update(revoked_at=now):
            audit.record(actor=actor, verb="revoke_key", subject=f"application-key:{key_id}", now=now)
        elif not ApplicationKey.objects.filter(pk=key_id).exists():
            raise NotFound(f"no application key {key_id}", field="key_id")


def create_signing_key(*, actor: str, now: datetime) -> SigningKey:
    """A further key that signs. Devices learn of it at their next check-in; older keys sign on until they retire."""
    private = Ed25519PrivateKey.generate()
    with transaction.atomic():
        key = SigningKey.objects.create(
            key_id=f"k-{uuid.uuid4().hex[:16]}",
            private_key=private.private_bytes_raw(),
            public_key=private.public_key().public_bytes_raw(),
            created_at=now,
        )
        audit.record(actor=actor, verb="create_signing_key", subject=f"signing-key:{key.key_id}", now=now)
    cache.delete(_place(now))
    return key


def retire_signing_key(*, key_id: str, actor: str, now: datetime) -> None:
    """Sign desired documents with it no more. Devices end their trust in it at their next check-in.

    It still vouches for the keys that came after it, so that a device that was away all the time finds its way.
    """
    with transaction.atomic():
        if SigningKey.objects.filter(key_id=key_id, retired_at=None).update(retired_at=now):
            audit.record(actor=actor, verb="retire_signing_key", subject=f"signing-key:{key_id}", now=now)
        elif not SigningKey.objects.filter(key_id=key_id).exists():
            raise NotFound(f"no signing key {key_id}", field="key_id")
    cache.delete(_place(now))


def signing_keys(*, now: datetime) -> list[SigningKey]:
    """The keys in use, newest first; the first one is made when it is first needed."""
    in_use = list(SigningKey.objects.filter(retired_at=None).order_by("-created_at", "key_id"))
    return in_use or [create_signing_key(actor="service", now=now)]


def trusted_keys(*, now: datetime) -> tuple[TrustedKey, ...]:
    """What a device needs to check signatures."""
    return tuple(
        TrustedKey(key_id=key.key_id, public_key=base64.b64encode(bytes(key.public_key)).decode())
        for key in signing_keys(now=now)
    )


def keys_version() -> int:
    """The version of the set of keys in use: every key that is made or retired makes it greater by one."""
    counted = SigningKey.objects.aggregate(made=Count("pk"), retired=Count("retired_at"))
    return int(counted["made"] + counted["retired"])


def newer_keys(*, known_version: int | None, now: datetime) -> SignedKeySet | None:
    """The set of keys in use for a device that knows an older one. None: it is up to date, or follows no rotation.

    Every key signs it that ever was in use: whoever holds a retired key can deceive a device that still trusts it
    anyway, and by no other way does that device ever end its trust.
    """
    if known_version is None or known_version >= keys_version():
        return None
    keys = trusted_keys(now=now)
    text = KeySet(kind="key_set", version=keys_version(), issued_at=now, keys=keys).model_dump_json()
    return SignedKeySet(document=text, signatures=_signatures(text, SigningKey.objects.order_by("-created_at")))


def sign(*, text: str, now: datetime) -> tuple[Signature, ...]:
    """One signature by each key in use, so that a device finds one it trusts while keys rotate.

    A fleet may ask for hundreds of signatures a second, so the keys are read once in each: what another process makes
    or retires counts so much later.
    """
    in_use: list[SigningKey] | None = cache.get(_place(now))
    if in_use is None:
        in_use = signing_keys(now=now)
        cache.set(_place(now), in_use, REMEMBERED_S)
    return _signatures(text, in_use)


def _place(now: datetime) -> str:
    return f"signing-keys:{int(now.timestamp())}"


def _signatures(text: str, keys: Iterable[SigningKey]) -> tuple[Signature, ...]:
    message = text.encode()
    return tuple(
        Signature(key_id=key.key_id, value=base64.b64encode(_private(key).sign(message)).decode()) for key in keys
    )


def _private(key: SigningKey) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(key.private_key))
