"""Peers that need more than numpy, or Vowpal Wabbit as others run it: what our selector is measured against.

A small neural network and gradient-boosted trees learn the residual of the prediction (scikit-learn); Vowpal Wabbit
runs flat over action and context features, with any arguments. All keep the contract of `selector.policy.Policy`.
"""

from __future__ import annotations

import base64
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
import vowpalwabbit
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPRegressor
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]  # ships no types

from selector.errors import InvalidInput, PolicyFailure
from selector.features import Features
from selector.interactions import Action, Candidate, Context, Interaction
from selector.stored import LEAST_SHARE, Stored, mostly, packed, unpacked
from selector.validation import check_candidates, check_context, check_interaction, number
from selector.vw import escaped

Floats = NDArray[np.float64]

# What a loop of the hosted service ran until its operator changed it: its published learner settings and 20 %
# exploration.
HOSTED_DEFAULT = "--cb_explore_adf --epsilon 0.2 --power_t 0 -l 0.001 --cb_type mtr -q ::"
# The best flat settings known for Vowpal Wabbit without any of our parts; gamma and learning rate are to be filled in.
FLAT_SQUARECB = (
    "--cb_explore_adf --squarecb --gamma_scale {gamma} --gamma_exponent 0 --epsilon 0.01 -l {rate} --power_t 0 "
    "--cb_type mtr -q ca -q da -q cf -q df --cubic caf"
)
# Options may read and write files: only these are taken.
OPTIONS = frozenset((
    "--cb_explore_adf", "--squarecb", "--gamma_scale", "--gamma_exponent", "--softmax", "--lambda", "--epsilon",
    "--cb_type", "-l", "--power_t", "-q", "--cubic", "-b", "--random_seed",
))  # fmt: skip
FIRST_FIT, MOST_ROWS = 60, 20_000
# One thread each: threads that wait for one another on busy cores cost scikit-learn a factor of twenty.
THREADS = ThreadpoolController()


class Regressor(Protocol):
    """What is used of a scikit-learn regressor."""

    def fit(self, rows: Floats, targets: Floats) -> object:
        """Learn from scratch."""
        ...

    def predict(self, rows: Floats) -> Floats:
        """One number per row."""
        ...


