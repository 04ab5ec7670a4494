"""Everything that the selector raises on purpose, as one small tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class SelectorError(Exception):
    """Root of the tree. ``code`` is stable and fit for an API answer; trying again with the same input cannot
    help."""

    code = "selector_error"
    permanent = True


class InvalidInput(SelectorError):
    """A value that must not reach a model. Nothing was changed.

    >>> str(InvalidInput("measurement.p95_ms", "must be finite, is nan"))
    'measurement.p95_ms must be finite, is nan'
    """

    code = "invalid_input"

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field} {detail}")
        self.field = field
        self.detail = detail


class CorruptPolicy(SelectorError):
    """Policy bytes that are truncated, altered, of another kind, or that do not predict what they should."""

    code = "corrupt_policy"


class CorruptTable(SelectorError):
    """A table that comes with the library is missing, truncated or of another shape."""

    code = "corrupt_table"


class PolicyFailure(SelectorError):
    """A policy returned no distribution over its candidates: fall back to the baseline."""

    code = "policy_failure"


class NoFeasibleAction(SelectorError):
    """Every action is forbidden. ``reasons`` maps each action key to its hard masks; empty if there was no
    action."""

    code = "no_feasible_action"

    def __init__(self, reasons: Mapping[str, Sequence[str]]) -> None:
        masks = sorted({mask for each in reasons.values() for mask in each})
        super().__init__(f"no feasible action among {len(reasons)}" + (f": {', '.join(masks)}" if masks else ""))
        self.reasons = {key: tuple(value) for key, value in reasons.items()}
