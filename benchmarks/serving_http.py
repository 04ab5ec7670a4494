"""Servers over HTTP, each tuned and alone on one core: capacity, goodput at the SLO, and what the path itself costs."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.load import Load, specification
from benchmarks.serving_models import DENSE, ECHO, KINDS, BenchmarkModel

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "benchmarks" / "serving_peers"
HANDLER = "handler"  # one that returns at once
PEERS = ("mlserver", "bentoml", "litserve", "kserve")
SERVER_CORE, CLIENT_CORE = 0, 1
BATCH = 16
LOADS = (0.5, 0.7, 0.9, 1.0, 1.1)
START_WITHIN_S = 60.0
FAILURES = (RuntimeError, OSError, ValueError, http.client.HTTPException, subprocess.SubprocessError)
"""What one server's trouble looks like: it does not start, answer or end, or hangs up on the generator."""


@dataclass(frozen=True)
class Contestant:
    """One server with one setting. ``batch`` 1 turns its batching off."""

    name: str
    batch: int

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.name} b{self.batch}"


def is_installed(name: str) -> bool:
    """Whether ``benchmarks/peers.sh`` has set it up."""
    return (ROOT / ".venv-peers" / name / ".installed").exists()


def settings_of(name: str, model: BenchmarkModel) -> list[Contestant]:
    """The settings worth trying. Only the agent finds its batch by itself; KServe's Python server has none."""
    if name in ("qoe-agent", "kserve"):
        return [Contestant(name, BATCH if name == "qoe-agent" else 1)]
    return [Contestant(name, BATCH)] if model is DENSE else [Contestant(name, 1), Contestant(name, BATCH)]


def request_of(contestant: Contestant, model: BenchmarkModel) -> bytes:
    """One request of one row in the most compact form that this server takes."""
    x = model.inputs()["x"]
    packed = base64.b64encode(x.tobytes()).decode()
    match contestant.name:
        case "qoe-agent" | "kserve" | "handler":
            tensor: dict[str, object] = {"name": "x", "shape": list(x.shape), "datatype": "FP32"}
            tensor["parameters"] = {"binary_data_size": x.nbytes}
            head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
            extra = f"Inference-Header-Content-Length: {len(head)}\r\nContent-Type: application/octet-stream\r\n"
            return _http("/v2/models/m/infer", head + x.tobytes(), extra)
        case "mlserver":
            tensor = {"name": "x", "shape": [1, 1], "datatype": "BYTES", "data": [packed]}
            tensor["parameters"] = {"content_type": "base64"}
            return _http("/v2/models/m/infer", json.dumps({"inputs": [tensor]}).encode())
        case "bentoml":
            return _http("/infer", json.dumps({"items": [packed]}).encode())
        case _:
            return _http("/predict", json.dumps({"x": packed}).encode())


def _http(path: str, body: bytes, extra: str = "Content-Type: application/json\r\n") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body


def command_of(
    contestant: Contestant, model: Path | None, *, port: int, slo_ms: float, row: tuple[int, ...], folder: Path
) -> tuple[list[str], dict[str, str]]:
    """How to start it, and the variables it reads."""
    name = contestant.name
    python = str(ROOT / ".venv-peers" / name / "bin" / "python")
    variables = {
        "MODEL": str(model or ""),
        "PORT": str(port),
        "BATCH": str(contestant.batch),
        "SLO_MS": str(max(1, round(slo_ms))),
        "ROW": ",".join(map(str, row)),
        "PYTHONPATH": str(PROGRAMS),
        "BENTOML_DO_NOT_TRACK": "True",
        "OMP_NUM_THREADS": "1",
    }
    match name:
        case "qoe-agent":
            command = [sys.executable, "-m", "device_agents", "serve", "--model", str(model), "--model-name", "m"]
            command += ["--port", str(port), "--max-batch", str(contestant.batch), "--concurrency", "2"]
            command += ["--slo-ms", str(slo_ms * 0.9)] if slo_ms < 1e6 else []
            return command, {"PYTHONPATH": str(ROOT), "QOE_AGENT_QUEUE_REQUESTS": "256"}
        case "mlserver":
            _mlserver_settings(folder, contestant, port)
            return [str(ROOT / ".venv-peers" / name / "bin" / "mlserver"), "start", str(folder)], variables
        case "bentoml":
            serve = ["-m", "bentoml", "serve", "bentoml_program:Onnx", "--port", str(port), "--host", "127.0.0.1"]
            return [python, *serve], variables
        case "handler":
            return [sys.executable, str(PROGRAMS / "handler_program.py")], variables
        case _:
            return [python, str(PROGRAMS / f"{name}_program.py")], variables


