"""Does the Vowpal Wabbit core learn at all? Classification as a bandit: one class is one action, a hit is worth 1.

scikit-learn's own data sets, in one pass and in random order: the learner sees the features, picks a class and is told
only whether it was right. Bounds are computed from the data: chance (one over the number of classes), and the best
fixed action in hindsight (the share of the commonest class), each with the standard error of a mean over the judged
decisions. Beside them in the same run: what a linear classifier makes of the same stream when it is told the right
class every time. What would falsify the core: a last half not above the best fixed action by
`STANDARD_ERRORS` standard errors.

`python -m benchmarks.conversions`
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.linear_model import SGDClassifier

from selector.interactions import (
    Action,
    Candidate,
    Configuration,
    Context,
    Interaction,
    Measurement,
    Prediction,
    Variant,
)
from selector.policy import Policy, sample, seed_of
from selector.vw import VowpalWabbitPolicy

Floats = NDArray[np.float64]

LOADERS = {"digits": load_digits, "wine": load_wine, "breast cancer": load_breast_cancer, "iris": load_iris}
# One in a million policies no better than the best fixed action would pass.
STANDARD_ERRORS = 4.75


@dataclass(frozen=True, slots=True)
class DataSet:
    """``rows`` (n, d) scaled to mean 0 and standard deviation 1, ``labels`` (n,) in random order."""

    name: str
    rows: Floats
    labels: NDArray[np.intp]

    @property
    def classes(self) -> int:
        """Number of actions."""
        return int(self.labels.max()) + 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Shares of hits: of the whole pass, and of its last half, which is judged."""

    whole: float
    last_half: float


def data_set(name: str, seed: int) -> DataSet:
    """One of ``LOADERS``, shuffled."""
    rows, labels = LOADERS[name](return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    spread = rows.std(axis=0)
    return DataSet(name, ((rows - rows.mean(axis=0)) / np.where(spread > 0, spread, 1.0))[order], labels[order])


def play(data: DataSet, policy: Policy, seed: int) -> Outcome:
    """Let the policy pick a class for every row and learn from the hit or miss alone."""
    hits = np.zeros(len(data.labels))
    actions = [_action(label) for label in range(data.classes)]
    for row in range(len(data.labels)):
        decision_id = f"{data.name}-{seed}-{row}"
        context = _context(data, row)
        shares = policy.probabilities(context, _candidates(actions))
        chosen = sample(shares, seed_of(decision_id))
        hits[row] = chosen == data.labels[row]
        learnt = _candidates(actions, shares)
        policy.learn(Interaction(decision_id, context, learnt, chosen, Measurement(requests=1), float(hits[row])))
    return _outcome(hits)


def told_everything(data: DataSet, seed: int) -> Outcome:
    """A linear classifier that learns the right class of every row after guessing it."""
    classifier = SGDClassifier(loss="log_loss", random_state=seed)
    hits = np.zeros(len(data.labels))
    for row in range(len(data.labels)):
        here = data.rows[row : row + 1]
        hits[row] = row > 0 and classifier.predict(here)[0] == data.labels[row]
        classifier.partial_fit(here, data.labels[row : row + 1], classes=np.arange(data.classes))
    return _outcome(hits)


def best_fixed(data: DataSet) -> float:
    """Share of the commonest class: what the best single action earns."""
    return float(np.bincount(data.labels).max()) / len(data.labels)


def margin(share: float, count: int) -> float:
    """By how much a share of ``count`` decisions must exceed ``share`` not to be luck."""
    return STANDARD_ERRORS * math.sqrt(share * (1.0 - share) / count)


def _outcome(hits: Floats) -> Outcome:
    return Outcome(float(hits.mean()), float(hits[len(hits) // 2 :].mean()))


def _action(label: int) -> Action:
    return Action(Variant(f"{label:02x}" * 32, f"class-{label}", 1_000_000, 0.5), Configuration())


def _context(data: DataSet, row: int) -> Context:
    features = {f"x{column}": float(value) for column, value in enumerate(data.rows[row])}
    return Context("device", "class", data.name, 1.0, 100.0, features=features)


def _candidates(actions: list[Action], shares: Floats | None = None) -> tuple[Candidate, ...]:
    """All alike but for their class: the prediction says nothing."""
    nothing = Prediction(10.0, 20.0, 0.2, 5.0, 0.05, 0.5, 10.0, slo_hit_share=0.9)
    each = np.full(len(actions), 1.0 / len(actions)) if shares is None else shares
    return tuple(
        Candidate(action, nothing, shortlisted=True, probability=float(share))
        for action, share in zip(actions, each, strict=True)
    )


def main() -> None:
    """Print one line per data set and, last, one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversions", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one order of the rows instead of five")
    seeds = range(1 if parser.parse_args().quick else 5)
    summary: dict[str, dict[str, float]] = {}
    print(f"{'last half, % right':<16}{'chance':>9}{'best fixed':>12}{'needed':>9}{'vw core':>9}{'told all':>10}")
    for name in LOADERS:
        data = [data_set(name, seed) for seed in seeds]
        count = len(data[0].labels) - len(data[0].labels) // 2
        fixed = best_fixed(data[0])
        numbers = {
            "chance_pct": 100.0 / data[0].classes,
            "best_fixed_pct": 100.0 * fixed,
            "needed_pct": 100.0 * (fixed + margin(fixed, count * len(seeds))),
            "vw_pct": 100.0 * _mean([play(each, VowpalWabbitPolicy(), seed) for seed, each in enumerate(data)]),
            "told_everything_pct": 100.0 * _mean([told_everything(each, seed) for seed, each in enumerate(data)]),
        }
        summary[name] = {key: round(value, 1) for key, value in numbers.items()}
        print(
            f"{name:<16}"
            + "".join(f"{value:>{width}.1f}" for value, width in zip(numbers.values(), (9, 12, 9, 9, 10), strict=True))
        )
    print(json.dumps({"conversions": summary}))


def _mean(outcomes: list[Outcome]) -> float:
    return float(np.mean([each.last_half for each in outcomes]))


if __name__ == "__main__":
    main()
