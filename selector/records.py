"""The selector's words as JSON-able dicts and back, exactly. Decisions are logged as these; learning replays
them.

Floats survive because JSON writes the shortest text that reads back as the same double. Candidates of one
decision are stored as columns with each variant once: a decision over 200 actions stays small. Unknown fields
are ignored and missing ones take their defaults, so that old logs stay readable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from selector.errors import InvalidInput
from selector.interactions import (
    Action,
    Candidate,
    Configuration,
    Context,
    Interaction,
    Measurement,
    Prediction,
    Profile,
    Ranking,
    Variant,
)

Record = dict[str, Any]
Storable = (
    Variant | Configuration | Action | Profile | Context | Prediction | Candidate | Ranking | Measurement | Interaction
)


def as_record(value: Storable) -> Record:
    """The value as a dict that ``json.dumps`` writes exactly.

    >>> as_record(Configuration(4, 2, 1))
    {'max_batch': 4, 'max_concurrency': 2, 'threads': 1, 'controller': False}
    """
    return {name: _plain(name, getattr(value, name)) for name in _field_names(type(value))}


def variant_from_record(record: Mapping[str, Any]) -> Variant:
    """Raises InvalidInput naming a field that is missing or holds no list where one belongs, like all of these."""
    return Variant(**{**_known(Variant, record), "operators": _names("variant.operators", record.get("operators", ()))})


def configuration_from_record(record: Mapping[str, Any]) -> Configuration:
    """The configuration that ``as_record`` wrote."""
    return Configuration(**_known(Configuration, record))


def action_from_record(record: Mapping[str, Any]) -> Action:
    """The action that ``as_record`` wrote."""
    _known(Action, record)
    return Action(variant_from_record(record["variant"]), configuration_from_record(record["configuration"]))


def profile_from_record(record: Mapping[str, Any]) -> Profile:
    """The profile that ``as_record`` wrote."""
    return Profile(**_known(Profile, record))


def context_from_record(record: Mapping[str, Any]) -> Context:
    """The context that ``as_record`` wrote."""
    known = _known(Context, record)
    for name in ("cached_digests", "supported_operators", "unmeasured_digests"):
        known[name] = _names(f"context.{name}", record.get(name, ()))
    features = record.get("features", {})
    if not isinstance(features, Mapping):
        raise InvalidInput("context.features", "must be a mapping")
    return Context(**{**known, "features": dict(features)})


def prediction_from_record(record: Mapping[str, Any]) -> Prediction:
    """The prediction that ``as_record`` wrote."""
    return Prediction(**_known(Prediction, record))


def candidate_from_record(record: Mapping[str, Any]) -> Candidate:
    """The candidate that ``as_record`` wrote."""
    known = _known(Candidate, record)
    known["action"] = action_from_record(record["action"])
    known["prediction"] = prediction_from_record(record["prediction"])
    for name in ("hard_masks", "soft_masks"):
        known[name] = tuple(record.get(name, ()))
    return Candidate(**known)


def measurement_from_record(record: Mapping[str, Any]) -> Measurement:
    """The measurement that ``as_record`` wrote."""
    return Measurement(**_known(Measurement, record))


def ranking_from_record(record: Mapping[str, Any]) -> Ranking:
    """The ranking that ``as_record`` wrote."""
    known = _known(Ranking, record)
    revisions = dict(record.get("calibration_revisions", {}))
    return Ranking(
        **{
            **known,
            "candidates": candidates_from_record(record["candidates"]),
            "calibration_revisions": revisions,
        }
    )


def interaction_from_record(record: Mapping[str, Any]) -> Interaction:
    """The interaction that ``as_record`` wrote."""
    known = _known(Interaction, record)
    known["context"] = context_from_record(record["context"])
    known["candidates"] = candidates_from_record(record["candidates"])
    known["measurement"] = measurement_from_record(record["measurement"])
    return Interaction(**known)


def candidates_record(candidates: Sequence[Candidate]) -> Record:
    """Candidates as columns; variants and configurations once, referred to by position."""
    candidates = tuple(candidates)
    variants = list({id(each.action.variant): each.action.variant for each in candidates}.values())
    configurations = list(dict.fromkeys(each.action.configuration for each in candidates))
    variant_at = {id(variant): index for index, variant in enumerate(variants)}
    configuration_at = {configuration: index for index, configuration in enumerate(configurations)}
    return {
        "variants": [as_record(variant) for variant in variants],
        "configurations": [as_record(configuration) for configuration in configurations],
        "variant": [variant_at[id(each.action.variant)] for each in candidates],
        "configuration": [configuration_at[each.action.configuration] for each in candidates],
        "prediction": {
            name: [getattr(each.prediction, name) for each in candidates] for name in _field_names(Prediction)
        },
        "hard_masks": {str(index): list(each.hard_masks) for index, each in enumerate(candidates) if each.hard_masks},
        "soft_masks": {str(index): list(each.soft_masks) for index, each in enumerate(candidates) if each.soft_masks},
        "shortlisted": [index for index, each in enumerate(candidates) if each.shortlisted],
        "probability": [each.probability for each in candidates],
    }


def candidates_from_record(record: Mapping[str, Any]) -> tuple[Candidate, ...]:
    """The candidates that ``candidates_record`` wrote."""
    try:
        variants = [variant_from_record(each) for each in record["variants"]]
        configurations = [configuration_from_record(each) for each in record["configurations"]]
        listed = frozenset(record["shortlisted"])
        columns = {
            name: record["prediction"][name] for name in _field_names(Prediction) if name in record["prediction"]
        }
        rows = zip(record["variant"], record["configuration"], record["probability"], strict=True)
        return tuple(
            Candidate(
                action=Action(variants[variant], configurations[configuration]),
                prediction=Prediction(**{name: column[index] for name, column in columns.items()}),
                hard_masks=tuple(record["hard_masks"].get(str(index), ())),
                soft_masks=tuple(record["soft_masks"].get(str(index), ())),
                shortlisted=index in listed,
                probability=probability,
            )
            for index, (variant, configuration, probability) in enumerate(rows)
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput("candidates", f"is no candidate record: {error!r}") from error


def _plain(name: str, value: Any) -> Any:
    if name == "candidates":
        return candidates_record(value)
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (Variant, Configuration, Action, Context, Prediction, Measurement)):
        return as_record(value)
    return value


_KINDS: tuple[type[Any], ...] = (
    Variant, Configuration, Action, Profile, Context, Prediction, Candidate, Ranking, Measurement, Interaction
)  # fmt: skip
_NAMES = {kind.__name__: tuple(each.name for each in fields(kind)) for kind in _KINDS}
_REQUIRED = {
    kind.__name__: tuple(
        each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING
    )
    for kind in _KINDS
}


def _field_names(kind: type[Any]) -> tuple[str, ...]:
    return _NAMES[kind.__name__]


def _names(field: str, value: object) -> frozenset[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
        raise InvalidInput(field, "must be a list of strings")
    return frozenset(value)


def _known(kind: type[Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The record's fields that this kind has; InvalidInput if one without a default is missing."""
    if not isinstance(record, Mapping):
        raise InvalidInput(kind.__name__.lower(), "must be a mapping")
    for name in _REQUIRED[kind.__name__]:
        if name not in record:
            raise InvalidInput(f"{kind.__name__.lower()}.{name}", "is missing")
    return {name: record[name] for name in _field_names(kind) if name in record}
