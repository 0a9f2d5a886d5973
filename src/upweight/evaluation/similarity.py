"""Two methods, or many draws of one: how alike are their scores?"""

from dataclasses import dataclass
from typing import final

import numpy as np

from upweight.errors import InputError
from upweight.evaluation.ranks import correlations, midranks, rank_correlations

__all__ = ["Similarity", "Stability", "similarity", "stability", "top_positions"]


def top_positions(scores: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row, largest first, ``[q, k]``; of equal ones the first.

    Args:
        scores: ``[q, N]``; pass −scores for the most harmful, their sizes for the most influential.
        k: at least 1 and at most N.

    Raises:
        InputError: k is out of range.

    Example:
        >>> top_positions(np.array([[1.0, 3.0, 2.0, 3.0]]), 3)
        array([[1, 3, 2]])
    """
    if not 1 <= k <= scores.shape[-1]:
        raise InputError(f"k is between 1 and {scores.shape[-1]} examples, got {k}.")
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def _members(scores: np.ndarray, k: int) -> np.ndarray:
    """Whether each score is among the k largest in size of its row, of the scores' shape."""
    inside = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(inside, top_positions(np.abs(scores), k), True, axis=-1)
    return inside


@final
@dataclass(frozen=True)
class Similarity:
    """How alike two methods' scores are, query by query.

    Attributes:
        pearson: r of each row, ``[q]``; NaN where one does not vary.
        spearman: of ranks, ``[q]``; NaN there too.
        overlap: share of one's k largest scores in size that are among the other's, ``[q]``.
        relative_error: ‖one − other‖ / ‖other‖, ``[q]``; NaN where the other is 0.
        constant: rows that do not vary in one of the two.
    """

    pearson: np.ndarray
    spearman: np.ndarray
    overlap: np.ndarray
    relative_error: np.ndarray
    constant: int


def similarity(one: np.ndarray, other: np.ndarray, *, k: int = 10) -> Similarity:
    """Compare two methods' scores of the same queries and examples, row by row.

    Correlations forgive a wrong scale, so that an error of the values is beside them.

    Args:
        one: ``[q, N]``.
        other: the reference, ``[q, N]``.
        k: scores that count for the overlap.

    Raises:
        InputError: shapes differ, or k is out of range.

    Example:
        >>> scores = np.array([[1.0, 2.0, -4.0]])
        >>> found = similarity(2 * scores, scores, k=2)
        >>> found.pearson.round(6), found.overlap, found.relative_error
        (array([1.]), array([1.]), array([1.]))
    """
    if one.shape != other.shape or one.ndim != 2:
        raise InputError(
            f"Two arrays of scores [q, N] are needed, got {list(one.shape)} and "
            f"{list(other.shape)}."
        )
    x, y = one.astype(np.float64), other.astype(np.float64)
    size = np.linalg.norm(y, axis=1)
    error = np.linalg.norm(x - y, axis=1)
    pearson = correlations(x, y)
    return Similarity(
        pearson,
        rank_correlations(x, y),
        (_members(x, k) & _members(y, k)).sum(1) / k,
        np.divide(error, size, out=np.full(len(x), np.nan), where=size > 0),
        int(np.isnan(pearson).sum()),
    )


@final
@dataclass(frozen=True)
class Stability:
    """How much scores depend on what was drawn: seeds, checkpoints, Monte-Carlo samples.

    Attributes:
        pearson: mean r over all pairs of draws, ``[q]``; NaN where a draw does not vary.
        spearman: the same of ranks, ``[q]``.
        overlap: mean share of the k largest in size that two draws have in common, ``[q]``.
        spread: √(mean variance over draws / mean square of the mean), ``[q]``: the noise of one
            draw, relative to the scores.
        constant: queries of which a draw does not vary.
    """

    pearson: np.ndarray
    spearman: np.ndarray
    overlap: np.ndarray
    spread: np.ndarray
    constant: int


def stability(scores: np.ndarray, *, k: int = 10) -> Stability:
    """Compare scores of the same queries and examples over draws, each pair of draws once.

    Args:
        scores: one table for each draw, ``[s, q, N]``, at least two.
        k: scores that count for the overlap.

    Raises:
        InputError: fewer than two draws, or k is out of range.

    Example:
        >>> scores = np.array([[[1.0, 2.0, 4.0]], [[1.0, 2.0, 3.0]], [[2.0, 1.0, 4.0]]])
        >>> found = stability(scores, k=1)
        >>> found.spearman.round(3), found.overlap
        (array([0.667]), array([1.]))
    """
    if scores.ndim != 3 or len(scores) < 2:
        raise InputError(
            f"Scores of at least two draws [s, q, N] are needed, got {list(scores.shape)}."
        )
    draws, values = len(scores), scores.astype(np.float64)
    pearson = _pairwise(values)
    held = _members(values, k).sum(0)
    shared = (held * (held - 1) / 2).sum(1)
    noise, size = values.var(0, ddof=1).mean(1), (values.mean(0) ** 2).mean(1)
    spread = np.divide(noise, size, out=np.full(len(size), np.nan), where=size > 0)
    return Stability(
        pearson,
        _pairwise(midranks(values)),
        shared / (k * draws * (draws - 1) / 2),
        np.sqrt(spread),
        int(np.isnan(pearson).sum()),
    )


def _pairwise(values: np.ndarray) -> np.ndarray:
    """Mean correlation ``[q]`` over pairs of draws ``[s, q, N]``.

    Of rows z_s of length 1, Σ_{s<t} z_s·z_t = (‖Σ_s z_s‖² − number of draws) / 2.
    """
    varies = (values != values[..., :1]).any(-1).all(0)
    rows = values - values.mean(-1, keepdims=True)
    rows = rows / np.where(varies, np.abs(rows).max(-1), 1)[..., None]
    rows = rows / np.where(varies, np.linalg.norm(rows, axis=-1), 1)[..., None]
    draws = len(values)
    total = ((rows.sum(0) ** 2).sum(-1) - draws) / (draws * (draws - 1))
    return np.where(varies, np.clip(total, -1, 1), np.nan)
