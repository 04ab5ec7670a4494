"""Rows of the log as the selector's interactions: whole for learning and replay, slim for evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from qoe_service.decisions.models import JoinedEvent
from selector.errors import InvalidInput
from selector.interactions import Action, Candidate, Context, Interaction, Prediction, Variant
from selector.records import (
    candidates_from_record,
    configuration_from_record,
    context_from_record,
    measurement_from_record,
)
from selector.validation import check_interaction

logger = logging.getLogger(__name__)


def interaction_of(event: JoinedEvent) -> Interaction:
    """The closed decision as it was recorded; raises the selector's InvalidInput for a record that cannot be read."""
    decision = event.decision
    return Interaction(
        decision_id=decision.pk,
        context=context_from_record(decision.context),
        candidates=candidates_from_record(decision.candidates),
        chosen=decision.chosen,
        measurement=measurement_from_record(event.measurement),
        reward=event.reward,
    )


def evidence_of(events: Iterable[JoinedEvent]) -> list[Interaction]:
    """What valuing references needs of these events and no more; records that cannot be read are left out."""
    found = []
    for event in events:
        try:
            slim = _slim(event)
            check_interaction(slim)
            found.append(slim)
        except (InvalidInput, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            logger.warning("event not evaluated decision_id=%s reason=%r", event.decision_id, error)
    return found


def _slim(event: JoinedEvent) -> Interaction:
    """Only feasible candidates, and of each only its action, probability and predicted QoE."""
    decision, record = event.decision, event.decision.candidates
    open_ones = [index for index in range(len(record["variant"])) if str(index) not in record["hard_masks"]]
    actions = _actions_of(record)
    shares, qoe = record["probability"], record["prediction"]["qoe"]
    return Interaction(
        decision_id=decision.pk,
        context=Context(
            device=decision.device_id,
            device_class=decision.context["device_class"],
            application=decision.application_id,
            arrival_rate_rps=decision.context["arrival_rate_rps"],
            slo_p95_ms=decision.context["slo_p95_ms"],
        ),
        candidates=tuple(
            Candidate(actions[index], _expecting(qoe[index]), probability=shares[index]) for index in open_ones
        ),
        chosen=open_ones.index(decision.chosen),
        measurement=measurement_from_record(event.measurement),
        reward=event.reward,
    )


def _actions_of(record: dict[str, Any]) -> tuple[Action, ...]:
    return _actions(
        tuple((each["digest"], each["name"], each["size_bytes"], each["accuracy"]) for each in record["variants"]),
        tuple(tuple(each.items()) for each in record["configurations"]),
        tuple(record["variant"]),
        tuple(record["configuration"]),
    )


@lru_cache(maxsize=1024)
def _actions(
    variants: tuple[tuple[str, str, int, float], ...],
    configurations: tuple[tuple[tuple[str, Any], ...], ...],
    variant_at: tuple[int, ...],
    configuration_at: tuple[int, ...],
) -> tuple[Action, ...]:
    """The same objects for all decisions over the same actions: logs are long, actions change seldom."""
    whole = [Variant(*each) for each in variants]
    bounds = [configuration_from_record(dict(each)) for each in configurations]
    pairs = zip(variant_at, configuration_at, strict=True)
    return tuple(Action(whole[variant], bounds[configuration]) for variant, configuration in pairs)


@lru_cache(maxsize=65_536)
def _expecting(qoe: float) -> Prediction:
    return Prediction(
        p50_ms=0.0,
        p95_ms=0.0,
        log_sd=0.0,
        cpu_ms_per_request=0.0,
        slo_violation_probability=0.0,
        qoe=qoe,
        service_ms=0.0,
    )
