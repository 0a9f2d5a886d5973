"""What happens to queries when the examples that matter most to each are really removed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from upweight.errors import InputError
from upweight.evaluation.resampling import Estimate, Sampled, counts_of
from upweight.evaluation.similarity import top_positions

__all__ = ["RemovalCurve", "brittleness", "own_changes", "removal_curve", "top_groups"]


def top_groups(scores: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """What to remove: for each count, and in it for each query, the examples scored largest.

    ``Trials.without(top_groups(scores, counts), N, seeds)`` are the retrainings that it takes.

    Args:
        scores: change on removal, ``[q, N]``; those of the most helpful are largest where the
            measure is a loss. Pass −scores where they are smallest.
        counts: k, the size of a group; groups of one query are nested.

    Returns:
        Positions, number of counts times q groups.

    Raises:
        InputError: a count is less than 1 or leaves no example.

    Example:
        >>> top_groups(np.array([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]]), [1])
        [array([1]), array([2])]
    """
    most = max(counts, default=0)
    if not counts or min(counts) < 1 or most >= scores.shape[1]:
        raise InputError(
            f"Counts are between 1 and {scores.shape[1] - 1}, so that an example is left to train "
            f"on; got {list(counts)}."
        )
    order = top_positions(scores, most)
    return [row[:count] for count in counts for row in order]


def own_changes(changes: np.ndarray, queries: int) -> np.ndarray:
    """The change of each query when its own examples left, ``[number of counts, q]``.

    Args:
        changes: of every query after every removal in the order of ``top_groups``, ``[m, q]``.
        queries: q.

    Raises:
        InputError: m is no multiple of q.

    Example:
        >>> own_changes(np.array([[1.0, 0.1], [0.2, 2.0], [3.0, 0.3], [0.4, 4.0]]), 2)
        array([[1., 2.],
               [3., 4.]])
    """
    if changes.shape[1:] != (queries,) or len(changes) % queries:
        raise InputError(
            f"Changes after removals for each of {queries} queries are [m, {queries}] with m a "
            f"multiple of {queries}, got {list(changes.shape)}."
        )
    own = np.arange(queries)
    found: np.ndarray = changes.reshape(-1, queries, queries)[:, own, own]
    return found


@final
@dataclass(frozen=True)
class RemovalCurve:
    """A mean over queries, after removing the k examples that matter most to each.

    Attributes:
        counts: k, ``[number of counts]``.
        points: the mean at each, with its bootstrap samples over queries.
        queries: compared at each count, ``[number of counts]``.
        failed: retrainings without an outcome at each, ``[number of counts]``.
    """

    counts: np.ndarray
    points: tuple[Sampled, ...]
    queries: np.ndarray
    failed: np.ndarray

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """Each mean with its 95 % interval over other queries."""
        return tuple(point.estimate() for point in self.points)


def removal_curve(
    counts: Sequence[int], changes: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> RemovalCurve:
    """Mean change of the queries' measures after removing the top k, for each k.

    Where the measure is a loss, this is the rise of the query's loss that is published as query
    loss difference (QLD): larger = the method found more of what the queries rest on. Take the same
    seed for two methods, and ``points[j].minus(...)`` is their paired difference.

    Args:
        counts: k.
        changes: own change of each query, ``[number of counts, q]``; NaN where a trial failed.
        draws: bootstrap samples.
        seed: of the draws.

    Raises:
        InputError: shapes differ, or too few queries have an outcome for an interval.

    Example:
        >>> print(removal_curve([5], np.full((1, 9), 0.25)).estimates[0])
        0.25 [0.25, 0.25]
    """
    if changes.ndim != 2 or len(changes) != len(counts):
        raise InputError(
            f"{len(counts)} counts take changes [{len(counts)}, q], got {list(changes.shape)}."
        )
    generator = np.random.default_rng(seed)
    # One draw of queries for all counts, so that points of one curve and of two can be compared.
    drawn = counts_of(generator, changes.shape[1], draws, what="queries")
    points, kept = [], []
    for row in changes:
        known = np.isfinite(row)
        counts_of(generator, int(known.sum()), 1, what="queries with an outcome")
        points.append(_mean(np.where(known, row, 0.0), known, drawn))
        kept.append(int(known.sum()))
    queries = np.array(kept)
    return RemovalCurve(np.asarray(counts), tuple(points), queries, changes.shape[1] - queries)


def _mean(values: np.ndarray, known: np.ndarray, drawn: np.ndarray) -> Sampled:
    """Mean ``of values [q]`` that are known, and of samples that hold each drawn ``[b, q]``."""
    total = drawn @ known
    means = np.divide(drawn @ values, total, out=np.full(len(drawn), np.nan), where=total > 0)
    return Sampled(float(values.sum() / known.sum()), means)


def brittleness(
    counts: Sequence[int], before: np.ndarray, after: np.ndarray, *, seed: int = 0
) -> RemovalCurve:
    """Share of the rightly predicted queries that flip once their top k are gone, for each k.

    A prediction is right where its margin is positive, and has flipped where it no longer is.

    Args:
        counts: k.
        before: margins of the model of all data, ``[q]``.
        after: margin of each query without its top k, ``[number of counts, q]``; NaN where a trial
            failed.
        seed: of the bootstrap over queries.

    Raises:
        InputError: shapes differ, or too few queries were right for an interval.

    Source:
        Ilyas et al. (2022), who look for the smallest set that flips a prediction.

    Example:
        >>> before, after = np.full(10, 1.0), np.array([[-1.0] * 4 + [1.0] * 6])
        >>> brittleness([8], before, after).points[0].value
        0.4
    """
    if after.shape != (len(counts), len(before)):
        raise InputError(
            f"{len(counts)} counts of {len(before)} queries take margins "
            f"[{len(counts)}, {len(before)}], got {list(after.shape)}."
        )
    right = before > 0
    flips = np.where(np.isnan(after), np.nan, after <= 0)[:, right]
    return removal_curve(counts, flips, seed=seed)
