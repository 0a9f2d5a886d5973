"""Agreement between predicted and actual change, as pure functions of arrays."""

from dataclasses import asdict, dataclass
from typing import final

import numpy as np

from upweight.errors import InputError

__all__ = ["Agreement", "agreement", "pearson", "slope"]


def pearson(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Pearson's r of two vectors; NaN when one does not vary.

    Example:
        >>> pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
        1.0
    """
    x, y = predicted - predicted.mean(), actual - actual.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / scale, -1, 1)) if scale > 0 else float("nan")


def slope(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Least-squares slope of actual over predicted: 1 is calibrated, above 1 too timid.

    Example:
        >>> slope(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
        2.0
    """
    x = predicted - predicted.mean()
    return float(x @ (actual - actual.mean()) / (x @ x)) if x @ x > 0 else float("nan")


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
    """

    r: float
    r_interval: tuple[float, float]
    slope: float
    slope_interval: tuple[float, float]
    count: int

    def __str__(self) -> str:
        return (
            f"r = {self.r:.4f} [{self.r_interval[0]:.4f}, {self.r_interval[1]:.4f}], "
            f"slope = {self.slope:.3f} [{self.slope_interval[0]:.3f}, {self.slope_interval[1]:.3f}]"
            f", {self.count} pairs"
        )

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def agreement(
    predicted: np.ndarray, actual: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> Agreement:
    """R and slope with 95 % percentile bootstrap intervals.

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
    x, y = np.atleast_2d(predicted), np.atleast_2d(actual)
    if x.shape != y.shape or x.shape[1] < 3:
        raise InputError(
            f"Agreement needs two arrays of one shape with at least 3 removals; got "
            f"{predicted.shape} and {actual.shape}."
        )
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(draws):
        pick = generator.integers(0, x.shape[1], x.shape[1])
        pairs.append(
            (
                pearson(x[:, pick].ravel(), y[:, pick].ravel()),
                slope(x[:, pick].ravel(), y[:, pick].ravel()),
            )
        )
    drawn = np.array(pairs)
    drawn = drawn[np.isfinite(drawn).all(1)]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0) if len(drawn) else np.full((2, 2), np.nan)
    return Agreement(
        pearson(x.ravel(), y.ravel()),
        (float(low[0]), float(high[0])),
        slope(x.ravel(), y.ravel()),
        (float(low[1]), float(high[1])),
        x.size,
    )
