"""Which settings are best for each peer? Plays a grid per peer on the tuning worlds, never on the reported ones.

Worlds are the three tuning instances of `selector/worlds/constants.py` with a seed of ``TUNING_SEEDS``; the measure is
QoE in % of the oracle over the whole run, which is what the benchmark reports. Each setting is tried without and with
what tells devices apart ("history", "standing"). `python -m benchmarks.peer_settings --only LinUCB` plays one peer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import numpy as np

from benchmarks.contenders import ALL, NO_SLO_MASK, SHORTLIST
from benchmarks.latency_table import load
from benchmarks.peers import FLAT_SQUARECB, BoostedResidualPolicy, FlatVowpalWabbitPolicy, NeuralResidualPolicy
from selector.linear import LinTsPolicy, LinUcbPolicy
from selector.policy import Policy
from selector.ranking import Exploration
from selector.simulation import Contender, play
from selector.tabular import ThompsonPolicy, Ucb1Policy
from selector.worlds.constants import TUNING_SEEDS, make_world

WORLDS = ("queueing-tuning", "quirks-tuning", "table-tuning")
BOTH = (False, True)


def grid() -> Iterator[Contender]:
    """Every setting that is tried; the name is the peer's, a comma and the setting."""
    for width in (0.02, 0.1, 0.5):
        yield _plain(f"UCB1, width {width}", partial(Ucb1Policy, width))
    for noise_sd, prior in product((0.03, 0.1, 0.3), (0.3, 0.5, 0.8)):
        yield _plain(f"Thompson, noise_sd {noise_sd} prior {prior}", partial(ThompsonPolicy, noise_sd, prior))
    for alpha, ridge, told in product((0.03, 0.1, 0.3, 1.0), (0.05, 0.2, 1.0), BOTH):
        setting = f"alpha {alpha} ridge {ridge}{_history(told)}"
        yield _plain(f"LinUCB, {setting}", partial(LinUcbPolicy, alpha, ridge, with_history=told))
        yield _plain(f"LinTS, {setting}", partial(LinTsPolicy, alpha, ridge, with_history=told))
    for gamma, rate, told in product((1000, 5000, 20_000, 100_000), (0.1, 0.5), BOTH):
        arguments = FLAT_SQUARECB.format(gamma=gamma, rate=rate)
        flat = partial(FlatVowpalWabbitPolicy, arguments, learns_all_lines=False, with_device=True, with_standing=told)
        yield _plain(f"VW squarecb, gamma {gamma} rate {rate}{' standing' if told else ''}", flat)
    for alpha, ridge, told in product((0.01, 0.02, 0.03, 0.1, 0.3), (0.2, 1.0), BOTH):
        setting = f"alpha {alpha} ridge {ridge}{_history(told)}"
        for name, linear in (("LinUCB + prediction", LinUcbPolicy), ("LinTS + prediction", LinTsPolicy)):
            make = partial(linear, alpha, ridge, with_prediction=True, with_history=told)
            yield _predicting(f"{name}, {setting}", make)
    for epsilon, exploration, told in product((0.001, 0.03), (ALL, SHORTLIST), BOTH):
        setting = f"epsilon {epsilon} of {exploration.shortlist_size}{_history(told)}"
        for name, residual in (("neural network", NeuralResidualPolicy), ("boosted trees", BoostedResidualPolicy)):
            yield _predicting(f"{name}, {setting}", partial(residual, epsilon, with_history=told), exploration)


def _history(told: bool) -> str:
    return " history" if told else ""


def _plain(name: str, make_policy: Callable[[], Policy]) -> Contender:
    return Contender(name, lambda _: make_policy(), exploration=NO_SLO_MASK)


def _predicting(name: str, make_policy: Callable[[], Policy], exploration: Exploration = ALL) -> Contender:
    return Contender(name, lambda _: make_policy(), uses_prediction=True, exploration=exploration)


def qoe_pct(contender: Contender, world: str, devices: int, steps: int) -> float:
    """QoE in % of the oracle in one run."""
    seed = TUNING_SEEDS[0]
    table = load()[0] if world.startswith("table") else ()
    trace = play(make_world(world, seed, devices, steps, table), contender, seed)
    return 100.0 * float(trace.qoe.sum() / trace.oracle.sum())


def main() -> None:
    """Print one line per setting and, last, one JSON object with the best of each peer."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_settings", description=__doc__)
    parser.add_argument("--only", default="", help="peers whose name starts with this")
    parser.add_argument("--quick", action="store_true", help="16 devices and 30 decisions each instead of 50 and 100")
    options = parser.parse_args()
    devices, steps = (16, 30) if options.quick else (50, 100)
    best: dict[str, tuple[float, str]] = {}
    for contender in grid():
        peer, _, setting = contender.name.partition(", ")
        if peer.startswith(options.only):
            found = [qoe_pct(contender, world, devices, steps) for world in WORLDS]
            best[peer] = max(best.get(peer, (0.0, "")), (float(np.mean(found)), setting))
            print(f"{contender.name:<52}" + "".join(f"{each:>8.2f}" for each in found), flush=True)
    print(json.dumps({"best": {peer: [setting, round(mean, 2)] for peer, (mean, setting) in best.items()}}))


if __name__ == "__main__":
    main()
