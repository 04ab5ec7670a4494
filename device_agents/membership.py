"""Who this device is to its service: enrolment, its credential, and the keys that it trusts. All of it is on disk."""

from __future__ import annotations

import logging

from device_agents.client import ServiceClient
from device_agents.config import AgentConfig
from device_agents.errors import AgentError, BadConfiguration, KeysRefused, ServiceRefused
from device_agents.store import Identity, Store
from device_agents.trust import open_keys
from device_agents.version import agent_version
from device_agents.wire import EnrolmentRequest, Hardware, SignedKeySet

logger = logging.getLogger("qoe_agent.membership")


class Membership:
    """Keeps the identity in the store and in the client the same."""

    def __init__(self, config: AgentConfig, store: Store, client: ServiceClient) -> None:
        self._config = config
        self._store = store
        self._client = client

    @property
    def identity(self) -> Identity | None:
        """Who this device is; None before enrolment."""
        return self._client.identity

    def enrol(self, hardware: Hardware) -> bool:
        """Trades the configured token for a credential and keeps it; whether the device is another than before.

        Raises BadConfiguration without a token, ServiceRefused or ServiceUnreachable.
        """
        if not self._config.token:
            raise BadConfiguration("this device is not enrolled: give --token once")
        reply = self._client.enrol(
            EnrolmentRequest(
                token=self._config.token,
                name=self._config.name,
                device_class=self._config.device_class,
                agent_version=agent_version(),
                hardware=hardware,
                labels=self._config.labels,
            )
        )
        known = self._store.identity()
        is_another = known is None or known.device_id != reply.device_id
        if is_another:
            self._store.forget_device()
        self._keep(
            Identity(
                service_url=self._config.service_url,
                device_id=reply.device_id,
                credential=reply.credential,
                trusted_keys=reply.trusted_keys,
                keys_version=reply.keys_version,
            )
        )
        logger.info("enrolled device=%s name=%s", reply.device_id, self._config.name)
        return is_another

    def trust(self, signed: SignedKeySet) -> None:
        """Keys that a trusted key vouches for replace those that were trusted; the credential stays."""
        identity = self.identity
        assert identity is not None, "only an enrolled device hears of keys"
        try:
            found = open_keys(signed, trusted_keys=identity.trusted_keys, seen_version=identity.keys_version)
        except KeysRefused as error:
            logger.warning("key set refused reason=%r", error.reason)
            return
        kept = self._store.identity() or identity  # the owner may have put another credential there meanwhile
        self._keep(kept.model_copy(update={"trusted_keys": found.keys, "keys_version": found.version}))
        logger.info("trusts keys=%s version=%d", ",".join(key.key_id for key in found.keys), found.version)

    def has_new_credential(self, error: AgentError) -> bool:
        """Whether the owner replaced a credential that the service no longer takes; it is used from now on."""
        known = self.identity
        if known is None or not isinstance(error, ServiceRefused) or error.http_status != 401:
            return False
        try:
            kept = self._store.identity()
        except BadConfiguration as unreadable:
            logger.error("no other credential reason=%r", unreadable.reason)
            return False
        if kept is None or kept.credential == known.credential:
            return False
        self._client.identity = known.model_copy(update={"credential": kept.credential})
        logger.info("goes on with the credential that was put into the state folder")
        return True

    def _keep(self, identity: Identity) -> None:
        self._store.save_identity(identity)
        self._client.identity = identity
