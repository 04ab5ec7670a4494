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
from typing import NoReturn

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x4000, 0x40000
NICENESS = 10
MAX_PROCESSES = 256  # threads count too; only where the user is this sandbox's alone
_libc = ctypes.CDLL(None, use_errno=True)


def cut_off(*, has_own_user: bool, alone: bool) -> bool:
    """Namespaces of one's own, where the kernel grants them: no network; ``alone``, no sight of other processes.

    A user namespace takes away the way back.
    """
    flags = CLONE_NEWNET if has_own_user else CLONE_NEWNET | CLONE_NEWUSER
    if alone:
        flags |= CLONE_NEWPID | CLONE_NEWNS
    return bool(_libc.unshare(flags) == 0)


def go_on_alone() -> None:
    """Go on as a process that sees no other; who stays outside tells how it ended, and takes all of it along.

    The first process of the namespace only lives as long as who stays outside: with it the kernel ends the others.
    """
    alive, end = os.pipe()
    first = os.fork()
    if first == 0:
        os.close(end)
        os.read(alive, 1)
        os._exit(0)
    program = os.fork()
    if program != 0:
        os.close(alive)
        end_like(program, first, end)
    os.close(alive)
    os.close(end)
    os.setsid()
    _mount(b"none", b"/", None, MS_REC | MS_PRIVATE)
    _mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def end_like(program: int, first: int, end: int) -> NoReturn:
    """Wait for the program and then for its namespace, and end by the same signal or with the same code.

    Nobody else would reap the first process where the machine's own first process is no init, as in many containers.
    """
    _, status = os.waitpid(program, 0)
    os.close(end)
    os.waitpid(first, 0)
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _mount(source: bytes, target: bytes, kind: bytes | None, flags: int) -> None:
    if _libc.mount(source, target, kind, flags, None) != 0:
        raise OSError(ctypes.get_errno(), f"{target.decode()} cannot be mounted")


def join(members: str) -> None:
    """Become a member of a control group; where that fails, the watchdog still looks at memory."""
    with contextlib.suppress(OSError), open(members, "w") as file:
        file.write(str(os.getpid()))


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
    if wanted["members"]:
        join(wanted["members"])
    is_alone = cut_off(has_own_user=wanted["uid"] is not None, alone=True) if wanted["alone"] else False
    if is_alone:
        die_with_parent(int(parent))
        go_on_alone()
    else:
        cut_off(has_own_user=wanted["uid"] is not None, alone=False)
    if wanted["uid"] is not None:
        become(wanted["uid"])
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if not is_alone:
        die_with_parent(int(parent))  # a change of user forgets it, so it comes after
    limit(wanted["limits"])
    os.nice(NICENESS)
    sys.path.append(folder)  # last, so that its names hide nobody else's
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