def _mlserver_settings(folder: Path, contestant: Contestant, port: int) -> None:
    """No worker processes (there is one core), no gRPC to speak of, quiet logs."""
    server = {"http_port": port, "grpc_port": free_port(), "metrics_port": free_port(), "parallel_workers": 0}
    (folder / "settings.json").write_text(json.dumps(server | {"debug": False, "host": "127.0.0.1"}))
    model: dict[str, object] = {"name": "m", "implementation": "mlserver_program.Onnx"}
    if contestant.batch > 1:
        model |= {"max_batch_size": contestant.batch, "max_batch_time": 0.002}
    (folder / "model-settings.json").write_text(json.dumps(model))


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(contestant: Contestant, model: BenchmarkModel, *, slo_ms: float, folder: Path) -> Iterator[tuple[int, int]]:
    """The server, answering; gives its port and process id. Raises RuntimeError with its last words otherwise."""
    port = free_port()
    is_echo_peer = model is ECHO and contestant.name != "qoe-agent"
    path = None if is_echo_peer else model.write(folder)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        command, variables = command_of(contestant, path, port=port, slo_ms=slo_ms, row=model.row, folder=home)
        environment = {**os.environ, **variables, "QOE_AGENT_STATE_DIR": scratch, "BENTOML_HOME": scratch}
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                ["taskset", "-c", str(SERVER_CORE), *command],
                env=environment,
                cwd=home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until_answering(port, request_of(contestant, model), process, home / "log")
            yield port, process.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait(5)


def wait_until_answering(port: int, request: bytes, process: subprocess.Popen[bytes], log: Path) -> None:
    """Asks until the first answer; raises RuntimeError with what was said last."""
    ends_s = time.monotonic() + START_WITHIN_S
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    url = f"http://127.0.0.1:{port}{lines[0].split()[1]}"
    said = ""
    while time.monotonic() < ends_s and process.poll() is None:
        try:
            asked = urllib.request.Request(url, data=body, headers=headers, method="POST")
            with urllib.request.urlopen(asked, timeout=5) as reply:
                reply.read()
                return
        except urllib.error.HTTPError as error:
            said = f"{error.code}: {error.read()[:300]!r}"
            if error.code in (400, 422):
                break
        except OSError as error:
            said = str(error)
        time.sleep(0.05)
    raise RuntimeError(f"does not answer: {said}; {log.read_text(errors='replace')[-500:]}")


def measure(load: Load) -> Mapping[str, float]:
    """One run of the load generator, in a process of its own. Raises RuntimeError with its last words."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"],
        input=specification(load),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the load generator failed: {done.stderr[-300:].strip()}")
    found: Mapping[str, float] = json.loads(done.stdout)
    return found


def capacity_rps(port: int, request: str, *, seconds: float) -> float:
    """The most that the server answers, whatever the latency: the best of a few numbers of busy connections.

    Raises RuntimeError for a server that answers nothing: shares of nothing would compare with nothing.
    """
    found = [
        measure(Load(port, request, seconds, slo_ms=1e9, connections=connections, core=CLIENT_CORE))["throughput_rps"]
        for connections in (4, 24)
    ]
    if not max(found):
        raise RuntimeError("answers no request")
    return max(found)


def solo_ms(model: BenchmarkModel, folder: Path) -> float:
    """Median run of one row with one thread, in a process of its own on the server's core."""
    program = (
        "import sys, time, statistics, numpy as np, onnxruntime as ort\n"
        "o = ort.SessionOptions(); o.intra_op_num_threads = 1\n"
        "s = ort.InferenceSession(sys.argv[1], o); x = np.load(sys.argv[2]); t = []\n"
        "for _ in range(60):\n"
        "    a = time.perf_counter(); s.run(None, {'x': x}); t.append(time.perf_counter() - a)\n"
        "print(statistics.median(t[10:]) * 1000)\n"
    )
    np.save(folder / "row.npy", model.inputs()["x"])
    command = ["taskset", "-c", str(SERVER_CORE), sys.executable, "-c", program]
    command += [str(model.write(folder)), str(folder / "row.npy")]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@dataclass
