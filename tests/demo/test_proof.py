"""`python -m demo proof` leaves nothing behind when it is stopped."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil


def test_a_stopped_proof_stops_its_demo(tmp_path: Path) -> None:
    data = tmp_path / "data"
    command = [sys.executable, "-m", "demo", "proof", "--runs", "1", "--data", str(data)]
    with subprocess.Popen(command) as proof:
        while not (data / "processes.json").exists():
            assert proof.poll() is None
            time.sleep(0.05)
        demo = psutil.Process(proof.pid).children(recursive=True)
        assert demo
        proof.terminate()
        assert proof.wait(30) == 128 + 15
    assert psutil.wait_procs(demo, timeout=1)[1] == []
