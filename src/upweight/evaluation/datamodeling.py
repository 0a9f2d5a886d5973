"""The linear datamodeling score: do summed scores order what subsets of the data really do?"""

from dataclasses import dataclass
from typing import final

import numpy as np

from upweight.errors import InputError
from upweight.evaluation.ranks import rank_correlations, sampled_rank_correlations
from upweight.evaluation.resampling import Estimate, Resamples, Sampled

__all__ = ["DatamodelingScore", "datamodeling_score", "group_effects", "outcomes"]


def group_effects(scores: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Predicted change when a group leaves: Σ_{i gone} score[q, i], ``[q, m]``.

    Scores are changes on removal, so that those of the examples that left are summed; the sum over
    those that stay, which Park et al. (2023) take, orders subsets the other way round.

    Args:
        scores: ``[q, N]``.
        gone: examples that are left out, ``[m, N]``.

    Raises:
        InputError: they are of different examples.

    Example:
        >>> group_effects(np.array([[1.0, 2.0, 4.0]]), np.array([[True, False, True]]))
        array([[5.]])
    """
    if scores.ndim != 2 or gone.ndim != 2 or scores.shape[1] != gone.shape[1]:
        raise InputError(
            f"Scores [q, N] and examples left out [m, N] are needed, got {list(scores.shape)} and "
            f"{list(gone.shape)}."
        )
    return np.asarray(scores, dtype=np.float64) @ gone.T.astype(np.float64)


def outcomes(measured: np.ndarray) -> np.ndarray:
    """Which trials have an outcome for every query, ``[m]``; the others failed.

    Args:
        measured: ``[q, m]``.

    Example:
        >>> outcomes(np.array([[0.1, np.nan, 0.3]]))
        array([ True, False,  True])
    """
    found: np.ndarray = np.isfinite(measured).all(0)
    return found


@final
@dataclass(frozen=True)
class DatamodelingScore:
    """How well summed scores order what really happened.

    Attributes:
        sampled: the mean over queries, and its bootstrap samples.
        per_query: Spearman's ρ of each query, ``[q]``; NaN where nothing varies.
        query_intervals: 95 % of each over other subsets, ``[q, 2]``.
        trials: subsets compared.
        failed: subsets without an outcome, which are left out.
        constant: queries of which the prediction or the outcome does not vary, left out.
    """

    sampled: Sampled
    per_query: np.ndarray
    query_intervals: np.ndarray
    trials: int
    failed: int
    constant: int

    @property
    def estimate(self) -> Estimate:
        """The mean over queries with its 95 % interval over other queries and other subsets."""
        return self.sampled.estimate()

    def __str__(self) -> str:
        absent = f", {self.failed} failed" if self.failed else ""
        flat = f", {self.constant} queries do not vary" if self.constant else ""
        return (
            f"LDS {self.estimate} of {len(self.per_query)} queries and {self.trials} subsets"
            f"{absent}{flat}"
        )


def datamodeling_score(
    predicted: np.ndarray, measured: np.ndarray, *, resamples: Resamples | None = None
) -> DatamodelingScore:
    """Spearman's ρ of predicted and measured effects over subsets, mean over queries.

    LDS = mean_q ρ_m(Σ_{i gone from m} score[q, i], measured[q, m]); 1 where every query's subsets
    are in the right order, 0 for predictions that know nothing. The interval is over other queries
    and other subsets.

    Args:
        predicted: ``[q, m]``, as ``group_effects`` gives them.
        measured: change of each query's measure, ``[q, m]``; NaN where a trial failed.
        resamples: of the trials that have an outcome; pass the same to compare two methods.

    Raises:
        InputError: shapes differ, or too few subsets have an outcome for an interval.

    Source:
        Park et al. (2023), with subsets of another size if you like.

    Example:
        >>> effect = np.arange(12.0)
        >>> print(datamodeling_score(np.stack([effect, -effect]), np.stack([effect**3, effect])))
        LDS 0.00 [-1.00, 1.00] of 2 queries and 12 subsets
    """
    if predicted.shape != measured.shape or predicted.ndim != 2:
        raise InputError(
            f"Predicted and measured effects are [q, m], got {list(predicted.shape)} and "
            f"{list(measured.shape)}."
        )
    kept = outcomes(measured)
    x, y = predicted[:, kept].astype(np.float64), measured[:, kept].astype(np.float64)
    if resamples is None:
        resamples = Resamples.two_way(x.shape[1], len(x))
    if resamples.trials.shape[1] != x.shape[1] or resamples.queries.shape[1] != len(x):
        raise InputError(
            f"The samples are of {resamples.trials.shape[1]} trials and "
            f"{resamples.queries.shape[1]} queries; {x.shape[1]} trials of {len(x)} queries have "
            "an outcome."
        )
    per_query = rank_correlations(x, y)
    drawn = np.stack(
        [sampled_rank_correlations(*pair, resamples.trials) for pair in zip(x, y, strict=True)], 1
    )
    return DatamodelingScore(
        Sampled(_mean(per_query), _weighted_mean(drawn, resamples.queries)),
        per_query,
        _intervals(per_query, drawn),
        int(kept.sum()),
        int((~kept).sum()),
        int(np.isnan(per_query).sum()),
    )


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _weighted_mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means ``[b]`` of what is known of values ``[b, q]``, each counted as often as drawn."""
    counts = np.where(np.isnan(values), 0, counts)
    total = counts.sum(1)
    means = np.full(len(values), np.nan)
    np.divide((np.nan_to_num(values) * counts).sum(1), total, out=means, where=total > 0)
    return means


def _intervals(values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """95 % intervals ``[q, 2]`` of values ``[q]`` with samples ``[b, q]``."""
    pairs = zip(values.tolist(), drawn.T, strict=True)
    found = [Sampled(value, column).estimate() for value, column in pairs]
    return np.array([(one.low, one.high) for one in found]).reshape(-1, 2)
