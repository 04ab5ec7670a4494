"""Is the agent's serving as fast as what it stands on, faster than its peers, and quiet when idle?

Parts (``--only``): inprocess, http, added, control, simulated, idle. Models have random weights and are built on the
spot; nothing is held out, for nothing is learnt but service times. HTTP: the generator has one core, every server the
other; each peer (``benchmarks/peers.sh`` installs them) gets its best known settings, and loads are shares of its own
capacity.
What would falsify the claims stands beside the targets in ``main``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import operator
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil

from benchmarks.delivery_service import DEVICE_ID, RigService
from benchmarks.serving_control import FEW_MISSES
from benchmarks.serving_control import compare as compare_control
from benchmarks.serving_http import (
    PEERS,
    Contestant,
    compare_added,
    compare_goodput,
    free_port,
    is_installed,
    request_of,
    running,
    wait_until_answering,
)
from benchmarks.serving_models import CONV, DENSE, KINDS, TINY, BenchmarkModel
from benchmarks.serving_simulation import DEVICES, WEATHERS
from benchmarks.serving_simulation import compare as compare_simulated
from device_agents.executor import Executor
from device_agents.lease import LeaseAccount
from device_agents.profiler import warm_up
from device_agents.served import ServedModel
from device_agents.store import Identity, Record, Store
from device_agents.wire import DesiredApplication, ServingConfiguration, UpdateState, VariantReference

logger = logging.getLogger(__name__)

PARTS = ("inprocess", "http", "added", "control", "simulated", "idle")
TARGETS: Mapping[str, tuple[str, float]] = {
    "inprocess_vs_bare": (">=", 0.95),
    "goodput_vs_mlserver": (">=", 2.0),
    "goodput_vs_best_peer": (">=", 1.5),
    "http_added_ms_p50": ("<=", 0.5),
    "http_added_ms_over_lowest_peer": ("<", 0.0),
    "control_vs_oracle": (">=", 0.95),
    "control_miss_share": ("<=", FEW_MISSES),
    "control_vs_best_baseline": (">", 1.0),
    "control_vs_oracle_simulated": (">=", 0.95),
    "idle_rss_over_bare_mb": ("<=", 45.0),
    "idle_cpu_share": ("<=", 0.005),
    "start_s": ("<=", 1.5),
}
RELATIONS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
KEYS_OF = {
    "inprocess": ("inprocess_vs_bare",),
    "http": ("goodput_vs_mlserver", "goodput_vs_best_peer"),
    "added": ("http_added_ms_p50", "http_ms_p50", "http_added_ms_over_lowest_peer"),
    "control": ("control_vs_oracle", "control_miss_share", "control_vs_best_baseline"),
    "simulated": ("control_vs_oracle_simulated", "control_vs_oracle_simulated_mean"),
    "idle": ("idle_rss_over_bare_mb", "start_s"),
}
WITHOUT_VALUE = {
    "goodput_vs_mlserver": "no goodput of MLServer: not installed (benchmarks/peers.sh), or failed",
    "goodput_vs_best_peer": "no goodput of another peer: not installed (benchmarks/peers.sh), or failed",
    "http_added_ms_over_lowest_peer": "no peer was measured: --quick, not installed (benchmarks/peers.sh), or failed",
    "control_miss_share": f"the oracle misses more than {FEW_MISSES:.0%} at every load that was measured",
}


# -- in this process ---------------------------------------------------------------------------------------------------


def compare_inprocess(folder: Path, *, seconds: float, repetitions: int) -> dict[str, float | None]:
    """Rows per second of ``infer`` by as many threads as cores, against the same threads on the bare session.

    Both take turns of a moment each, in alternating order: what else the machine does hits them alike.
    """
    callers, ratios = len(os.sched_getaffinity(0)), {}
    for model in (DENSE, CONV):
        path = model.write(folder)
        session = warm_up(path, digest="0" * 64, threads=1, max_batch=16, budget_s=0.3).session
        executor = Executor("m", queue_requests=64)
        account = LeaseAccount(slo_p95_ms=1e6, started_s=time.monotonic())
        configuration = ServingConfiguration(max_batch=16, max_concurrency=callers)
        executor.swap(ServedModel(session, configuration, "0" * 64, None, account, time.monotonic()))
        x = model.inputs()
        bare, ours = partial(session._session.run, None, x), partial(executor.infer, x)
        rounds = [_ratio(ours, bare, callers, seconds, is_first=bool(each % 2)) for each in range(repetitions)]
        executor.close()
        ratios[model.name] = statistics.median(rounds)
        print(
            f"  {model.name:<6} infer / bare ONNX Runtime {ratios[model.name]:.3f}, median of {len(rounds)} turns,"
            f" {min(rounds):.3f} to {max(rounds):.3f}"
        )
    return {"inprocess_vs_bare": min(ratios.values())}


def _ratio(
    ours: Callable[[], object], bare: Callable[[], object], callers: int, seconds: float, *, is_first: bool
) -> float:
    first, second = (_rate(work, callers, seconds) for work in ((ours, bare) if is_first else (bare, ours)))
    return first / second if is_first else second / first


def _rate(work: Callable[[], object], callers: int, seconds: float) -> float:
    """Calls per second by ``callers`` threads, each until its last call has ended."""
    rates = [0.0] * callers

    def loop(index: int) -> None:
        count, began_s = 0, time.monotonic()
        now_s = began_s
        while now_s < began_s + seconds:
            work()
            count, now_s = count + 1, time.monotonic()
        rates[index] = count / (now_s - began_s)

    threads = [threading.Thread(target=loop, args=(index,)) for index in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


# -- idle --------------------------------------------------------------------------------------------------------------

CONNECTED_WITHIN_S = 15.0
CHECK_IN_INTERVAL_S = 30.0  # the service's, on RigService too: CPU at rest is that of a whole interval
BARE = """
import os, sys, numpy, onnxruntime as ort
options = ort.SessionOptions(); options.intra_op_num_threads = 1; options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for _ in range(20):
    session.run(None, {"x": numpy.zeros((1, 32), dtype=numpy.float32)})
