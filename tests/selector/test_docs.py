"""The code in the documents runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from selector.linear import LinUcbPolicy

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
