"""`python -m demo proof`: fresh demos in turn, measured against what the demo promises a newcomer.

Promises, times counted from the start of the supervisor ("packages ready"): console up within 90 s; the first push of
a model that a learnt policy chose within 3 minutes; three minutes after the console is up at least 100 closed decisions
and `lift_over_uniform` clear of zero in at least 9 of 10 runs; half of all pushes within 2 s; no failed request.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from demo.preflight import CannotStart, free_ports
from demo.processes import ROOT
from demo.service import Service
from demo.status import APPLICATION, app_counts, read_verdict

DEFAULT_FOLDER = ROOT / "var" / "proof"
RUN_S, UP_WITHIN_S, LEARNT_PUSH_WITHIN_S, CLOSED, PUSH_S = 180.0, 90.0, 180.0, 100, 2.0
NEVER_S = 999.0


@dataclass(frozen=True)
class Run:
    """One fresh demo."""

    console_up_s: float
    first_learnt_push_s: float
    closed_decisions: int
    push_median_s: float
    pushes: int
    requests: int
    failed: int
    refused: int
    qoe: float
    lift: float
    lift_low: float

    @property
    def is_clear(self) -> bool:
        """Whether the lift over uniform choice is certainly positive."""
        return self.lift_low > 0


def main(arguments: Sequence[str]) -> int:
    """Run, print a row per run and one JSON line; 0 if every promise is kept, else 1."""
    parser = argparse.ArgumentParser(prog="python -m demo proof", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=10, help="fresh demos in turn (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8400, help="first port to try (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="default: var/proof")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of the demo's own end
    runs = []
    for number in range(1, chosen.runs + 1):
        try:
            runs.append(run(chosen.data, chosen.port))
        except (CannotStart, subprocess.CalledProcessError, TimeoutError) as error:
            print(f"run {number} could not be measured: {error}", file=sys.stderr)
            return 2
        print(f"run {number}: {row(runs[-1])}", flush=True)
    findings = judge(runs)
    for name, is_kept in findings.items():
        print(f"{'pass' if is_kept else 'FAIL'}  {name.replace('_', ' ')}")
    print(json.dumps({"ok": all(findings.values()), **findings, "runs": [asdict(each) for each in runs]}))
    return 0 if all(findings.values()) else 1


def judge(runs: Sequence[Run]) -> dict[str, bool]:
    """Which promises the runs keep."""
    return {
        "console_up_in_90_s": max(each.console_up_s for each in runs) <= UP_WITHIN_S,
        "first_learnt_push_in_180_s": max(each.first_learnt_push_s for each in runs) <= LEARNT_PUSH_WITHIN_S,
        "100_closed_decisions_in_180_s": min(each.closed_decisions for each in runs) >= CLOSED,
        "push_median_in_2_s": statistics.median(each.push_median_s for each in runs) <= PUSH_S,
        "no_failed_request": sum(each.failed for each in runs) == 0,
        "lift_clear_of_zero_in_9_of_10": sum(each.is_clear for each in runs) >= len(runs) - len(runs) // 10,
    }


def row(each: Run) -> str:
    return (
        f"console {each.console_up_s:.0f} s, learnt push {each.first_learnt_push_s:.0f} s, "
        f"{each.closed_decisions} closed, push median {each.push_median_s:.2f} s of {each.pushes}, "
        f"{each.requests} requests, {each.failed} failed, {each.refused} refused, "
        f"QoE {each.qoe:.2f}, lift {each.lift:+.3f} from {each.lift_low:+.3f}"
    )


def run(folder: Path, first_port: int) -> Run:
    """One fresh demo, stopped again."""
    (port,) = free_ports(1, first_port)
    service = Service(folder / "service", port)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    started = datetime.now().astimezone()
    command = [sys.executable, "-m", "demo", "up", "--fresh", "--port", str(port), "--data", str(folder)]
    with log.open("w") as output, subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as demo:
        try:
            began = time.monotonic()
            while not service.is_up():
                if demo.poll() is not None or time.monotonic() - began > 2 * UP_WITHIN_S:
                    raise TimeoutError(f"the console did not come up; see {log}")
                time.sleep(0.25)
            up_s = time.monotonic() - began
            time.sleep(RUN_S)
            verdict, counts = read_verdict(service), app_counts(folder / "devices")
            rows = read_rows(service)
        finally:
            with suppress(ProcessLookupError):
                demo.send_signal(signal.SIGTERM)
            demo.wait(60)
    return summarise(up_s, started, verdict, counts, rows)


def read_rows(service: Service) -> dict[str, list[dict[str, Any]]]:
    """The decisions of the application and how devices followed them, by Django's own export."""
    tables = ("decisions.decision", "decisions.joinedevent", "rollouts.attemptoutcome")
    exported = json.loads(service.manage("dumpdata", *tables))
    found: dict[str, list[dict[str, Any]]] = {table: [] for table in tables}
    for entry in exported:
        if entry["fields"]["application"] == APPLICATION:
            found[entry["model"]].append({"pk": entry["pk"], **entry["fields"]})
    return found


def summarise(
    up_s: float,
    started: datetime,
    verdict: dict[str, Any],
    counts: dict[str, int],
    rows: dict[str, list[dict[str, Any]]],
) -> Run:
    """The numbers of one run. A push is a decision that made the device load another model, until it served it."""
    decisions = {each["pk"]: each for each in rows["decisions.decision"]}
    pushes, learnt_s = [], []
    for outcome in rows["rollouts.attemptoutcome"]:
        decision = decisions.get(outcome["decision_id"])
        if decision is None or outcome["outcome"] != "committed" or not decision["active_at"]:
            continue
        active_at = datetime.fromisoformat(decision["active_at"])
        pushes.append((active_at - datetime.fromisoformat(decision["decided_at"])).total_seconds())
        if decision["policy_number"] and decision["kind"] == "exploit":
            learnt_s.append((active_at - started).total_seconds())
    lift = verdict["lift_over_uniform"] or {"mean": math.nan, "low": -1.0}
    return Run(
        console_up_s=round(up_s, 1),
        first_learnt_push_s=round(min(learnt_s, default=NEVER_S), 1),
        closed_decisions=len(rows["decisions.joinedevent"]),
        push_median_s=round(statistics.median(pushes), 2) if pushes else NEVER_S,
        pushes=len(pushes),
        qoe=round(verdict["qoe"]["mean"], 3) if verdict["qoe"] else math.nan,
        lift=round(lift["mean"], 3),
        lift_low=round(lift["low"], 3),
        **counts,
    )
