"""What answers requests: a loaded variant under one decision, and an answer that it gave."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from device_agents.control import CONTROLLER_VERSION
from device_agents.lease import Answered, LeaseAccount
from device_agents.runtime import Array, Session
from device_agents.wire import ServingConfiguration


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A loaded variant under one decision: what a request is answered by, and whom it is accounted to."""

    session: Session
    configuration: ServingConfiguration
    digest: str
    decision_id: str | None
    account: LeaseAccount
    started_s: float
    lease_s: float = math.inf

    @property
    def controller_version(self) -> str:
        """Which controller moves inside the configuration's bounds; empty where it is off."""
        return CONTROLLER_VERSION if self.configuration.controller else ""


class Answer(NamedTuple):
    """Outputs of one request, the model that made them, and what it cost."""

    outputs: dict[str, Array]
    served: ServedModel
    cost: Answered