print(flush=True); sys.stdin.readline()
"""


def measure_idle(folder: Path, *, seconds: float, repetitions: int) -> dict[str, float | None]:
    """Memory of the agent at rest above a bare process with the same session, its CPU at rest, and its start.

    The agent is ``qoe-agent run``, enrolled, with one committed application, and connected to a service on loopback:
    it has checked in, follows the desired document, and its wake-up stream is open. The leaner ``qoe-agent serve`` is
    printed beside it.
    """
    path, over, starts, shares = TINY.write(folder), [], [], []
    environment = _as_installed(folder)
    for _ in range(repetitions):
        with subprocess.Popen(
            [sys.executable, "-c", BARE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as bare:
            assert bare.stdout is not None
            bare.stdout.readline()
            bare_mb = psutil.Process(bare.pid).memory_info().rss / 2**20
            bare.kill()
        with running(Contestant("qoe-agent", 16), TINY, slo_ms=10.0, folder=folder) as (_, pid):
            serve_mb = psutil.Process(pid).memory_info().rss / 2**20
        with tempfile.TemporaryDirectory() as state, RigService() as service:
            store = _commit(path, Path(state), service)
            began_s = time.monotonic()
            with agent_running(store, service, environment) as pid:
                starts.append(time.monotonic() - began_s)
                agent = psutil.Process(pid)
                _wait_until_connected(store, service)
                time.sleep(1.0)
                before = sum(agent.cpu_times()[:2])
                time.sleep(seconds)
                shares.append((sum(agent.cpu_times()[:2]) - before) / seconds)
                agent_mb = agent.memory_info().rss / 2**20
        over.append(agent_mb - bare_mb)
        print(
            f"  bare process {bare_mb:.1f} MB, qoe-agent run {agent_mb:.1f} MB (serve {serve_mb:.1f} MB),"
            f" start {starts[-1]:.2f} s, CPU at rest {shares[-1]:.2%} of a core",
            flush=True,
        )
    return {
        "idle_rss_over_bare_mb": statistics.median(over),
        "start_s": statistics.median(starts),
        "idle_cpu_share": statistics.median(shares),
    }


def _as_installed(folder: Path) -> Mapping[str, str]:
    """Modules are compiled already, as pip leaves them; those of a source tree may be compiled at every start."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    modules = "import device_agents.__main__, device_agents.agent, uvicorn.loops.uvloop, uvicorn.lifespan.off"
    modules += ", httpcore, anyio, certifi, encodings.idna"  # what it loads no sooner than it connects
    subprocess.run([sys.executable, "-c", modules], env=environment, check=True)
    return environment


