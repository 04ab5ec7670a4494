"""How long does one decision take, and what of it is Vowpal Wabbit?

Everything is timed in one warmed state: 50 leases of five devices learnt by calibration, budget and policy; the context
has telemetry, an incumbent, a baseline and cached variants, one variant is banned, and a budget is set.
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
from dataclasses import replace

from selector.calibration import Calibration
from selector.interactions import (
    Action,
    Candidate,
    Configuration,
    Context,
    Interaction,
    Measurement,
    Profile,
    Ranking,
    Variant,
)
from selector.ranking import Exploration, rank
from selector.reward import QoeFormula
from selector.vw import VowpalWabbitPolicy

SIZES = (20, 200)
LEASES, DEVICES = 50, 5
CONTEXT = Context(
    "device-0",
    "phone",
    "digits",
    8.0,
    60.0,
    cores=4,
    memory_free_bytes=2**30,
    cpu_load_share=0.2,
    features={"temperature": 0.41, "battery": 0.8, "network": "unmetered", "daypart": "noon", "group": "staff"},
)
FORMULA = QoeFormula(slo_p95_ms=60.0)
EXPLORATION = Exploration(budget=0.05)


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


class WarmState:
    """A fleet in service: what 50 leases taught, and the context of the device that decides next."""

    def __init__(self, count: int) -> None:
        self._actions = make_actions(count)
        self._profiles, self._calibration = make_profiles(self._actions), Calibration()
        self._bans = {self._actions[-1].variant.digest: "withdrawn"}
        self.policy = VowpalWabbitPolicy()
        running: dict[str, Action] = {}
        for number in range(LEASES):
            context = self._context(f"device-{number % DEVICES}", running)
            running[context.device] = self._lease(number, context)
        self.context = self._context(CONTEXT.device, running)

    def decide(self, number: int, context: Context, policy: VowpalWabbitPolicy | None) -> Ranking:
        """One decision."""
        return rank(
            decision_id=f"decision-{number}",
            context=context,
            actions=self._actions,
            profiles=self._profiles,
            calibration=self._calibration,
            formula=FORMULA,
            policy=policy,
            policy_version=1,
            best_fixed=None,
            exploration=EXPLORATION,
            bans=self._bans,
        )

    def _context(self, device: str, running: dict[str, Action]) -> Context:
        """With the cheapest action as the baseline, and everything that the fleet runs on the device."""
        incumbent = running[device].key if device in running else None
        cached = frozenset(action.variant.digest for action in running.values())
        baseline = self._actions[0].key
        return replace(CONTEXT, device=device, incumbent=incumbent, cached_digests=cached, baseline=baseline)

    def _lease(self, number: int, context: Context) -> Action:
        """Decide, take a little longer than predicted, learn."""
        ranking = self.decide(number, context, self.policy)
        predicted, longer = ranking.candidates[ranking.chosen].prediction, 1.1 + 0.02 * (number % DEVICES)
        measured = Measurement(
            requests=100,
            p50_ms=predicted.p50_ms * longer,
            p95_ms=predicted.p95_ms * longer,
            slo_hit_share=predicted.slo_hit_share,
            cpu_ms_per_request=predicted.cpu_ms_per_request * longer,
            service_ms=predicted.service_ms * longer,
            batch_mean=predicted.batch,
            rating=0.8,
            ratings=3,
        )
        reward = FORMULA.reward(measured, ranking.action.variant.accuracy)
        lease = Interaction(f"lease-{number}", context, ranking.candidates, ranking.chosen, measured, reward)
        self._calibration.update(lease)
        self.policy.learn(lease)
        return ranking.action


def contestants(count: int) -> dict[str, Callable[[int], object]]:
    """What is timed, by name; each takes the number of the repetition."""
    state = WarmState(count)
    context, policy = state.context, state.policy
    everything: Sequence[Candidate] = state.decide(0, context, None).candidates
    shortlist = [candidate for candidate in state.decide(0, context, policy).candidates if candidate.shortlisted]
    return {
        "ours": lambda number: state.decide(number, context, policy),
        "ours without a policy": lambda number: state.decide(number, context, None),
        "Vowpal Wabbit, shortlist only": lambda _: policy.probabilities(context, shortlist),
        "Vowpal Wabbit, all actions": lambda _: policy.probabilities(context, everything),
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
