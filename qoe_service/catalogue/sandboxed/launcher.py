"""First code of every sandboxed process: bounds the process, then runs the module asked for.

Started by file path, so that nothing of the service is imported: launcher.py PARENT LIMITS FOLDER MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1
NICENESS = 10


def die_with_parent(parent: int) -> None:
    """A killed worker must not leave its child behind."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def limit(limits: dict[str, int]) -> None:
    """Set hard limits, never above what the system allows already. CPU time gets a signal that tells why first."""
    for name, wanted in limits.items():
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(which, (max(value - 1, 1) if which == resource.RLIMIT_CPU else value, value))


def main(parent: str, limits: str, folder: str, module: str, *arguments: str) -> None:
    """Become the program."""
    die_with_parent(int(parent))
    limit(json.loads(limits))
    os.nice(NICENESS)
    sys.path.append(folder)  # last, so that its names hide nobody else's
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
