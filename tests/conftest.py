"""What holds for all tests: the long stories start first, one after the other, while the rest runs beside them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.core.cache import cache


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    """What one test's database held must not be remembered in the next."""
    yield
    cache.clear()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """System stories share one worker: two of them at once would fight for the cores that they measure on."""
    stories = [item for item in items if "tests/system/" in item.nodeid]
    for story in stories:
        story.add_marker(pytest.mark.xdist_group("system"))
    items.sort(key=lambda item: item not in stories)