class _ResidualPolicy(Stored, ABC):
    """Epsilon-greedy on prediction + regressor, which is fitted again whenever ``growth`` more was learnt."""

    def __init__(self, epsilon: float = 0.01, growth: float = 0.15, seed: int = 1, with_history: bool = False) -> None:
        self._epsilon = number("epsilon", epsilon, LEAST_SHARE, 1)
        self._growth = number("growth", growth, 0, 10)
        self._seed = int(number("seed", seed, 0, 2**31 - 1))
        self._features = Features(with_prediction=True, with_history=with_history)
        self._rows: list[Floats] = []
        self._targets: list[float] = []
        self._regressor: Regressor | None = None
        self._fitted = 0

    def state(self) -> dict[str, Any]:
        """Settings, names and everything learnt from: the regressor follows from them."""
        rows = np.array(self._rows).reshape(len(self._rows), self._features.width)
        return {
            "epsilon": self._epsilon,
            "growth": self._growth,
            "seed": self._seed,
            "with_history": self._features.with_history,
            "names": self._features.state(),
            "rows": packed(rows),
            "targets": packed(self._targets),
            "fitted": self._fitted,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Fits the regressor again on what it had seen."""
        policy = cls(state["epsilon"], state["growth"], state["seed"], state["with_history"])
        policy._features = Features.from_state(True, state["names"])
        policy._targets = unpacked(state["targets"], (-1,)).tolist()
        policy._rows = list(unpacked(state["rows"], (len(policy._targets), policy._features.width)))
        policy._fit(int(number("fitted", state["fitted"], 0, len(policy._targets))))
        return policy

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Nearly all on the best corrected prediction; ties go to the first."""
        check_context(context)
        check_candidates(candidates)
        scores = np.array([candidate.prediction.qoe for candidate in candidates])
        if self._regressor is not None:
            rows = self._features.rows(context, candidates)
            with THREADS.limit(limits=1):
                scores = scores + self._regressor.predict(rows)
        return mostly(int(np.argmax(scores)), len(candidates), self._epsilon)

    def learn(self, interaction: Interaction) -> None:
        """Remembers the residual of the chosen action; fits again when enough came in."""
        check_interaction(interaction)
        context, chosen = interaction.context, interaction.candidates[interaction.chosen]
        self._features.learn(context, chosen)
        self._rows.append(self._features.rows(context, [chosen])[0])
        self._targets.append(interaction.reward - chosen.prediction.qoe)
        self._features.remember(context, chosen, interaction.reward)
        if len(self._rows) >= max(FIRST_FIT, self._fitted * (1.0 + self._growth)):
            self._fit(len(self._rows))

    def _fit(self, count: int) -> None:
        self._fitted = count
        if count == 0:
            return
        first = max(count - MOST_ROWS, 0)
        regressor = self._regressor_of(self._seed)
        with warnings.catch_warnings(), THREADS.limit(limits=1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # the number of passes is a setting
            regressor.fit(np.array(self._rows[first:count]), np.array(self._targets[first:count]))
        self._regressor = regressor

    @abstractmethod
    def _regressor_of(self, seed: int) -> Regressor:
        """An untrained regressor."""


class NeuralResidualPolicy(_ResidualPolicy):
    """A network of two hidden layers of 32 on the residual of the prediction."""

    kind = "neural_residual"

    def _regressor_of(self, seed: int) -> Regressor:
        made: Regressor = MLPRegressor(
            hidden_layer_sizes=(32, 32), alpha=1e-3, learning_rate_init=3e-3, max_iter=40, random_state=seed
        )
        return made


class BoostedResidualPolicy(_ResidualPolicy):
    """Gradient-boosted trees on the residual of the prediction."""

    kind = "boosted_residual"

    def _regressor_of(self, seed: int) -> Regressor:
        made: Regressor = HistGradientBoostingRegressor(
            max_iter=60, learning_rate=0.1, max_leaf_nodes=15, min_samples_leaf=10, random_state=seed
        )
        return made


class FlatVowpalWabbitPolicy(Stored):
    """Vowpal Wabbit over action and context features, none of them ours: no prediction, no shortlist of its own.

    Namespaces: c the situation, d the device if ``with_device``, a what the variant is, f the configuration, b
    (``with_standing``) whether the action is the baseline, runs already or is on the device. Its state
    is its log: replaying it is the one way to the same learner whatever the version of Vowpal Wabbit. With
    ``learns_all_lines`` an example is the whole action set with its propensity, as hosted services learn; without,
    the line of the action taken. Numbers stand well away from 0, where Vowpal Wabbit's normalised steps would blow up
    their weights.
    """

    kind = "flat_vowpal_wabbit"

    def __init__(
        self,
        arguments: str = HOSTED_DEFAULT,
        learns_all_lines: bool = True,
        with_device: bool = False,
        with_standing: bool = False,
    ) -> None:
        words = arguments.split() if isinstance(arguments, str) else []
        if "--cb_explore_adf" not in words:
            raise InvalidInput("arguments", "must contain --cb_explore_adf")
        for word in words:
            if word.startswith("-") and word not in OPTIONS:
                raise InvalidInput("arguments", f"may not contain {word[:40]!r}")
        self._arguments, self._learns_all_lines, self._with_device = arguments, learns_all_lines, with_device
        self._with_standing = with_standing
        self._workspace: Any = vowpalwabbit.Workspace(f"--quiet {arguments}")
        self._log: list[bytes] = []
        self._kept: dict[int, tuple[Action, str]] = {}

    def state(self) -> dict[str, Any]:
        """Settings and every example learnt."""
        return {
            "arguments": self._arguments,
            "learns_all_lines": self._learns_all_lines,
            "with_device": self._with_device,
            "with_standing": self._with_standing,
            "log": [base64.b64encode(each).decode() for each in self._log],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Learns the log again."""
        settings = (state[each] for each in ("arguments", "learns_all_lines", "with_device", "with_standing"))
        policy = cls(*settings)
        for each in state["log"]:
            try:
                policy._learn(zlib.decompress(base64.b64decode(each, validate=True)).decode())
            except zlib.error as error:
                raise ValueError(f"log cannot be read: {error}") from error
        return policy

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Vowpal Wabbit's own distribution, with a floor that keeps it positive."""
        check_context(context)
        check_candidates(candidates)
        lines = [self._shared(context), *(self._line(context, candidate.action) for candidate in candidates)]
        shares = np.array(self._workspace.predict("\n".join(lines)), dtype=np.float64)
        if shares.shape != (len(candidates),) or not np.isfinite(shares).all() or abs(shares.sum() - 1.0) > 1e-3:
            raise PolicyFailure("model answered no distribution")
        shares = np.maximum(shares, 1e-6)
        return np.asarray(shares / shares.sum(), dtype=np.float64)

    def learn(self, interaction: Interaction) -> None:
        """One example. Raises InvalidInput, unchanged."""
        check_interaction(interaction)
        label = f"0:{-interaction.reward:.6f}:{max(interaction.propensity, 1e-6):.6f} "
        context, taken = interaction.context, interaction.candidates[interaction.chosen].action
        if self._learns_all_lines:
            shown = [candidate.action for candidate in interaction.candidates if candidate.shortlisted]
            first = self._line(context, taken)
            lines = [self._line(context, action) for action in shown]
            lines = [label + first, *(line for line in lines if line != first)]
        else:
            lines = [f"0:{-interaction.reward:.6f}:1 " + self._line(context, taken)]
        self._learn("\n".join([self._shared(context), *lines]))

    def _learn(self, example: str) -> None:
        self._workspace.learn(example)
        self._log.append(zlib.compress(example.encode(), 1))

    def _shared(self, context: Context) -> str:
        rate, slo = np.log10(max(context.arrival_rate_rps, 1e-3)) / 10 + 0.5, np.log10(context.slo_p95_ms) / 10 + 0.5
        parts = [f"shared |c k_{escaped(context.device_class)} u_{escaped(context.application)}"]
        parts.append(f" rate:{rate:.4f} slo:{slo:.4f} load:{context.cpu_load_share:.4f} cores:{context.cores / 8:.3f}")
        if context.incumbent:
            parts.append(f" i_{escaped(context.incumbent)}")
        for key in sorted(context.features):
            value = context.features[key]
            if isinstance(value, str):
                parts.append(f" {escaped(key)}_is_{escaped(value)}")
            else:
                parts.append(f" f_{escaped(key)}:{np.clip(value, -10, 10):.4f}")
        if self._with_device:
            parts.append(f" |d d_{escaped(context.device)}")
        return "".join(parts)

    def _line(self, context: Context, action: Action) -> str:
        return self._about(action) + _standing(context, action) if self._with_standing else self._about(action)

    def _about(self, action: Action) -> str:
        found = self._kept.get(id(action))
        if found is not None and found[0] is action:
            return found[1]
        variant, bounds = action.variant, action.configuration
        line = (
            f"|a v_{escaped(variant.digest[:12])} p_{escaped(variant.precision)} accuracy:{variant.accuracy:.4f} "
            f"size:{np.log10(max(variant.size_bytes, 1)) / 10:.4f} "
            f"|f b_{bounds.max_batch} c_{bounds.max_concurrency} t_{bounds.threads} "
            f"batch:{np.log2(bounds.max_batch) / 10 + 0.5:.4f} callers:{np.log2(bounds.max_concurrency) / 10 + 0.5:.4f}"
        )
        self._kept[id(action)] = action, line
        return line


def _standing(context: Context, action: Action) -> str:
    holds = {
        "baseline": action.key == context.baseline,
        "runs": action.key == context.incumbent,
        "here": action.variant.digest in context.cached_digests,
    }
    return " |b " + " ".join(name for name, is_so in holds.items() if is_so)
