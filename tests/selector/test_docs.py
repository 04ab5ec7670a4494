"""The code in the documents runs as it stands there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from selector.linear import LinUcbPolicy
from selector.simulation import Trace

DOCS = Path(__file__).resolve().parents[2] / "docs"


def code_of(page: str) -> str:
    """All Python blocks of a page, one after another."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL))


def test_a_stranger_can_copy_the_library_page() -> None:
    found: dict[str, Any] = {}
    exec(code_of("estimators.md"), found)  # our own page
    assert sum(each.probability for each in found["ranking"].candidates if each.action.variant.name == "small") > 0.5
    assert found["calibration"].revisions(found["context"])["device:pi-7"] == 20
    assert isinstance(found["same"], LinUcbPolicy)
    assert np.isclose(found["probabilities"].sum(), 1.0)


def test_what_the_library_page_names_can_be_imported_from_there() -> None:
    rows = re.findall(r"^\| (`selector\.[^|]*) \| ([^|]*) \|", (DOCS / "estimators.md").read_text(), flags=re.MULTILINE)
    assert len(rows) >= 12
    for modules, names in rows:
        found = [importlib.import_module(each) for each in re.findall(r"`([^`]+)`", modules)]
        for name in re.findall(r"`(\w+)`", names):
            assert any(hasattr(module, name) for module in found), f"{name} is not in {modules}"


def test_a_stranger_can_play_a_world_as_the_selection_page_says() -> None:
    found: dict[str, Any] = {}
    small = code_of("selection.md").replace("seed=1000)", "seed=1000, devices=4, steps=3)", 1)
    exec(small, found)  # our own page, in a smaller world
    trace = found["trace"]
    assert isinstance(trace, Trace)
    assert trace.qoe.shape == (3, 4)