class Entry:
    """One running contestant and what it reached."""

    contestant: Contestant
    port: int
    request: str
    capacity_rps: float = 0.0
    rows: dict[float, Mapping[str, float]] = field(default_factory=dict)
    machine_ms: list[float] = field(default_factory=list)

    @property
    def goodput_rps(self) -> float:
        """Mean over the loads."""
        return statistics.mean(row["goodput_rps"] for row in self.rows.values())

    def offer(self, share: float, *, seconds: float, slo_ms: float) -> None:
        """One turn at that share of its capacity."""
        self.machine_ms.append(calibration_ms())
        rate = self.capacity_rps * share
        load = Load(self.port, self.request, seconds, slo_ms, 256, rate, seed=7, core=CLIENT_CORE)
        self.rows[share] = measure(load)


def goodputs(
    names: Sequence[str], model: BenchmarkModel, *, slo_ms: float, seconds: float, folder: Path, failed: dict[str, str]
) -> dict[str, Entry]:
    """The best setting of each server at shares of its own capacity; who fails is in ``failed`` and left out.

    All servers stand ready at once and take turns at each load, so that a slow moment of the machine hits all alike;
    ``machine_ms`` is a fixed calibration loop on the server's core, timed right before each turn.
    """
    with contextlib.ExitStack() as stack:
        started: dict[str, Entry] = {}
        for contestant in (each for name in names for each in settings_of(name, model)):
            with tolerating(what := f"{contestant.label} at {model.name}", failed):
                port, _ = stack.enter_context(running(contestant, model, slo_ms=slo_ms, folder=folder))
                started[what] = Entry(contestant, port, base64.b64encode(request_of(contestant, model)).decode())
        for what, entry in started.items():
            with tolerating(what, failed):
                entry.capacity_rps = capacity_rps(entry.port, entry.request, seconds=min(1.5, seconds))
        for share in LOADS:
            for what, entry in started.items():
                if what not in failed:
                    with tolerating(what, failed):
                        entry.offer(share, seconds=seconds, slo_ms=slo_ms)
    entries = [entry for what, entry in started.items() if what not in failed]
    for entry in entries:
        misses = " ".join(f"{row['miss_share']:.3f}" for row in entry.rows.values())
        best = max(row["goodput_rps"] for row in entry.rows.values())
        print(
            f"  {entry.contestant.label:<14} capacity {entry.capacity_rps:7.0f}/s  goodput mean"
            f" {entry.goodput_rps:7.1f}/s best {best:7.1f}/s  misses {misses}"
            f"  machine {statistics.median(entry.machine_ms):.0f} ms",
            flush=True,
        )
    return {entry.contestant.name: entry for entry in sorted(entries, key=lambda each: each.goodput_rps)}


@contextlib.contextmanager
def tolerating(what: str, failed: dict[str, str]) -> Iterator[None]:
    """One server's trouble is said and kept, and the others go on."""
    try:
        yield
    except FAILURES as error:
        failed[what] = str(error).strip() or repr(error)
        print(f"  {what} failed: {failed[what]}", flush=True)


def calibration_ms() -> float:
    """A fixed piece of pure Python on the server's core."""
    program = "import time; t = time.perf_counter(); sum(n * n for n in range(300000)); print(time.perf_counter() - t)"
    command = ["taskset", "-c", str(SERVER_CORE), sys.executable, "-S", "-c", program]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1000


