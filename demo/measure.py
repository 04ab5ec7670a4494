"""Measure the demo's models on this machine: `python -m demo.measure`.

Accuracy on the held-out images; latency and throughput with ONNX Runtime on one thread, spinning off. Judges the
numbers that the demo relies on: accuracies apart, latencies far apart, batching worth it for the dense model.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from demo.models import DemoData, DemoModel, digits_models, load_data, parity_model

BATCHES = (1, 2, 4, 8, 16, 32)
MIB = 2**20
SIZE_LIMIT_BYTES = 6_000_000
ACCURACY_STEP, LATENCY_SPAN, LARGEST_MS, BATCHING_GAIN = 0.03, 10.0, 8.0, 4.0


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model; latencies at batch 1, throughput in items per second by batch size."""

    model: DemoModel
    parameters: int
    correct: int
    judged: int
    median_ms: float
    p95_ms: float
    throughput: dict[int, float]

    @property
    def accuracy(self) -> float:
        return self.correct / self.judged

    @property
    def batching_gain(self) -> float:
        return self.throughput[BATCHES[-1]] / self.throughput[1]


def open_session(model: DemoModel) -> onnxruntime.InferenceSession:
    """One thread, operators in sequence, no spinning: what a device with one free core would do."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.path, options, providers=["CPUExecutionProvider"])


def count_correct(session: onnxruntime.InferenceSession, model: DemoModel, data: DemoData) -> int:
    """Held-out items whose largest logit is their label's."""
    correct = 0
    for start in range(0, len(data.heldout_labels), BATCHES[-1]):
        chunk = slice(start, start + BATCHES[-1])
        (logits,) = session.run([model.output_name], {model.input_name: data.heldout_inputs[chunk]})
        correct += int(np.sum(logits.argmax(axis=1) == data.heldout_labels[chunk]))
    return correct


def timed_runs(
    session: onnxruntime.InferenceSession, model: DemoModel, inputs: NDArray[np.uint8], seconds: float
) -> list[float]:
    """Sorted milliseconds of repeated runs on one batch: three to warm up, then for `seconds`, at least 10."""
    feed = {model.input_name: inputs}
    for _ in range(3):
        session.run([model.output_name], feed)
    elapsed: list[float] = []
    until = time.perf_counter() + seconds
    while len(elapsed) < 10 or time.perf_counter() < until:
        started = time.perf_counter()
        session.run([model.output_name], feed)
        elapsed.append((time.perf_counter() - started) * 1000)
    return sorted(elapsed)


def measure(model: DemoModel, data: DemoData, seconds: float) -> Measurement:
    """Everything about one model, spending about `seconds` on each batch size."""
    session = open_session(model)
    runs = {n: timed_runs(session, model, data.heldout_inputs[:n], seconds) for n in BATCHES}
    graph = onnx.load(model.path).graph
    return Measurement(
        model=model,
        parameters=sum(math.prod(tensor.dims) for tensor in graph.initializer),
        correct=count_correct(session, model, data),
        judged=len(data.heldout_labels),
        median_ms=statistics.median(runs[1]),
        p95_ms=runs[1][math.ceil(0.95 * len(runs[1])) - 1],
        throughput={n: 1000 * n / statistics.median(elapsed) for n, elapsed in runs.items()},
    )


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a proportion (JASA 1927).

    >>> [round(bound, 3) for bound in wilson_interval(90, 100)]
    [0.826, 0.945]
    """
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return centre - half, centre + half


def table(measurements: Sequence[Measurement]) -> Iterator[str]:
    """One line per model, then one per model with its throughput by batch size."""
    yield (f"{'model':<15}{'size MiB':>9}{'params':>11}  {'held-out accuracy':<24}{'median ms':>10}{'p95 ms':>9}")
    for m in measurements:
        low, high = wilson_interval(m.correct, m.judged)
        accuracy = f"{m.accuracy:.1%} [{low:.1%}, {high:.1%}]"
        size = m.model.size_bytes / MIB
        yield (f"{m.model.name:<15}{size:>9.2f}{m.parameters:>11,}  {accuracy:<24}{m.median_ms:>10.2f}{m.p95_ms:>9.2f}")
    yield ""
    yield f"{'items/s':<15}" + "".join(f"{f'batch {n}':>10}" for n in BATCHES) + f"{'32 vs 1':>10}"
    for m in measurements:
        rates = "".join(f"{m.throughput[n]:>10,.0f}" for n in BATCHES)
        yield f"{m.model.name:<15}{rates}{m.batching_gain:>9.1f}x"


def targets(digits: Sequence[Measurement], parity: Measurement) -> Iterator[tuple[str, bool]]:
    """What the demo relies on, and whether this run shows it."""
    size = sum(m.model.size_bytes for m in digits)
    yield f"committed ONNX files: {size / 1e6:.2f} MB (< {SIZE_LIMIT_BYTES / 1e6:.0f})", size < SIZE_LIMIT_BYTES
    for smaller, larger in itertools.pairwise(digits):
        step = larger.accuracy - smaller.accuracy
        names = f"{larger.model.name} over {smaller.model.name}"
        yield f"{names}: {100 * step:+.1f} points (>= {100 * ACCURACY_STEP:.0f})", step >= ACCURACY_STEP
    span = digits[-1].median_ms / digits[0].median_ms
    yield f"latency, largest over smallest: {span:.0f}x (>= {LATENCY_SPAN:.0f})", span >= LATENCY_SPAN
    largest = digits[-1].median_ms
    yield f"latency of the largest: {largest:.1f} ms (>= {LARGEST_MS:.0f})", largest >= LARGEST_MS
    gain = parity.batching_gain
    yield f"dense model, batch 32 over 1: {gain:.1f}x (>= {BATCHING_GAIN:.0f})", gain >= BATCHING_GAIN


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; 0 if every target was met, else 1."""
    parser = argparse.ArgumentParser(prog="python -m demo models", description="Measure the demo's models.")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per model and batch size (1)")
    parser.add_argument("--folder", type=Path, help="where the dense model is kept (default: built and deleted)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        dense = parity_model(arguments.folder or Path(scratch))
        data = load_data("digits")
        digits = [measure(model, data, arguments.seconds) for model in digits_models()]
        parity = measure(dense, load_data("parity"), arguments.seconds)
        print(f"ONNX Runtime {onnxruntime.__version__}, 1 thread, fp32, {parity.judged} held-out images\n")
        print("\n".join(table([*digits, parity])), end="\n\n")
        verdicts = list(targets(digits, parity))
    for text, is_met in verdicts:
        print(f"{'pass' if is_met else 'FAIL'}  {text}")
    return 0 if all(is_met for _, is_met in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
