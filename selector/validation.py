"""What a value must satisfy before any model sees it. One inf poisons a learner for good, so nothing is let
through."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from selector.errors import InvalidInput
from selector.interactions import Candidate, Configuration, Context, Interaction, Measurement, Prediction, Profile

LONGEST_NAME = 512


def number(field: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """The value as a finite float in [low, high].

    >>> number("rating", 1, 0, 1)
    1.0
    """
    if type(value) is float and low <= value <= high and math.isfinite(value):  # the usual case
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidInput(field, f"must be a number, is {type(value).__name__}")
    try:
        found = float(value)
    except OverflowError as error:
        raise InvalidInput(field, "must be finite, is an integer that no double can hold") from error
    if not math.isfinite(found):
        raise InvalidInput(field, f"must be finite, is {found}")
    if not low <= found <= high:
        raise InvalidInput(field, f"must be between {low:g} and {high:g}, is {found:g}")
    return found


def whole(field: str, value: object, low: int, high: int) -> int:
    """The value if it is an integer in [low, high].

    >>> whole("threads", 4, 1, 64)
    4
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInput(field, f"must be an integer, is {type(value).__name__}")
    number(field, value, low, high)
    return value


def name(field: str, value: object) -> str:
    """The value as a non-empty string of bounded length that can be written as UTF-8."""
    if not isinstance(value, str) or not value or len(value) > LONGEST_NAME:
        raise InvalidInput(field, f"must be a non-empty string of at most {LONGEST_NAME} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(field, "must not hold half of a surrogate pair") from error
    return value


def check_context(context: Context) -> None:
    """Raise InvalidInput naming the first field of the context that cannot be used."""
    if not isinstance(context, Context):
        raise InvalidInput("context", "must be a Context")
    for field in ("device", "device_class", "application"):
        name(f"context.{field}", getattr(context, field))
    number("context.arrival_rate_rps", context.arrival_rate_rps, 0, 1e9)
    number("context.slo_p95_ms", context.slo_p95_ms, 1e-6, 1e12)
    number("context.minimum_accuracy", context.minimum_accuracy, 0, 1)
    number("context.cores", context.cores, 1, 1e6)
    number("context.memory_free_bytes", context.memory_free_bytes, 0, 1e18)
    number("context.cpu_load_share", context.cpu_load_share, 0, 1)
    _check_names(context)
    for key, value in context.features.items():
        name("context.features", key)
        if isinstance(value, str):
            if len(value) > LONGEST_NAME:
                raise InvalidInput(f"context.features.{key}", f"is longer than {LONGEST_NAME} characters")
        else:
            number(f"context.features.{key}", value)


def check_configuration(configuration: Configuration) -> None:
    """Raise InvalidInput naming the first bound that no device can run within."""
    for field in ("max_batch", "max_concurrency", "threads"):
        whole(f"configuration.{field}", getattr(configuration, field), 1, 1_000_000)


def _check_names(context: Context) -> None:
    """What holds names is of the kind that holds names."""
    for field in ("incumbent", "baseline"):
        if not isinstance(getattr(context, field), str | None):
            raise InvalidInput(f"context.{field}", "must be an action key or None")
    for field in ("cached_digests", "supported_operators", "unmeasured_digests"):
        if not isinstance(getattr(context, field), frozenset | set):
            raise InvalidInput(f"context.{field}", "must be a set")
    if not isinstance(context.features, Mapping):
        raise InvalidInput("context.features", "must be a mapping")


def check_profiles(profiles: Sequence[Profile]) -> None:
    """Raise InvalidInput naming the first profile that is no measurement, or that stands for what an earlier one
    does."""
    seen: set[tuple[str, str, int]] = set()
    for position, profile in enumerate(profiles):
        field = f"profiles[{position}]"
        name(f"{field}.digest", profile.digest)
        number(f"{field}.threads", profile.threads, 1, 1e6)
        number(f"{field}.a_ms", profile.a_ms, 0, 1e12)
        number(f"{field}.b_ms", profile.b_ms, 0, 1e12)
        number(f"{field}.memory_bytes", profile.memory_bytes, 0, 1e18)
        if profile.source not in ("device", "class", "server"):
            raise InvalidInput(f"{field}.source", "must be device, class or server")
        if profile.a_ms + profile.b_ms <= 0:
            raise InvalidInput(f"{field}.a_ms", "must be positive together with b_ms")
        measured = profile.source, profile.digest, profile.threads
        if measured in seen:
            raise InvalidInput(field, "must not name source, variant and threads of an earlier one")
        seen.add(measured)


def check_measurement(measurement: Measurement) -> None:
    """Raise InvalidInput naming the first component that cannot have been measured."""
    if not isinstance(measurement, Measurement):
        raise InvalidInput("measurement", "must be a Measurement")
    number("measurement.requests", measurement.requests, 0, 1e15)
    number("measurement.errors", measurement.errors, 0, 1e15)
    number("measurement.ratings", measurement.ratings, 0, 1e15)
    number("measurement.download_bytes", measurement.download_bytes, 0, 1e18)
    for field in ("p50_ms", "p95_ms", "cpu_ms_per_request", "service_ms", "batch_mean"):
        value = getattr(measurement, field)
        if value is not None:
            number(f"measurement.{field}", value, 0, 1e12)
    for field in ("slo_hit_share", "accuracy", "rating"):
        value = getattr(measurement, field)
        if value is not None:
            number(f"measurement.{field}", value, 0, 1)
    if not isinstance(measurement.failed, bool):
        raise InvalidInput("measurement.failed", "must be true or false")


def check_candidates(candidates: Sequence[Candidate]) -> None:
    """Raise InvalidInput if there is no candidate, one stands twice, or a prediction is not a finite
    number."""
    if not candidates:
        raise InvalidInput("candidates", "must not be empty")
    if len({candidate.action.key for candidate in candidates}) != len(candidates):
        raise InvalidInput("candidates", "must not name one action twice")
    for position, candidate in enumerate(candidates):
        check_prediction(candidate, f"candidates[{position}]")


def check_prediction(candidate: Candidate, field: str) -> None:
    """Raise InvalidInput unless every number that a learner reads of this candidate is finite and in
    range."""
    prediction = candidate.prediction
    if _is_sound(prediction, candidate.action.variant.accuracy):
        return
    number(f"{field}.prediction.qoe", prediction.qoe, -1e6, 1e6)
    number(f"{field}.prediction.slo_hit_share", prediction.slo_hit_share, 0, 1)
    number(f"{field}.prediction.slo_violation_probability", prediction.slo_violation_probability, 0, 1)
    number(f"{field}.action.variant.accuracy", candidate.action.variant.accuracy, 0, 1)
    for part in ("p50_ms", "p95_ms", "log_sd", "cpu_ms_per_request", "service_ms", "batch"):
        number(f"{field}.prediction.{part}", getattr(prediction, part), 0, 1e15)
    for part in ("raw_a_ms", "raw_b_ms", "raw_cpu_ms"):
        number(f"{field}.prediction.{part}", getattr(prediction, part), 0, 1e15)
    number(f"{field}.prediction.bonus", prediction.bonus, -1e6, 1e6)
    number(f"{field}.prediction.held_back", prediction.held_back, 1, 1e9)


def _is_sound(prediction: Prediction, accuracy: float) -> bool:
    """The same in one expression, for the usual case: nothing to complain about. NaN fails every comparison."""
    try:
        return (
            -1e6 <= prediction.qoe <= 1e6
            and 0 <= prediction.slo_hit_share <= 1
            and 0 <= prediction.slo_violation_probability <= 1
            and 0 <= accuracy <= 1
            and 0 <= prediction.p50_ms <= 1e15
            and 0 <= prediction.p95_ms <= 1e15
            and 0 <= prediction.log_sd <= 1e15
            and 0 <= prediction.cpu_ms_per_request <= 1e15
            and 0 <= prediction.service_ms <= 1e15
            and 0 <= prediction.batch <= 1e15
            and 0 <= prediction.raw_a_ms <= 1e15
            and 0 <= prediction.raw_b_ms <= 1e15
            and 0 <= prediction.raw_cpu_ms <= 1e15
            and -1e6 <= prediction.bonus <= 1e6
            and 1 <= prediction.held_back <= 1e9
        )
    except TypeError:
        return False


def check_interaction(interaction: Interaction) -> None:
    """Raise InvalidInput unless a learner may see the interaction: only what was chosen is looked at in
    full."""
    name("decision_id", interaction.decision_id)
    check_context(interaction.context)
    if isinstance(interaction.chosen, bool) or not isinstance(interaction.chosen, int):
        raise InvalidInput("chosen", "must be an integer")
    if not 0 <= interaction.chosen < len(interaction.candidates):
        raise InvalidInput("chosen", f"must be an index into {len(interaction.candidates)} candidates")
    number("propensity", interaction.propensity, 0, 1)
    if interaction.propensity <= 0:
        raise InvalidInput("propensity", "must be above 0")
    number("reward", interaction.reward, 0, 1)
    chosen = interaction.candidates[interaction.chosen]
    if not chosen.is_feasible:
        raise InvalidInput("candidates[chosen].hard_masks", "must be empty: such an action is never taken")
    check_prediction(chosen, "candidates[chosen]")
    check_configuration(chosen.action.configuration)
    check_measurement(interaction.measurement)
