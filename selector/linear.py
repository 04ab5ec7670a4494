"""Linear bandits over dense features, one model for the whole fleet: LinUCB and linear Thompson sampling.

LinUCB: Li, Chu, Langford & Schapire, "A contextual-bandit approach to personalized news article recommendation"
(WWW 2010), with one shared model. LinTS: Agrawal & Goyal, "Thompson sampling for contextual bandits with linear
payoffs" (ICML 2013). Both keep the inverse of the regularised Gram matrix by Sherman & Morrison's update.

>>> from selector.linear import LinUcbPolicy
>>> policy = LinUcbPolicy(alpha=0.3, with_prediction=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from selector.features import QOE_FROM_END, Features
from selector.interactions import Candidate, Context, Interaction
from selector.stored import LEAST_SHARE, Stored, mostly, packed, unpacked
from selector.tabular import normals, shares_of_best
from selector.validation import check_candidates, check_context, check_interaction, number

Floats = NDArray[np.float64]
DRAWS = 32


class _LinearPolicy(Stored):
    """Ridge regression of the reward on the features of the chosen candidate.

    ``alpha`` scales the width of the confidence, ``ridge`` the prior precision of every weight. With the prediction
    among the features its weight starts at 1, so that a new policy follows the prediction. ``with_history`` adds what
    came of earlier leases of the device, its variants and its group.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        ridge: float = 1.0,
        epsilon: float = LEAST_SHARE,
        with_prediction: bool = False,
        with_history: bool = False,
    ) -> None:
        self._alpha = number("alpha", alpha, 0, 100)
        self._ridge = number("ridge", ridge, 1e-6, 1e6)
        self._epsilon = number("epsilon", epsilon, LEAST_SHARE, 1)
        self._features = Features(with_prediction, with_history)
        width = self._features.width
        self._weights = np.zeros(width)
        if with_prediction:
            self._weights[-QOE_FROM_END] = 1.0
        self._inverse = np.eye(width) / self._ridge

    def state(self) -> dict[str, Any]:
        """Settings, names, weights and the upper triangle of the inverse."""
        upper = self._inverse[np.triu_indices(len(self._inverse))]
        return {
            "alpha": self._alpha,
            "ridge": self._ridge,
            "epsilon": self._epsilon,
            "with_prediction": self._features.with_prediction,
            "with_history": self._features.with_history,
            "names": self._features.state(),
            "weights": packed(self._weights),
            "inverse": packed(upper),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Raises ValueError for arrays of another length."""
        settings = (state[each] for each in ("alpha", "ridge", "epsilon", "with_prediction", "with_history"))
        policy = cls(*settings)
        policy._features = Features.from_state(state["with_prediction"], state["names"])
        width = policy._features.width
        policy._weights = unpacked(state["weights"], (width,))
        upper = np.zeros((width, width))
        upper[np.triu_indices(width)] = unpacked(state["inverse"], (width * (width + 1) // 2,))
        policy._inverse = upper + np.triu(upper, 1).T
        return policy

    def learn(self, interaction: Interaction) -> None:
        """One step of recursive least squares on the chosen candidate. Raises InvalidInput, unchanged."""
        check_interaction(interaction)
        context, chosen = interaction.context, interaction.candidates[interaction.chosen]
        self._features.learn(context, chosen)
        row = self._features.rows(context, [chosen])[0]
        direction = self._inverse @ row
        scale = 1.0 + float(row @ direction)
        self._weights += direction * ((interaction.reward - float(row @ self._weights)) / scale)
        # An outer product is symmetric to the last bit, so the inverse stays symmetric.
        self._inverse -= np.outer(direction, direction) / scale
        self._features.remember(context, chosen, interaction.reward)

    def _rows(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        check_context(context)
        check_candidates(candidates)
        return self._features.rows(context, candidates)


class LinUcbPolicy(_LinearPolicy):
    """Takes the highest upper confidence bound ``x·w + alpha * sqrt(x' A⁻¹ x)``."""

    kind = "linucb"

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Nearly all on the highest bound; ties go to the first."""
        rows = self._rows(context, candidates)
        variance = np.einsum("ij,ij->i", rows @ self._inverse, rows)
        bounds = rows @ self._weights + self._alpha * np.sqrt(np.maximum(variance, 0.0))
        return mostly(int(np.argmax(bounds)), len(candidates), self._epsilon)


class LinTsPolicy(_LinearPolicy):
    """Takes each candidate as often as it is the best under weights drawn from the posterior.

    The draws come from fixed normal numbers, so that asking twice gives the same distribution; ``rank`` samples.
    """

    kind = "lints"

    def __init__(
        self,
        alpha: float = 0.1,
        ridge: float = 1.0,
        epsilon: float = LEAST_SHARE,
        with_prediction: bool = False,
        with_history: bool = False,
    ) -> None:
        super().__init__(alpha, ridge, epsilon, with_prediction, with_history)
        self._deviations: Floats | None = None

    def learn(self, interaction: Interaction) -> None:
        """As every linear policy; the posterior is factored again when next asked."""
        super().learn(interaction)
        self._deviations = None

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Shares of posterior draws, mixed with ``epsilon`` uniform."""
        rows = self._rows(context, candidates)
        if self._deviations is None:
            self._deviations = normals(DRAWS, len(self._weights)) @ _root(self._inverse).T
        drawn = self._weights + self._alpha * self._deviations
        return shares_of_best(drawn @ rows.T, self._epsilon)


def _root(matrix: Floats) -> Floats:
    """R with R R' = matrix, also where rounding left an eigenvalue a little below zero."""
    try:
        return np.asarray(np.linalg.cholesky(matrix), dtype=np.float64)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(matrix)
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)), dtype=np.float64)
