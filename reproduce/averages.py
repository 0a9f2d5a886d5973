"""The effect of each training example on the mean loss of many queries."""

import numpy as np
import torch

import upweight as uw
from upweight.bars import track

__all__ = ["mean_scores"]

QUERIES_AT_ONCE = 1000


def mean_scores(inf: uw.Influence, queries: uw.Data) -> np.ndarray:
    """Predicted change ``[N]`` of the queries' mean loss if each training example is removed.

    Queries are explained in pieces: the whole matrix of scores need not fit in memory.
    """
    total = np.zeros(len(inf.data))
    pieces = torch.arange(len(queries)).split(QUERIES_AT_ONCE)
    for piece in track(pieces, "scores of the mean loss", len(pieces)):
        total += inf.explain(queries.take(piece)).values.sum(axis=0, dtype=np.float64)
    return total / len(queries)
