"""Ranks with ties, and correlations of rows: of values, of ranks, and of bootstrap samples."""

import numpy as np

from upweight.errors import InputError

__all__ = ["correlations", "midranks", "rank_correlations", "sampled_rank_correlations"]


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last place of the run of equal values around each place of sorted rows."""
    places = np.arange(ordered.shape[-1])
    starts, ends = np.ones(ordered.shape, dtype=bool), np.ones(ordered.shape, dtype=bool)
    starts[..., 1:] = ends[..., :-1] = ordered[..., 1:] != ordered[..., :-1]
    first = np.maximum.accumulate(np.where(starts, places, 0), axis=-1)
    back = np.where(ends, places, len(places) - 1)[..., ::-1]
    return first, np.minimum.accumulate(back, axis=-1)[..., ::-1]


def midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis; equal values share the mean of their ranks.

    Example:
        >>> midranks(np.array([30.0, 10.0, 30.0, 20.0]))
        array([3.5, 1. , 3.5, 2. ])
    """
    order = np.argsort(values, axis=-1, kind="stable")
    first, last = _runs(np.take_along_axis(values, order, axis=-1))
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=-1)
    return ranks


def _require_alike(one: np.ndarray, other: np.ndarray) -> None:
    if one.shape != other.shape or one.ndim < 1:
        raise InputError(
            f"Correlations need two arrays of one shape [..., m], got {list(one.shape)} and "
            f"{list(other.shape)}."
        )


def correlations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Pearson's r of each pair of rows ``[..., m]``, as ``[...]``; NaN where a row is constant.

    Raises:
        InputError: the shapes differ.

    Example:
        >>> correlations(np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]), np.ones((2, 1)) * [3, 2, 1])
        array([-1., nan])
    """
    _require_alike(one, other)
    x, y = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    # A mean is rounded, so that a constant row need not be 0 after it is taken away.
    varies = (x != x[..., :1]).any(-1) & (y != y[..., :1]).any(-1)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    # Tiny values, as changes of a loss are, must not underflow when they are squared.
    x = x / np.where(varies, np.abs(x).max(-1), 1)[..., None]
    y = y / np.where(varies, np.abs(y).max(-1), 1)[..., None]
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    found: np.ndarray = np.full(scale.shape, np.nan)
    np.divide((x * y).sum(-1), scale, out=found, where=varies)
    return found.clip(-1, 1)


def rank_correlations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Spearman's ρ of each pair of rows ``[..., m]``, as ``[...]``; NaN where a row is constant.

    It is Pearson's r of midranks, which ties leave exact.

    Raises:
        InputError: the shapes differ.

    Example:
        >>> float(rank_correlations(np.array([1.0, 2.0, 3.0]), np.array([1.0, 10.0, 100.0])))
        1.0
    """
    _require_alike(one, other)
    return correlations(midranks(one), midranks(other))


def _sampled_midranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Midranks ``[b, m]`` of values ``[m]`` in samples that hold each counts ``[b, m]`` times."""
    order = np.argsort(values, kind="stable")
    first, last = _runs(values[order])
    total = np.zeros((len(counts), len(values) + 1))
    np.cumsum(counts[:, order], axis=1, out=total[:, 1:])
    ranks = np.empty(counts.shape)
    ranks[:, order] = (total[:, first] + total[:, last + 1] + 1) / 2
    return ranks


def sampled_rank_correlations(one: np.ndarray, other: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spearman's ρ of bootstrap samples of one pair of rows, without drawing them, ``[b]``.

    A value that was drawn twice is two equal values. Its ranks follow from how often those below
    it were drawn, so that the m values are sorted once and not in every sample.

    Args:
        one: ``[m]``.
        other: ``[m]``.
        counts: how often each sample holds each of the m, ``[b, m]``.

    Example:
        >>> x, y = np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])
        >>> sampled_rank_correlations(x, y, np.array([[1, 1, 1], [2, 1, 0], [3, 0, 0]]))
        array([0.5, 1. , nan])
    """
    middle = (counts.sum(1, keepdims=True) + 1) / 2
    x, y = (_sampled_midranks(values, counts) - middle for values in (one, other))
    # Ranks are halves of whole numbers, so that a constant sample has exactly no variance.
    scale = np.sqrt((counts * x * x).sum(1) * (counts * y * y).sum(1))
    found: np.ndarray = np.full(len(counts), np.nan)
    np.divide((counts * x * y).sum(1), scale, out=found, where=scale > 0)
    return found.clip(-1, 1)
