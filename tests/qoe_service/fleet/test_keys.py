from __future__ import annotations

import base64
from datetime import timedelta

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pytest_django import DjangoAssertNumQueries

from device_agents.wire import KeySet, Signature, TrustedKey
from qoe_service.errors import NotAuthenticated
from qoe_service.fleet import keys
from tests.builders import NOW

pytestmark = pytest.mark.django_db


def is_valid(key: TrustedKey, signatures: tuple[Signature, ...], text: str) -> bool:
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(key.public_key))
    [signature] = [each for each in signatures if each.key_id == key.key_id]
    try:
        public.verify(base64.b64decode(signature.value), text.encode())
    except InvalidSignature:
        return False
    return True


def test_what_is_signed_is_checked_with_the_trusted_key() -> None:
    signatures = keys.sign(text="dokument – v7", now=NOW)
    [key] = keys.trusted_keys(now=NOW)
    assert is_valid(key, signatures, "dokument – v7")
    assert not is_valid(key, signatures, "dokument – v8")


def test_while_keys_rotate_a_device_that_knows_only_the_old_one_still_trusts() -> None:
    [old] = keys.trusted_keys(now=NOW)
    new = keys.create_signing_key(actor="anna", now=NOW)
    assert is_valid(old, keys.sign(text="x", now=NOW), "x")
    assert len(keys.trusted_keys(now=NOW)) == 2
    keys.retire_signing_key(key_id=old.key_id, actor="anna", now=NOW)
    assert [each.key_id for each in keys.sign(text="x", now=NOW)] == [new.key_id]


def test_a_fleet_that_looks_at_once_is_signed_for_without_a_look_at_the_keys_each_time(
    django_assert_num_queries: DjangoAssertNumQueries,
) -> None:
    keys.create_signing_key(actor="anna", now=NOW)
    first = keys.sign(text="x", now=NOW)
    with django_assert_num_queries(0):
        assert keys.sign(text="x", now=NOW) == first


def test_a_key_that_another_process_made_signs_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys.sign(text="x", now=NOW)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("django.core.cache.cache.delete", lambda _: True)
        keys.create_signing_key(actor="anna", now=NOW)
    assert keys.sign(text="x", now=NOW) == before
    assert len(keys.sign(text="x", now=NOW + timedelta(seconds=1))) == 2


def test_a_device_learns_of_newer_keys_and_one_that_missed_several_changes_does_too() -> None:
    [first] = keys.trusted_keys(now=NOW)
    known = keys.keys_version()
    assert keys.newer_keys(known_version=known, now=NOW) is None
    assert keys.newer_keys(known_version=None, now=NOW) is None
    second = keys.create_signing_key(actor="anna", now=NOW)
    keys.retire_signing_key(key_id=first.key_id, actor="anna", now=NOW)
    third = keys.create_signing_key(actor="anna", now=NOW)
    keys.retire_signing_key(key_id=second.key_id, actor="anna", now=NOW)
    newer = keys.newer_keys(known_version=known, now=NOW)
    assert newer is not None
    assert is_valid(first, newer.signatures, newer.document)
    found = KeySet.model_validate_json(newer.document)
    assert [key.key_id for key in found.keys] == [third.key_id]
    assert found.version > known
    assert keys.newer_keys(known_version=found.version, now=NOW) is None


def test_an_application_key_is_known_by_its_secret_until_it_is_revoked() -> None:
    secret = keys.issue_application_key(application="digits", label="app", actor="anna", now=NOW)
    key = keys.authenticate_application(secret=secret)
    assert key.application == "digits"
    assert secret not in str(vars(key))
    keys.revoke_application_key(key_id=key.pk, actor="anna", now=NOW)
    with pytest.raises(NotAuthenticated):
        keys.authenticate_application(secret=secret)
