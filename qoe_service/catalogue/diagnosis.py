"""Tries the limits of the sandbox on this machine, by a program that runs into each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from django.core.files.base import ContentFile

from qoe_service.catalogue import control_groups, sandbox, storages
from qoe_service.catalogue.sandbox import Limits, Refused
from qoe_service.errors import ServiceError

MIB = 2**20
_PROBE = """
import json, os, resource, socket
seen = {"uid": os.getuid(), "environment": sorted(os.environ)}
seen["core_bytes"] = resource.getrlimit(resource.RLIMIT_CORE)[0]
seen["session_leader"] = os.getsid(0) == os.getpid()
seen["processes"] = sum(name.isdigit() for name in os.listdir("/proc"))
seen["no_new_privileges"] = "NoNewPrivs:\\t1" in open("/proc/self/status").read()
try:
    seen["interfaces"] = [name for _, name in socket.if_nameindex() if name != "lo"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
    seen["route"] = True
except OSError:
    seen["route"] = False
print(json.dumps(seen))
"""
_HOG = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); held = bytearray(2**28)"
_HITS: dict[str, tuple[str, Limits, str]] = {
    "CPU time": ("while True: pass", Limits(cpu_s=2, wall_s=30), "CPU time"),
    "wall clock": ("import time; time.sleep(60)", Limits(wall_s=0.3), "took longer"),
    "memory": ("x = bytearray(2**28)\nimport time; time.sleep(30)", Limits(memory_bytes=64 * MIB), "of memory"),
    "file size": ("open('f', 'wb').write(bytes(2**21))", Limits(file_bytes=MIB), "File too large"),
    "open files": ("x = [open('/dev/null') for _ in range(99)]", Limits(open_files=40), "Too many open files"),
}


class Finding(NamedTuple):
    """One promise, and whether it holds here. Without those that are needed, no model should be taken in."""

    what: str
    is_real: bool
    detail: str
    is_needed: bool = True


def examine() -> list[Finding]:
    """Every promise, tried."""
    seen = _seen_inside()
    about = [_network(seen), _own_user(seen), _others(seen), *_flags(seen)]
    return [*about, *(_hit(what) for what in _HITS), _memory_by_the_kernel(), _storage()]


def _seen_inside() -> dict[str, Any]:
    with sandbox.opened() as box:
        (box.folder / "probe.py").write_text(_PROBE)
        box.run(box.folder, "probe")
        with box.open("stdout") as output:
            found: dict[str, Any] = json.loads(output.read(sandbox.MAX_RESULT_BYTES))
    return found


def _network(seen: dict[str, Any]) -> Finding:
    is_cut_off = not seen["route"] and not seen.get("interfaces")
    detail = (
        "a namespace without any" if is_cut_off else "the kernel grants no namespace: run workers without a route out"
    )
    return Finding("network", is_cut_off, detail, is_needed=False)


def _own_user(seen: dict[str, Any]) -> Finding:
    is_other = seen["uid"] not in {os.geteuid(), 65534}
    if is_other:
        detail = f"user {seen['uid']} for one sandbox alone"
    elif os.geteuid() != 0:
        detail = "only root can give one: programs run as the worker's user"
    else:
        detail = "others cannot read this Python: programs run as the worker's user"
    return Finding("own user", is_other, detail, is_needed=False)


def _others(seen: dict[str, Any]) -> Finding:
    is_alone = seen["processes"] <= 2  # itself, and the first of its namespace
    detail = "not seen, and gone when it ends" if is_alone else "seen: the kernel grants no process namespace"
    return Finding("other processes", is_alone, detail, is_needed=False)


def _memory_by_the_kernel() -> Finding:
    with control_groups.limited(64 * MIB) as group:
        if group is None:
            detail = "no control group can be made here: memory is watched ten times a second"
            return Finding("memory by the kernel", False, detail, is_needed=False)
        subprocess.run([sys.executable, "-I", "-c", _HOG, str(group.members)], check=False)
        is_real = group.ran_out_of_memory()
    detail = "a control group of each sandbox has the limit" if is_real else "a group beyond its limit goes on"
    return Finding("memory by the kernel", is_real, detail, is_needed=False)


def _flags(seen: dict[str, Any]) -> list[Finding]:
    # Python itself sets LC_CTYPE where the locale is C
    given = {*sandbox.environment(Path()), "LC_CTYPE"}
    leaked = sorted(set(os.environ) & set(seen["environment"]) - given)
    return [
        Finding("credentials", not leaked, ", ".join(leaked) or "nothing of the service's environment is seen"),
        Finding("new rights", seen["no_new_privileges"], "no program can gain any"),
        Finding("own session", seen["session_leader"], "it is killed as a whole"),
        Finding("core dumps", seen["core_bytes"] == 0, "none"),
    ]


def _hit(what: str) -> Finding:
    program, limits, expected = _HITS[what]
    try:
        with sandbox.opened(limits) as box:
            (box.folder / "probe.py").write_text(program)
            box.run(box.folder, "probe")
    except Refused as refusal:
        return Finding(what, expected in str(refusal), f"a program that exceeds it: {refusal}")
    return Finding(what, False, "a program that exceeds it goes on")


def _storage() -> Finding:
    name, kind = f"uploads/doctor-{uuid.uuid4().hex}", type(storages.storage()).__name__
    steps: list[Callable[[], object]] = [
        lambda: storages.save(name, ContentFile(b"doctor")),
        lambda: storages.read(name, 2, 4).close(),
        lambda: storages.delete(name),
    ]
    try:
        for step in steps:
            step()
    except (ServiceError, OSError) as error:
        return Finding("artifact storage", False, f"{kind}: {error}")
    return Finding("artifact storage", True, f"{kind}: written, read and removed a file")