def compare_goodput(
    folder: Path, *, models: Sequence[BenchmarkModel] = KINDS, seconds: float, failed: dict[str, str]
) -> dict[str, float | None]:
    """All servers, all kinds of models. Ratios are geometric means over the kinds; a peer that fails at one has none.

    Raises RuntimeError when it is the agent that fails.
    """
    names = ["qoe-agent", *(name for name in PEERS if is_installed(name))]
    ratios: dict[str, list[float]] = {name: [] for name in names[1:]}
    for model in models:
        slo_ms = max(10.0, model.slo_runs * solo_ms(model, folder))
        print(f"{model.name}: SLO {slo_ms:.1f} ms ({model.why})")
        found = goodputs(names, model, slo_ms=slo_ms, seconds=seconds, folder=folder, failed=failed)
        if "qoe-agent" not in found:
            raise RuntimeError(f"the agent has no goodput for {model.name}")
        for name in [name for name in ratios if name not in found]:
            del ratios[name]
        for name, values in ratios.items():
            values.append(found["qoe-agent"].goodput_rps / max(found[name].goodput_rps, 1e-9))
            print(f"  goodput against {name}: {values[-1]:.2f}")
    means = {name: math.exp(statistics.mean(math.log(value) for value in values)) for name, values in ratios.items()}
    best = min((value for name, value in means.items() if name != "mlserver"), default=None)
    return {"goodput_vs_mlserver": means.get("mlserver"), "goodput_vs_best_peer": best}


def compare_added(
    folder: Path, *, repetitions: int, seconds: float, quick: bool = False, failed: dict[str, str]
) -> dict[str, float | None]:
    """p50 in ms of a request that costs the model nothing, one keep-alive client with pauses; medians by server.

    Added is what a server takes longer than a handler that returns at once: the loop, the kernel and the client alone.
    ``http_added_ms_over_lowest_peer`` is below zero when every peer adds more. Raises RuntimeError when the agent or
    the handler fails.
    """
    names = [HANDLER, "qoe-agent", *(name for name in PEERS if is_installed(name) and not quick)]
    medians: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        loads = {}
        for name in names:
            contestant = Contestant(name, 1)
            with tolerating(f"{name} at echo", failed):
                request = base64.b64encode(request_of(contestant, ECHO)).decode()
                port, _ = stack.enter_context(running(contestant, ECHO, slo_ms=1e9, folder=folder))
                loads[name] = Load(port, request, seconds, 1e9, connections=1, think_s=0.004, core=CLIENT_CORE)
                p50_ms(loads[name])
        for _ in range(repetitions):
            for name, load in loads.items():
                if (what := f"{name} at echo") not in failed:
                    with tolerating(what, failed):
                        medians[name].append(p50_ms(load))
    medians = {name: values for name, values in medians.items() if len(values) == repetitions}
    if not {HANDLER, "qoe-agent"} <= medians.keys():
        raise RuntimeError("the agent, or the handler to compare it with, has no p50")
    added = {
        name: statistics.median(value - floor for value, floor in zip(values, medians[HANDLER], strict=True))
        for name, values in medians.items()
    }
    for name, values in medians.items():
        spread = f"{min(values):.3f} to {max(values):.3f}"
        said = f"p50 {statistics.median(values):.3f} ms ({spread} in {len(values)} turns)"
        print(f"  {name:<12} {said}, {added[name]:.3f} added", flush=True)
    lowest_peer = min((value for name, value in added.items() if name in PEERS), default=None)
    return {
        "http_added_ms_p50": added["qoe-agent"],
        "http_ms_p50": statistics.median(medians["qoe-agent"]),
        "http_added_ms_over_lowest_peer": None if lowest_peer is None else added["qoe-agent"] - lowest_peer,
    }


def p50_ms(load: Load) -> float:
    """Of one run; raises RuntimeError for a server that answers nothing, whose median would be 0."""
    found = measure(load)
    if not found["throughput_rps"]:
        raise RuntimeError("answers no request")
    return found["p50_ms"]
