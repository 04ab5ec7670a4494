"""Everything that can go wrong on the device, as one tree. Each error carries the decision that its catcher takes.

``permanent`` says that trying the same thing again cannot help; ``outcome`` is what an update attempt reports;
``status`` is what the local inference server answers.
"""

from __future__ import annotations

from device_agents.wire import Outcome


class AgentError(Exception):
    """Base of all errors of the agent."""

    code = "agent_error"
    status = 500
    permanent = True

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BadConfiguration(AgentError):
    """A setting is missing or wrong; only the device's owner can mend it."""

    code = "bad_configuration"


class ServiceUnreachable(AgentError):
    """No answer, or none that could be understood: the last good state stays, and the agent comes back later."""

    code = "service_unreachable"
    permanent = False


class ServiceRefused(AgentError):
    """The service answered with an error. 4xx is terminal for this action, except where it says to come back."""

    code = "service_refused"

    def __init__(self, reason: str, *, http_status: int, retry_after_s: float | None = None) -> None:
        super().__init__(f"{http_status}: {reason}")
        self.http_status = http_status
        self.retry_after_s = retry_after_s
        self.permanent = 400 <= http_status < 500 and http_status not in {408, 425, 429}


class DesiredRefused(AgentError):
    """A desired document that must not be followed: forged, expired, replayed or another device's."""

    code = "desired_refused"


class KeysRefused(AgentError):
    """A set of keys that must not be trusted: signed by no trusted key, or not newer than the known one."""

    code = "keys_refused"


class AttemptFailed(AgentError):
    """An attempt to follow a decision ended; ``outcome`` tells the service how."""

    code = "attempt_failed"

    def __init__(self, reason: str, *, outcome: Outcome) -> None:
        super().__init__(reason)
        self.outcome = outcome


class Superseded(AgentError):
    """A newer order, or the end of the process, overtook what was under way."""

    code = "superseded"


class BadRequest(AgentError):
    """A request to the local server that cannot be served as it is."""

    code = "bad_request"
    status = 400


class NotFound(AgentError):
    """No such model, version or endpoint."""

    code = "not_found"
    status = 404


class BodyTooLarge(AgentError):
    """The request is larger than the configured limit."""

    code = "body_too_large"
    status = 413


class Overloaded(AgentError):
    """The request was shed, or no model is ready yet: come back after ``retry_after_s``."""

    code = "overloaded"
    status = 503
    permanent = False

    def __init__(self, reason: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class RunFailed(AgentError):
    """The runtime failed on this request; the model keeps serving others."""

    code = "run_failed"
