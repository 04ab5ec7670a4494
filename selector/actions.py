"""A list of actions as columns: what ranking needs of each action, read once and kept with the list."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selector.errors import InvalidInput
from selector.interactions import Action, Configuration, Variant
from selector.kept import Kept
from selector.queueing import Queues
from selector.validation import check_configuration, name, number

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class ActionTable:
    """Columns of shape (actions,). ``pair`` indexes ``pairs``: what shares a service time."""

    actions: tuple[Action, ...]
    keys: tuple[str, ...]
    position: dict[str, int]
    variants: tuple[Variant, ...]
    variant: Indices
    configurations: tuple[Configuration, ...]
    configuration: Indices
    pairs: tuple[tuple[int, int], ...]
    pair: Indices
    pair_digests: tuple[str, ...]
    configuration_keys: tuple[str, ...]
    accuracy: Floats
    size_bytes: Floats
    max_batch: Floats
    max_concurrency: Floats
    threads: Floats
    queues: Queues


def _read(actions: tuple[Action, ...]) -> ActionTable:
    """Raises InvalidInput for an action that stands twice or has impossible numbers."""
    for variant in {id(action.variant): action.variant for action in actions}.values():
        _check_variant(variant)
    keys = tuple(action.key for action in actions)
    position = {key: index for index, key in enumerate(keys)}
    if len(position) != len(keys):
        twice = next(key for index, key in enumerate(keys) if position[key] != index)
        raise InvalidInput("actions", f"must not name one action twice: {twice} (12 characters tell digests apart)")
    variants = {action.variant.digest: action.variant for action in actions}
    for action in actions:
        same = variants[action.variant.digest]
        if action.variant is not same and action.variant != same:
            raise InvalidInput("actions", f"must not describe one variant in two ways: {same.digest[:12]}")
    configurations = {action.configuration: None for action in actions}
    for configuration in configurations:
        check_configuration(configuration)
    variant_index = {digest: index for index, digest in enumerate(variants)}
    configuration_index = {configuration: index for index, configuration in enumerate(configurations)}
    of_pair = [(variant_index[action.variant.digest], action.configuration.threads) for action in actions]
    pair_index = {pair: index for index, pair in enumerate(dict.fromkeys(of_pair))}
    bounds = [action.configuration for action in actions]
    max_batch = np.array([each.max_batch for each in bounds], dtype=np.float64)
    max_concurrency = np.array([each.max_concurrency for each in bounds], dtype=np.float64)
    return ActionTable(
        actions=actions,
        keys=keys,
        position=position,
        variants=tuple(variants.values()),
        variant=np.array([variant for variant, _ in of_pair], dtype=np.intp),
        configurations=tuple(configurations),
        configuration=np.array([configuration_index[each] for each in bounds], dtype=np.intp),
        pairs=tuple(pair_index),
        pair=np.array([pair_index[pair] for pair in of_pair], dtype=np.intp),
        pair_digests=tuple(tuple(variants)[index] for index, _ in pair_index),
        configuration_keys=tuple(each.key for each in configurations),
        accuracy=np.array([action.variant.accuracy for action in actions], dtype=np.float64),
        size_bytes=np.array([action.variant.size_bytes for action in actions], dtype=np.float64),
        max_batch=max_batch,
        max_concurrency=max_concurrency,
        threads=np.array([each.threads for each in bounds], dtype=np.float64),
        queues=Queues(max_batch, max_concurrency),
    )


def _check_variant(variant: Variant) -> None:
    name("variant.digest", variant.digest)
    if not isinstance(variant.precision, str):
        raise InvalidInput("variant.precision", "must be a string")
    number("variant.accuracy", variant.accuracy, 0, 1)
    number("variant.size_bytes", variant.size_bytes, 0, 1e15)
    number("variant.memory_bytes", variant.memory_bytes, 0, 1e18)


action_table = Kept[Action, ActionTable](_read)
