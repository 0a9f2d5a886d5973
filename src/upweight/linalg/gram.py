"""Second moments of rows, at about half the cost of a plain product."""

from itertools import pairwise

from torch import Tensor

__all__ = ["add_gram", "gram", "mirror"]

PIECE = 2048
SLICES, NARROW = 6, 192


def gram(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Xᵀ diag(w) X of rows ``[n, d]``: symmetric, so only column slices j ≥ i are computed.

    Example:
        >>> import torch
        >>> gram(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.],
                [2., 4.]])
    """
    return mirror(add_gram(x.new_zeros(x.shape[1], x.shape[1]), x, weights))


def add_gram(total: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add Xᵀ diag(w) X to the upper triangle of a matrix ``[d, d]``, in place; below is left open.

    Example:
        >>> import torch
        >>> mirror(add_gram(torch.eye(2), torch.tensor([[1.0, 2.0]])))
        tensor([[2., 2.],
                [2., 5.]])
    """
    width, x = x.shape[1], x.to(total)
    weights = None if weights is None else weights.to(total)
    slices = 1 if width < NARROW else SLICES  # of narrow rows they cost more than they save
    edges = [width * i // slices for i in range(slices + 1)]
    for start in range(0, len(x), PIECE):
        rows = x[start : start + PIECE]
        scaled = rows if weights is None else rows * weights[start : start + PIECE, None]
        for first, last in pairwise(edges):
            total[first:last, first:].addmm_(scaled[:, first:last].T, rows[:, first:])
    return total


def mirror(upper: Tensor) -> Tensor:
    """The symmetric matrices ``[..., d, d]`` with these upper triangles.

    Example:
        >>> import torch
        >>> mirror(torch.tensor([[1.0, 2.0], [9.0, 3.0]]))
        tensor([[1., 2.],
                [2., 3.]])
    """
    symmetric: Tensor = upper.triu() + upper.triu(1).mT
    return symmetric
