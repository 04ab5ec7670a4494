"""A web process of its own, for what only shows over a real socket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.qoe_service.served import Served, serve


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The service under uvicorn with a database of its own, for the whole session."""
    with serve(tmp_path_factory.mktemp("served")) as running:
        yield running
