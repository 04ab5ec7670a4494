"""First code of every sandboxed process: shuts it in, then runs the module asked for.

Started by file path, so that nothing of the service is imported: launcher.py PARENT BOUNDS FOLDER MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import runpy
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
NICENESS = 10
MAX_PROCESSES = 256  # threads count too; only where the user is this sandbox's alone
_libc = ctypes.CDLL(None, use_errno=True)


def cut_off_network(has_own_user: bool) -> bool:
    """An empty network namespace, where the kernel grants one. A user namespace takes away the way back."""
    flags = CLONE_NEWNET if has_own_user else CLONE_NEWNET | CLONE_NEWUSER
    return bool(_libc.unshare(flags) == 0)


def become(uid: int) -> None:
    """Another user, who owns nothing but the working folder."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))


def die_with_parent(parent: int) -> None:
    """A killed worker must not leave its child behind."""
    _libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def limit(limits: dict[str, int]) -> None:
    """Set hard limits, never above what the system allows already. CPU time gets a signal that tells why first."""
    for name, wanted in limits.items():
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(which, (max(value - 1, 1) if which == resource.RLIMIT_CPU else value, value))


def die_first() -> None:
    """When the machine runs out of memory, the kernel ends this process before the worker."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def main(parent: str, bounds: str, folder: str, module: str, *arguments: str) -> None:
    """Become the program."""
    wanted = json.loads(bounds)
    die_first()
    cut_off_network(has_own_user=wanted["uid"] is not None)
    if wanted["uid"] is not None:
        become(wanted["uid"])
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    die_with_parent(int(parent))  # a change of user forgets it, so it comes after
    limit(wanted["limits"])
    os.nice(NICENESS)
    sys.path.append(folder)  # last, so that its names hide nobody else's
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
