"""Every test has an artifact folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_django import Settings

QUICK_PROFILER = """
print('{"digest": "%064d", "threads": 1, "a_ms": 2, "b_ms": 0.5, "memory_bytes": 4096}' % 0)
"""


@pytest.fixture(autouse=True)
def artifact_folder(settings: Settings, tmp_path: Path) -> Path:
    settings.ARTIFACT_DIR = tmp_path / "artifacts"
    return tmp_path / "artifacts"


@pytest.fixture(autouse=True, scope="session")
def static_folder() -> None:
    """The static files' middleware warns when its folder is missing, and warnings are errors."""
    from django.conf import settings  # noqa: PLC0415 - not before pytest-django has chosen the settings

    Path(settings.STATIC_ROOT).mkdir(parents=True, exist_ok=True)


@pytest.fixture
def quick_profiler(settings: Settings, tmp_path: Path) -> None:
    """In place of the agent's command, which takes a second: a program that gives the same kind of answer at once."""
    package = tmp_path / "base" / "device_agents"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(QUICK_PROFILER)
    settings.BASE_DIR = tmp_path / "base"
