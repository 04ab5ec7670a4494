"""How long does one decision take, and what of it is Vowpal Wabbit?

Ours (predict, mask, shortlist, Vowpal Wabbit, mix, sample) beside its parts: the same without a policy, Vowpal Wabbit
over every action as hosted services run it, and over the shortlist alone. One process, one thread, one run.
What would falsify a claim of cheapness: a median above that of Vowpal Wabbit over all actions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

from selector.calibration import Calibration
from selector.interactions import Action, Candidate, Configuration, Context, Profile, Variant
from selector.ranking import Exploration, rank
from selector.reward import QoeFormula
from selector.vw import VowpalWabbitPolicy

SIZES = (20, 200)
CONTEXT = Context("device", "phone", "digits", 8.0, 60.0, cores=4, memory_free_bytes=2**30)


def make_actions(count: int) -> tuple[Action, ...]:
    """Variants × batch {1, 4} × concurrency {1, 2}, ``count`` in all."""
    configurations = [Configuration(batch, callers, 1) for batch in (1, 4) for callers in (1, 2)]
    variants = [
        Variant(f"{number:012x}" + "0" * 52, f"variant-{number}", 200_000 * (number + 1), 0.8 + 0.15 * number / count)
        for number in range(count // len(configurations))
    ]
    return tuple(Action(variant, configuration) for variant in variants for configuration in configurations)


def make_profiles(actions: Sequence[Action]) -> tuple[Profile, ...]:
    """One measured profile per variant, the more accurate the slower."""
    variants = dict.fromkeys(action.variant for action in actions)
    return tuple(Profile(each.digest, 1, 0.5 + 0.3 * number, 0.1) for number, each in enumerate(variants))


def contestants(count: int) -> dict[str, Callable[[int], object]]:
    """What is timed, by name; each takes the number of the repetition."""
    actions = make_actions(count)
    profiles, calibration = make_profiles(actions), Calibration()
    formula, exploration, policy = QoeFormula(slo_p95_ms=60.0), Exploration(), VowpalWabbitPolicy()

    def decide(number: int, chosen_by: VowpalWabbitPolicy | None) -> Sequence[Candidate]:
        return rank(
            decision_id=f"decision-{number}",
            context=CONTEXT,
            actions=actions,
            profiles=profiles,
            calibration=calibration,
            formula=formula,
            policy=chosen_by,
            policy_version=1,
            best_fixed=None,
            exploration=exploration,
            bans={},
        ).candidates

    everything = decide(0, None)
    shortlist = [candidate for candidate in decide(0, policy) if candidate.shortlisted]
    return {
        "ours": lambda number: decide(number, policy),
        "ours without a policy": lambda number: decide(number, None),
        "Vowpal Wabbit, shortlist only": lambda _: policy.probabilities(CONTEXT, shortlist),
        "Vowpal Wabbit, all actions": lambda _: policy.probabilities(CONTEXT, everything),
    }


def times_ms(contestant: Callable[[int], object], seconds: float) -> list[float]:
    """Wall time of single calls for about ``seconds``, after a warm-up."""
    for number in range(20):
        contestant(number)
    found: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        contestant(len(found))
        found.append((time.perf_counter() - start) * 1e3)
    return found


def calibration_loop_ms() -> float:
    """A fixed piece of pure Python: how fast this machine is just now."""
    start = time.perf_counter()
    sum(number * number for number in range(1_000_000))
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decision_cost", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half a second each instead of three")
    seconds = 0.5 if parser.parse_args().quick else 3.0
    summary: dict[str, object] = {"calibration_loop_ms": round(calibration_loop_ms(), 2)}
    print(f"{'':<32}{'actions':>8}{'p50 ms':>9}{'p95 ms':>9}")
    for count in SIZES:
        for name, contestant in contestants(count).items():
            found = times_ms(contestant, seconds)
            p50, p95 = statistics.median(found), statistics.quantiles(found, n=20)[-1]
            print(f"{name:<32}{count:>8}{p50:>9.2f}{p95:>9.2f}")
            if name == "ours":
                summary[f"decision_ms_{count}"] = round(p50, 3)
            if name == "Vowpal Wabbit, all actions":
                summary[f"vw_all_actions_ms_{count}"] = round(p50, 3)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
