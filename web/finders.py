"""Serves plotly's own bundled script from the installed package, so that no copy of it lives in this repository."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from django.contrib.staticfiles.finders import BaseFinder
from django.core.files.storage import FileSystemStorage, Storage

PREFIX = "plotly"
SCRIPT = "plotly.min.js"


class PlotlyFinder(BaseFinder):
    """Finds ``plotly/plotly.min.js`` and nothing else of the package."""

    def __init__(self, *_: Any, **__: Any) -> None:
        spec = find_spec("plotly")
        folders = spec.submodule_search_locations if spec else None
        self._folder = Path(next(iter(folders or ["."]))) / "package_data"

    def find(self, path: str, find_all: bool = False, **_: Any) -> Any:
        """Where the script lies, if ``path`` asks for it."""
        file = self._folder / SCRIPT
        found = [str(file)] if path == f"{PREFIX}/{SCRIPT}" and file.is_file() else []
        return found if find_all else next(iter(found), [])

    def list(self, ignore_patterns: Iterable[str] | None) -> Iterator[tuple[str, Storage]]:
        """The one file, for collectstatic and WhiteNoise."""
        del ignore_patterns  # nobody ignores the only file
        if (self._folder / SCRIPT).is_file():
            storage = FileSystemStorage(location=self._folder)
            storage.prefix = PREFIX  # type: ignore[attr-defined]  # what collectstatic reads from its finders' storages
            yield SCRIPT, storage
