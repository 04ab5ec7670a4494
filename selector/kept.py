"""Remembers what was read from a tuple for as long as the same tuple object is passed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
MOST_KEPT = 64


class Kept(Generic[Item, Read]):
    """Calls ``read`` once per tuple object; anything mutable is read every time.

    >>> lengths = Kept[int, int](len)
    >>> lengths((1, 2)), lengths([1, 2, 3])
    (2, 3)
    """

    def __init__(self, read: Callable[[tuple[Item, ...]], Read]) -> None:
        self._read = read
        self._kept: dict[int, tuple[Sequence[Item], Read]] = {}

    def __call__(self, items: Sequence[Item]) -> Read:
        """What ``read`` made of these items."""
        found = self._kept.get(id(items))
        if found is not None and found[0] is items:
            return found[1]
        made = self._read(tuple(items))
        if isinstance(items, tuple):
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            self._kept[id(items)] = items, made
        return made
