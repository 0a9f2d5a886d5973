"""How far the noise of training lets any prediction come."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import final

import numpy as np

from upweight.errors import InputError
from upweight.evaluation.ranks import correlations, rank_correlations

__all__ = ["Ceiling", "ceiling", "reliability", "spearman_brown"]

Correlate = Callable[[np.ndarray, np.ndarray], np.ndarray]


def reliability(changes: np.ndarray, correlate: Correlate = correlations) -> np.ndarray:
    """How well one seed's changes agree with another's, the mean over pairs of seeds, ``[q]``.

    With change = effect + noise, and noise that is independent between seeds, the expected
    correlation r₁ of two seeds is the share of the effect in the variance over changes of the data.
    NaN for a single seed, and where a query's changes do not vary.

    Args:
        changes: of each query by each change of the data, with each seed, ``[s, u, q]``.
        correlate: Pearson's or Spearman's, of rows.

    Raises:
        InputError: another shape.

    Source: Spearman (1904).

    Example:
        >>> effect = np.arange(5.0)[None, :, None]
        >>> reliability(np.concatenate([effect, 3 * effect]))
        array([1.])
    """
    if changes.ndim != 3:
        raise InputError(f"Changes are [seeds, changes, queries], got {list(changes.shape)}.")
    rows = changes.swapaxes(1, 2)
    pairs = [correlate(rows[a], rows[b]) for a, b in combinations(range(len(rows)), 2)]
    unknown = np.full(changes.shape[2], np.nan)
    found: np.ndarray = np.mean(pairs, axis=0) if pairs else unknown
    return found


def spearman_brown(r: np.ndarray, seeds: int) -> np.ndarray:
    """Reliability of the mean over k seeds from that of one, k r / (1 + (k − 1) r), at least 0.

    Source: Spearman (1910), Brown (1910).

    Example:
        >>> spearman_brown(np.array([0.5, -0.1]), 2).round(3)
        array([0.667, 0.   ])
    """
    found: np.ndarray = seeds * np.maximum(r, 0) / (1 + (seeds - 1) * np.maximum(r, 0))
    return found


@final
@dataclass(frozen=True)
class Ceiling:
    """The highest correlation over changes of the data that a prediction can be expected to have.

    Attributes:
        pearson: of each query, ``[q]``; NaN where it is not known.
        spearman: of each query, ``[q]``.
        seeds: over how many the true changes are averaged.
    """

    pearson: np.ndarray
    spearman: np.ndarray
    seeds: int

    @property
    def means(self) -> tuple[float, float]:
        """Pearson's and Spearman's, each the mean over the queries for which it is known."""
        known = [row[np.isfinite(row)] for row in (self.pearson, self.spearman)]
        first, second = (float(row.mean()) if len(row) else float("nan") for row in known)
        return first, second

    def __str__(self) -> str:
        if not np.isfinite(self.pearson).any():
            return "ceiling unknown: the noise of training takes at least two seeds to see"
        pearson, spearman = self.means
        return (
            f"ceiling r ≤ {pearson:.2f}, ρ ≤ {spearman:.2f} for the mean of {self.seeds} seed"
            f"{'s' * (self.seeds > 1)}"
        )


def ceiling(changes: np.ndarray, *, seeds: int) -> Ceiling:
    """√reliability of the mean over k seeds, by Pearson and by Spearman.

    The mean of k seeds is the effect and a k-th of the noise's variance. A prediction that is the
    effect itself correlates with it by the root of its reliability, ρ_k = k r₁ / (1 + (k − 1) r₁),
    and one that does not know how chance fell cannot do better. With one seed r₁ is unknown: NaN.
    For ranks the same formula is an approximation. An estimate from few changes of the data is
    uncertain itself, and a prediction may then come out above it.

    Args:
        changes: of each query by each change of the data, with each seed, ``[s, u, q]``.
        seeds: k; s for the mean over all, 1 for what happens to a single model.

    Raises:
        InputError: another shape, or fewer than one seed.

    Example:
        >>> noise = np.random.default_rng(0).standard_normal((2, 200, 1))
        >>> effect = np.random.default_rng(1).standard_normal((1, 200, 1))
        >>> print(ceiling(effect + noise, seeds=1))
        ceiling r ≤ 0.65, ρ ≤ 0.60 for the mean of 1 seed
    """
    if seeds < 1:
        raise InputError(f"A mean is over at least one seed, got {seeds}.")
    pearson, spearman = (
        np.sqrt(spearman_brown(reliability(changes, correlate), seeds))
        for correlate in (correlations, rank_correlations)
    )
    return Ceiling(pearson, spearman, seeds)
