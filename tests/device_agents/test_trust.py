"""Trusted keys follow one another without enrolling again, and nobody brings an old one back."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_agents.agent import Agent
from device_agents.errors import KeysRefused, ServiceRefused
from device_agents.membership import Membership
from device_agents.trust import open_keys
from device_agents.wire import KeySet, SignedKeySet, TrustedKey
from tests.device_agents.conftest import MakeAgent
from tests.device_agents.fake_service import NOW, FakeService, desired, public_part, signed_by
from tests.device_agents.models import scaling

FIRST, SECOND, THIRD = (Ed25519PrivateKey.generate() for _ in range(3))
TWICE = scaling(2)


def key_set(version: int, *keys: TrustedKey) -> str:
    return KeySet(kind="key_set", version=version, issued_at=NOW, keys=keys).model_dump_json()


def signed_set(version: int, *keys: TrustedKey, by: Ed25519PrivateKey, key_id: str) -> SignedKeySet:
    text = key_set(version, *keys)
    return SignedKeySet(document=text, signatures=signed_by(by, text, key_id).signatures)


@pytest.fixture
def agent(make_agent: MakeAgent, service: FakeService) -> Agent:
    """Enrolled with a service whose only key is FIRST."""
    service.key = FIRST
    service.offer(TWICE)
    agent = make_agent()
    agent.enrol()
    return agent


def follows(
    agent: Agent, service: FakeService, decision_id: str, *, signed_with: tuple[Ed25519PrivateKey, str]
) -> bool:
    service.key, service.key_id = signed_with
    service.want(desired(TWICE, decision_id))
    seen = agent.store.seen_version()
    agent.poke(check_in=True, look_at_s=0)
    agent.work_once()
    return agent.store.seen_version() > seen


def test_a_key_follows_another_without_enrolling_again(agent: Agent, service: FakeService) -> None:
    assert not follows(agent, service, "d1", signed_with=(SECOND, "k2"))
    service.key_set = signed_set(2, public_part(FIRST), public_part(SECOND, "k2"), by=FIRST, key_id="k1")
    assert follows(agent, service, "d2", signed_with=(SECOND, "k2"))
    service.key_set = signed_set(3, public_part(SECOND, "k2"), by=SECOND, key_id="k2")
    agent.poke(check_in=True)
    agent.work_once()
    assert not follows(agent, service, "d3", signed_with=(FIRST, "k1"))
    assert follows(agent, service, "d4", signed_with=(SECOND, "k2"))
    assert service.check_ins[-1].keys_version == 3


def test_keys_outlive_a_restart(agent: Agent, service: FakeService, make_agent: MakeAgent) -> None:
    service.key_set = signed_set(2, public_part(SECOND, "k2"), by=FIRST, key_id="k1")
    agent.work_once()
    agent.stop()
    again = make_agent()
    assert not follows(again, service, "d1", signed_with=(FIRST, "k1"))
    assert follows(again, service, "d2", signed_with=(SECOND, "k2"))


@pytest.mark.parametrize(
    ("offered", "why"),
    [
        (signed_set(6, public_part(THIRD, "k3"), by=THIRD, key_id="k3"), "no signature by a trusted key"),
        (signed_set(6, public_part(THIRD, "k1"), by=THIRD, key_id="k1"), "no signature by a trusted key"),
        (signed_set(5, public_part(THIRD, "k3"), by=FIRST, key_id="k1"), "version 5 is not above 5"),
        (signed_set(4, public_part(THIRD, "k3"), by=FIRST, key_id="k1"), "version 4 is not above 5"),
        (SignedKeySet(document="{}", signatures=signed_by(FIRST, "{}").signatures), "cannot be read"),
        (SignedKeySet(document=key_set(6, public_part(THIRD, "k3"))), "no signature"),
    ],
)
def test_a_key_set_that_nobody_vouches_for_is_refused(offered: SignedKeySet, why: str) -> None:
    with pytest.raises(KeysRefused, match=why):
        open_keys(offered, trusted_keys=[public_part(FIRST)], seen_version=5)


def test_a_desired_document_is_no_key_set_although_the_same_key_signs_both(service: FakeService) -> None:
    text = service.document()
    offered = SignedKeySet(document=text, signatures=signed_by(FIRST, text).signatures)
    with pytest.raises(KeysRefused, match="cannot be read"):
        open_keys(offered, trusted_keys=[public_part(FIRST)], seen_version=0)


def test_a_credential_that_the_owner_replaced_is_taken_up_when_the_old_one_is_refused(
    agent: Agent, service: FakeService
) -> None:
    agent.boot()
    agent.start()
    service.wait_for("wake-up")
    kept = agent.store.identity()
    assert kept is not None
    agent.store.save_identity(kept.model_copy(update={"credential": "the-new-one"}))
    service.credential = "the-new-one"
    told = len(service.check_ins)
    service.clock_offset = timedelta(seconds=1)
    agent.poke(check_in=True)
    with service.told:
        assert service.told.wait_for(lambda: len(service.check_ins) > told, 10)
    assert service.requests[-1].headers["Authorization"] == "Bearer the-new-one"


def test_an_unreadable_credential_is_no_new_one_and_ends_nothing(agent: Agent) -> None:
    refused = ServiceRefused("revoked", http_status=401)
    path = agent.store.folder / "identity.json"
    path.unlink()
    path.mkdir()
    assert not Membership(agent.config, agent.store, agent.client).has_new_credential(refused)