def _commit(path: Path, state: Path, service: RigService) -> Store:
    """A state folder as an enrolled device of that service has it that follows one decision."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    store = Store(state, disk_budget_bytes=2**30)
    url, keys = f"http://127.0.0.1:{service.port}", (service.trusted_key,)
    store.save_identity(Identity(service_url=url, device_id=DEVICE_ID, credential="c", trusted_keys=keys))
    store.artifact(digest).parent.mkdir(parents=True, exist_ok=True)
    store.artifact(digest).write_bytes(content)
    desired = DesiredApplication(
        application="m",
        model_name="m",
        decision_id="d1",
        variant=VariantReference(digest=digest, name="tiny", size_bytes=len(content), url="/"),
        serving=ServingConfiguration(max_batch=16, max_concurrency=2, controller=True),
        lease_s=86_400,
        slo_p95_ms=10,
    )
    store.save_record(Record(application="m", model_name="m", state=UpdateState.COMMITTED, committed=desired))
    service.want(desired)
    return store


def _wait_until_connected(store: Store, service: RigService) -> None:
    """Until the agent has checked in and looked, and then looked again at what only its wake-up stream told it.

    Raises RuntimeError otherwise. The next check-in, which would tell it too, is due long after the wait has ended.
    """
    if not service.wait_for(lambda: bool(service.check_ins), CONNECTED_WITHIN_S):
        raise RuntimeError("the idle agent never checked in")
    _wait_until_looked(store, service)
    service.want(*service.applications)
    _wait_until_looked(store, service)


def _wait_until_looked(store: Store, service: RigService) -> None:
    ends_s = time.monotonic() + CONNECTED_WITHIN_S
    while store.seen_version() != service.version:
        if time.monotonic() > ends_s:
            raise RuntimeError("the idle agent does not follow its service")
        time.sleep(0.05)


@contextlib.contextmanager
def agent_running(store: Store, service: RigService, environment: Mapping[str, str]) -> Iterator[int]:
    """``qoe-agent run`` on that store's folder, answering; gives its process id."""
    port, state = free_port(), store.folder
    command = [sys.executable, "-m", "device_agents", "run", "--state-dir", str(state), "--port", str(port)]
    command += ["--service-url", f"http://127.0.0.1:{service.port}"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until_answering(port, request_of(Contestant("qoe-agent", 16), TINY), process, state / "status.json")
        yield process.pid
    finally:
        process.terminate()
        process.wait(10)


# -- all of it ---------------------------------------------------------------------------------------------------------


def calibration_loop_ms() -> float:
    """A fixed piece of pure Python: how fast this machine is just now."""
    start = time.perf_counter()
    sum(number * number for number in range(1_000_000))
    return (time.perf_counter() - start) * 1e3


def run(
    part: str, folder: Path, *, models: Sequence[BenchmarkModel], quick: bool, failed: dict[str, str]
) -> dict[str, float | None]:
    """One part; which peers failed in it, and why, is put into ``failed``."""
    match part:
        case "inprocess":
            return compare_inprocess(folder, seconds=0.15 if quick else 0.3, repetitions=10 if quick else 60)
        case "http":
            return compare_goodput(folder, models=models or KINDS, seconds=2.5, failed=failed)
        case "added":
            repetitions, seconds = (1, 1.0) if quick else (5, 2.0)
            return compare_added(folder, repetitions=repetitions, seconds=seconds, quick=quick, failed=failed)
        case "control":
            return compare_control(
                models or ((DENSE,) if quick else (DENSE, CONV)),
                folder,
                loads=(0.9,) if quick else (0.5, 0.7, 0.9, 1.0, 1.1),
                seconds=0.5 if quick else 1.0,
                rounds=1 if quick else 6,
            )
        case "simulated":
            return compare_simulated(DEVICES, WEATHERS, seconds=2.0)
        case _:
            return measure_idle(folder, seconds=2.0 if quick else CHECK_IN_INTERVAL_S, repetitions=1 if quick else 5)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="under 50 s; leaves out the peers' goodput and virtual time"
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="these parts only; may be repeated")
    parser.add_argument("--model", choices=[model.name for model in KINDS], help="http and control: this kind only")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers that were started must end too
    models = [model for model in KINDS if model.name == options.model]
    not_run: dict[str, str] = {}
    failed: dict[str, str] = {}
    found: dict[str, float | None] = {}
    print(
        f"calibration loop {calibration_loop_ms():.1f} ms; peers installed: "
        f"{[name for name in PEERS if is_installed(name)]}"
    )
    print(f"peers not installed (benchmarks/peers.sh): {[name for name in PEERS if not is_installed(name)]}")
    with tempfile.TemporaryDirectory() as scratch:
        for part in PARTS:
            reason = _left_out(part, options.only, quick=options.quick)
            if reason:
                not_run |= dict.fromkeys(KEYS_OF[part], reason)
                continue
            print(f"{part}:", flush=True)
            try:
                found |= run(part, Path(scratch), models=models, quick=options.quick, failed=failed)
            except Exception as error:
                # The top of the loop: what the other parts find must not be lost with this one.
                logger.exception("part failed part=%s", part)
                print(f"  {part} failed: {error!r}", flush=True)
                failed |= dict.fromkeys(KEYS_OF[part], str(error).strip() or repr(error))
    not_run |= failed
    for key, reason in WITHOUT_VALUE.items():
        if found.get(key) is None:
            not_run.setdefault(key, reason)
    _judge(found)
    keys = [key for keys in KEYS_OF.values() for key in keys]
    summary = {key: None if (value := found.get(key)) is None else round(value, 4) for key in keys}
    print(json.dumps(summary | {"not_run": not_run, "calibration_loop_ms": round(calibration_loop_ms(), 1)}))
    if failed:
        sys.exit(1)


def _judge(found: Mapping[str, float | None]) -> None:
    for key, (relation, target) in TARGETS.items():
        if (value := found.get(key)) is not None:
            verdict = "met" if RELATIONS[relation](value, target) else "MISSED"
            print(f"{key}: {value:.3f}, target {relation} {target}: {verdict}")


def _left_out(part: str, only: list[str] | None, *, quick: bool) -> str:
    if only and part not in only:
        return "not asked for"
    if quick and part in ("http", "simulated"):
        return "takes minutes: run without --quick"
    return ""


if __name__ == "__main__":
    main()
