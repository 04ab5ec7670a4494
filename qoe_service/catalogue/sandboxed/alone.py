"""Ends well only where it sees no process but itself and the first of its namespace."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    seen = [name for name in os.listdir("/proc") if name.isdigit()]
    sys.exit(os.getpid() > 2 or len(seen) > 2)
