"""`python -m demo check`: do the six devices differ as the demo promises, and does it fit on two cores?

Promises: the same variant's p95 differs at least threefold between the fastest and the slowest device; the six have
at least three different best actions; the best single fixed action is at least 0.05 QoE below the best per device;
with the safe baseline everywhere, the whole demo uses at most 60 % of two cores. Measuring is in `grid.py`, judging in
`judgement.py`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import psutil

from demo.devices import DEVICES
from demo.grid import Bench, Choice, Model, choices, measure_device
from demo.installation import Installation, Secrets, read_definition
from demo.judgement import Grid, best, cpu_finding, judge, table
from demo.preflight import CannotStart, claim, free_ports
from demo.processes import ROOT, stopping_on
from demo.service import CommandFailed, Service, Stopped
from demo.supervisor import Demo, Options
from selector.reward import QoeFormula

APPLICATION = "digits"
DEFAULT_FOLDER = ROOT / "var" / "check"
CORES = 2
BASELINE_WARM_UP_S, BASELINE_S = 25.0, 30.0


def main(arguments: Sequence[str]) -> int:
    """Measure, print the tables and the findings, end with one JSON line; 0 if all promises are kept, else 1."""
    parser = argparse.ArgumentParser(prog="python -m demo check", description=str(__doc__).split("\n\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of traffic per device and action (default: %(default)s)"
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="default: var/check")
    chosen = parser.parse_args(arguments)
    stop = stopping_on(signal.SIGINT, signal.SIGTERM)
    try:
        with claim(chosen.data):
            return check(chosen.data, chosen.seconds, stop)
    except (CannotStart, CommandFailed) as error:
        print(f"cannot check: {error}", file=sys.stderr)
    except Stopped:
        print("stopped", file=sys.stderr)
    return 2


def check(folder: Path, seconds: float, stop: threading.Event) -> int:
    """All of it, in a claimed folder."""
    share = baseline_cpu_share(folder, stop)
    models = make_variants(folder, stop)
    grid = measure(folder, models, seconds, stop)
    print(table(grid))
    baseline = read_definition(APPLICATION)["baseline"]["variant"]
    findings = [*judge(grid), cpu_finding(share)]
    for finding in findings:
        print(f"{'pass' if finding.is_kept else 'FAIL'}  {finding.promise}: {finding.detail}")
    failed = sum(cell.failed for row in grid.values() for cell in row.values())
    print(
        json.dumps(
            {
                "ok": all(finding.is_kept for finding in findings),
                **{finding.name: finding.value for finding in findings},
                "unanswered_requests": failed,
                "baseline": baseline,
                "best": {device: best(row) for device, row in grid.items()},
            }
        )
    )
    return 0 if all(finding.is_kept for finding in findings) else 1


def baseline_cpu_share(folder: Path, stop: threading.Event) -> float:
    """Share of two cores that the whole demo uses when every device runs the safe baseline."""
    print(f"running the demo with the safe baseline everywhere for {BASELINE_WARM_UP_S + BASELINE_S:g} s", flush=True)
    options = Options(free_ports(1, 8700)[0], folder / "baseline", is_fresh=True, only_baseline=True)
    with claim(options.folder), running(Demo(options, stop, say=lambda _: None)) as demo:
        wait_for_models(demo)
        demo.tend_for(BASELINE_WARM_UP_S)
        demo.give_up_if_stopped()
        before_s, started_s = cpu_seconds(demo), time.monotonic()
        demo.watch_for(BASELINE_S)
        demo.give_up_if_stopped()
        return (cpu_seconds(demo) - before_s) / (time.monotonic() - started_s) / CORES


@contextmanager
def running(demo: Demo) -> Iterator[Demo]:
    try:
        demo.start()
        yield demo
    finally:
        demo.end()


def wait_for_models(demo: Demo) -> None:
    while demo.is_importing:
        demo.tend_for(0.5)
        demo.give_up_if_stopped()


def cpu_seconds(demo: Demo) -> float:
    """User and system time of the supervisor and every process of the demo, ended children included."""
    processes = [psutil.Process()]
    for child in demo.household:
        if child.pid is not None:
            processes += [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system + each.children_user + each.children_system for each in times)


def make_variants(folder: Path, stop: threading.Event) -> list[Model]:
    """The application's variants, made and judged by the catalogue, kept for the next check."""
    print("making the variants", flush=True)
    service = Service(folder / "service", 0, stop=stop)
    installation = Installation(service, Secrets(folder / "secrets"), folder / "models")
    service.manage("migrate", "--verbosity", "0")
    return [Model(row["name"], file, row["accuracy"]) for file, row in installation.family(APPLICATION)]


def measure(folder: Path, models: Sequence[Model], seconds: float, stop: threading.Event) -> Grid:
    """Every variant under the baseline's configuration, then the best variants under the other configurations.

    All devices at once, as in the demo.
    """
    definition = read_definition(APPLICATION)
    formula = QoeFormula.from_record({"slo_p95_ms": definition["slo_p95_ms"], **definition["qoe"]})
    data = folder / "models" / f"{APPLICATION}.npz"
    bench = Bench(APPLICATION, data, definition["slo_p95_ms"], formula, folder / "devices", seconds, stop)
    usual = definition["baseline"]["configuration"]
    first = measure_all(bench, choices(models, [usual]))
    finalists = {best(row) for row in first.values()}
    others = [each for each in definition["configurations"] if each != usual]
    chosen = [model for model, key in zip(models, next(iter(first.values())), strict=True) if key in finalists]
    second = measure_all(bench, choices(chosen, others))
    return {device: {**first[device], **second[device]} for device in first}


def measure_all(bench: Bench, actions: Sequence[Choice]) -> Grid:
    """These actions on every device."""
    print(f"measuring {len(actions)} actions on {len(DEVICES)} devices, {bench.seconds:g} s each", flush=True)
    ports = free_ports(len(DEVICES), 8800)
    with ThreadPoolExecutor(len(DEVICES)) as pool:
        rows = list(pool.map(measure_device, range(len(DEVICES)), DEVICES, repeat(actions), repeat(bench), ports))
    return {
        device.name: {action.key: row[action.key] for action in actions}
        for device, row in zip(DEVICES, rows, strict=True)
    }
