"""Agreement between predicted and actual change, as pure functions of arrays."""

from dataclasses import asdict, dataclass
from typing import final

import numpy as np

from upweight.errors import InputError
from upweight.evaluation.ranks import (
    correlations,
    rank_correlations,
    sampled_rank_correlations,
)
from upweight.evaluation.resampling import Resamples, Sampled

__all__ = ["Agreement", "agreement", "pearson", "pooled", "slope"]

# Ranks of a sample take a pass over all pairs: so many numbers in all, in steps that fit a cache.
MOST_RANKS, RANKS_AT_ONCE, LEAST_DRAWS = 2**20, 2**18, 200
# Below this share of the mean square, a variance is what rounding left of nothing.
NOTHING = 1e-12


def pearson(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Pearson's r of two vectors; NaN when one does not vary.

    Example:
        >>> pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
        1.0
    """
    return float(correlations(predicted.ravel(), actual.ravel()))


def slope(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Least-squares slope of actual over predicted: 1 is calibrated, above 1 too timid.

    Example:
        >>> slope(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
        2.0
    """
    x = predicted - predicted.mean()
    return float(x @ (actual - actual.mean()) / (x @ x)) if x @ x > 0 else float("nan")


def pooled(
    predicted: np.ndarray, actual: np.ndarray, resamples: Resamples
) -> tuple[Sampled, Sampled]:
    """Pearson's r and the slope over all pairs of queries and trials, with bootstrap samples.

    Args:
        predicted: ``[q, m]``.
        actual: ``[q, m]``.
        resamples: of the m trials and the q queries.

    Example:
        >>> effects = np.arange(20.0).reshape(2, 10)
        >>> r, size = pooled(effects, 3 * effects, Resamples.two_way(10, 2))
        >>> round(r.value, 6), round(size.estimate().low, 6)
        (1.0, 3.0)
    """
    x, y = predicted.astype(np.float64), actual.astype(np.float64)
    r, size = _moments_of(x, y, resamples)
    return Sampled(pearson(x, y), r), Sampled(slope(x.ravel(), y.ravel()), size)


def _moments_of(
    x: np.ndarray, y: np.ndarray, resamples: Resamples
) -> tuple[np.ndarray, np.ndarray]:
    """R and slope ``[b]`` of samples, from weighted sums alone: no sample is ever formed."""
    units = [max(float(np.abs(values - values.mean()).max()), 1e-300) for values in (x, y)]
    # Around the mean of all pairs, so that the squares that are subtracted are not large.
    x, y = ((values - values.mean()) / unit for values, unit in zip((x, y), units, strict=True))
    count = resamples.trials.sum(1) * resamples.queries.sum(1)

    def mean(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = ((resamples.queries @ values) * resamples.trials).sum(1) / count
        return found

    means = mean(x), mean(y)
    squares = mean(x * x), mean(y * y)
    variances = [square - centre**2 for square, centre in zip(squares, means, strict=True)]
    vary = [v > NOTHING * square for v, square in zip(variances, squares, strict=True)]
    product = mean(x * y) - means[0] * means[1]
    r, size = np.full((2, len(count)), np.nan)
    scale = np.sqrt(np.where(vary[0] & vary[1], variances[0] * variances[1], 1))
    np.divide(product, scale, out=r, where=vary[0] & vary[1])
    np.divide(product, variances[0], out=size, where=vary[0])
    return np.clip(r, -1, 1), size * units[1] / units[0]


@final
@dataclass(frozen=True)
class Agreement:
    """How predictions compare with what happened.

    Attributes:
        r: Pearson's correlation.
        r_interval: 95 % bootstrap interval.
        slope: of actual over predicted.
        slope_interval: 95 % bootstrap interval.
        count: pairs compared.
        rank: Spearman's correlation, of midranks.
        rank_interval: 95 % bootstrap interval.
    """

    r: float
    r_interval: tuple[float, float]
    slope: float
    slope_interval: tuple[float, float]
    count: int
    rank: float
    rank_interval: tuple[float, float]

    def __str__(self) -> str:
        return (
            f"r = {self.r:.4f} [{self.r_interval[0]:.4f}, {self.r_interval[1]:.4f}], "
            f"slope = {self.slope:.3f} [{self.slope_interval[0]:.3f}, {self.slope_interval[1]:.3f}]"
            f", rank r = {self.rank:.4f}, {self.count} pairs"
        )

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def agreement(
    predicted: np.ndarray, actual: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> Agreement:
    """R, slope and rank correlation with 95 % percentile bootstrap intervals.

    Args:
        predicted: ``[m]``, or ``[q, m]`` for several queries; the m removals are resampled.
        actual: of the same shape.
        draws: bootstrap samples.
        seed: of the draws.

    Raises:
        InputError: shapes differ, or fewer than 3 removals.

    Example:
        >>> agreement(np.arange(5.0), 2 * np.arange(5.0)).slope
        2.0
    """
    x, y = np.atleast_2d(predicted).astype(np.float64), np.atleast_2d(actual).astype(np.float64)
    if x.shape != y.shape or x.shape[1] < 3:
        raise InputError(
            f"Agreement needs two arrays of one shape with at least 3 removals; got "
            f"{predicted.shape} and {actual.shape}."
        )
    resamples = Resamples.of_trials(x.shape[1], len(x), draws=draws, seed=seed)
    r, size = pooled(x, y, resamples)
    known = np.isfinite(r.draws) & np.isfinite(size.draws)
    return Agreement(
        r.value,
        _percentiles(r.draws[known]),
        size.value,
        _percentiles(size.draws[known]),
        x.size,
        float(rank_correlations(x.ravel(), y.ravel())),
        _percentiles(_rank_draws(x, y, resamples)),
    )


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    known = draws[np.isfinite(draws)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def _rank_draws(x: np.ndarray, y: np.ndarray, resamples: Resamples) -> np.ndarray:
    """Spearman's ρ of all pairs in samples of the trials, fewer samples where pairs are many."""
    counts = resamples.trials[: max(MOST_RANKS // x.size, LEAST_DRAWS)]
    step = max(RANKS_AT_ONCE // x.size, 1)
    parts = [
        sampled_rank_correlations(
            x.ravel(), y.ravel(), np.tile(counts[start : start + step], len(x))
        )
        for start in range(0, len(counts), step)
    ]
    return np.concatenate(parts)
