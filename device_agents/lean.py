"""Keeps out of the process what it never uses: imported before anything else by the command.

httpx and uvicorn load a command line and a file watcher of their own where those happen to be installed, 4 MB in all.
``None`` is Python's way to say that a module is not to be imported; both then go on without.
"""

from __future__ import annotations

import sys

for unused in ("httpx._main", "watchfiles"):
    sys.modules.setdefault(unused, None)  # type: ignore[arg-type]  # typeshed knows modules only
