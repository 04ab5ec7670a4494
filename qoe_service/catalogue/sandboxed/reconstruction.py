"""Which columns of a matrix stand for the others, and the best linear guess of the others from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
RIDGE = 1e-3  # of the mean variance: keeps a fit to few samples from swinging


@dataclass(frozen=True)
class Moments:
    """Rows [samples × positions, channels], and their sums of products where those are smaller than the rows.

    A sweep asks for many fits to the same rows; from the sums each costs the same however many rows there are.
    """

    rows: Floats
    mean: NDArray[np.float64]
    centred: NDArray[np.float64] | None

    @classmethod
    def of(cls, rows: Floats) -> Moments:
        """Add up once."""
        mean = rows.mean(axis=0, dtype=np.float64)
        if len(rows) < rows.shape[1]:
            return cls(rows, mean, None)
        shifted = rows - mean
        return cls(rows, mean, shifted.T @ shifted)

    def squares(self, weights: NDArray[np.float64], offset: NDArray[np.float64]) -> float:
        """The sum of squares of ``(rows − mean) @ weights + offset``."""
        if self.centred is None:
            return float((((self.rows - self.mean) @ weights + offset) ** 2).sum())
        return float((weights * (self.centred @ weights)).sum() + len(self.rows) * (offset**2).sum())


@dataclass(frozen=True)
class Mixture:
    """The best linear guess of the missing channels from the kept ones, by ridge regression: kept @ left @ right."""

    keep: NDArray[np.int64]
    missing: NDArray[np.int64]
    left: NDArray[Any]
    right: NDArray[Any]
    offset: NDArray[np.float64]

    @classmethod
    def fitted(cls, moments: Moments, keep: NDArray[np.int64]) -> Mixture:
        """Fit; with fewer rows than channels nothing larger than rows × channels is formed."""
        rows, mean = moments.rows, moments.mean
        missing = np.setdiff1d(np.arange(rows.shape[1]), keep)
        if moments.centred is None:
            base, wanted = rows[:, keep] - mean[keep], rows[:, missing] - mean[missing]
            damping = RIDGE * max(float((base**2).sum(axis=0).mean()), 1e-12)
            left: NDArray[Any] = base.T
            right: NDArray[Any] = np.linalg.solve(base @ base.T + damping * np.eye(len(rows)), wanted)
        else:
            own, cross = moments.centred[np.ix_(keep, keep)], moments.centred[np.ix_(keep, missing)]
            damping = RIDGE * max(float(own.diagonal().mean()), 1e-12)
            left, right = np.linalg.solve(own + damping * np.eye(len(keep)), cross), np.eye(len(missing))
        return cls(keep, missing, left, right, mean[missing] - (mean[keep] @ left) @ right)

    def guess(self, kept: NDArray[Any]) -> NDArray[np.float64]:
        """The missing channels of other rows."""
        return np.asarray((kept @ self.left) @ self.right + self.offset)

    def absorbed(self, by_channel: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights [channels, positions, outputs] of a reader as weights of the kept channels alone."""
        flat = by_channel.reshape(len(by_channel), -1)
        mixed = flat[self.keep] + self.left @ (self.right @ flat[self.missing])
        return mixed.reshape(len(self.keep), *by_channel.shape[1:])


def pivoted_order(rows: Floats) -> NDArray[np.int64]:
    """Columns in the order of how much they add to the span of those before; the rest by size.

    Pivoted Cholesky on the columns' Gram matrix, whose rows are made as they are needed.
    """
    rows = rows.astype(np.float64)
    sizes = (rows**2).sum(axis=0)
    left, chosen, order = sizes.copy(), np.zeros(len(sizes), dtype=bool), list[int]()
    factor = np.zeros((min(rows.shape), rows.shape[1]))
    for step in range(len(factor)):
        pivot = int(np.argmax(np.where(chosen, -np.inf, left)))
        if left[pivot] <= 1e-10 * sizes.max():
            break
        gram_row = rows[:, pivot] @ rows
        factor[step] = (gram_row - factor[:step, pivot] @ factor[:step]) / np.sqrt(left[pivot])
        left -= factor[step] ** 2
        chosen[pivot] = True
        order.append(pivot)
    rest = np.flatnonzero(~chosen)
    return np.array([*order, *rest[np.argsort(-sizes[rest], kind="stable")]], dtype=np.int64)
