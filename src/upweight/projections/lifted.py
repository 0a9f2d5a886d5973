"""Gradients that are known by their projection, and what is kept of them between passes."""

from typing import final

import torch
from torch import Tensor

from upweight.gradients import Compression
from upweight.linalg import Block, BlockGradients, DenseGradients, Gradients, Outer, RowValues
from upweight.projections.projection import Projection

__all__ = ["Lifted", "ProjectedRows", "Stored", "inside"]


@final
class Lifted(Gradients):
    """The shortest gradients with given projections w: Pᵀ(P Pᵀ)⁻¹ w, for orthogonal rows of P.

    Args:
        inner: w of n examples, gradients in k dimensions.
        projection: P.
        squares: the squared length of every row of P, ``[k]``.
    """

    def __init__(self, inner: BlockGradients, projection: Projection, squares: Tensor) -> None:
        self.inner, self.projection, self.squares = inner, projection, squares
        self.count = inner.count

    def dot(self, rows: Tensor) -> Tensor:
        """Rows are projected once, and meet w."""
        return self.inner.dot(self.projection.project(DenseGradients(rows)) / self.squares)

    def combine(self, weights: Tensor) -> Tensor:
        """Sums of w, brought back."""
        return self.projection.spread(self.inner.combine(weights) / self.squares)

    def dense(self) -> Tensor:
        """All of them, ``[n, p]``."""
        return self.projection.spread(self.inner.dense() / self.squares)

    def squared_norms(self) -> Tensor:
        """W (P Pᵀ)⁻¹ w."""
        return (self.inner.dense().square() / self.squares).sum(1)

    def finite(self) -> bool:
        """Whether w is."""
        return self.inner.finite()

    def part(self, rows: slice) -> "Lifted":
        """Some of the examples."""
        return Lifted(self.inner.part(rows), self.projection, self.squares)


def inside(projection: Projection, gradients: Gradients) -> Gradients:
    """P g of gradients as gradients in k dimensions; those that are known by it are not formed."""
    if isinstance(gradients, Lifted) and gradients.projection is projection:
        return gradients.inner
    return DenseGradients(torch.cat([projection.project(some) for some in gradients.pieces()]))


@final
class ProjectedRows(RowValues):
    """Rows v P of parameter space: a product with a gradient g is one of v with P g.

    Args:
        values: v, ``[m, k]``.
        projection: P.
    """

    def __init__(self, values: Tensor, projection: Projection) -> None:
        self.values, self.projection = values, projection

    def __len__(self) -> int:
        return len(self.values)

    def dense(self) -> Tensor:
        """The rows ``[m, p]``."""
        return self.projection.spread(self.values)

    def dot(self, gradients: Gradients) -> Tensor:
        """In k dimensions."""
        return inside(self.projection, gradients).dot(self.values)

    def times(self, row: Tensor) -> Tensor:
        """In k dimensions."""
        return self.dot(DenseGradients(row[None]))[:, 0]

    def bytes(self) -> int:
        """Of the numbers in k dimensions."""
        return self.values.nbytes


@final
class Stored(Compression):
    """Training gradients kept as the k numbers that are looked at: scores stay as they are.

    Args:
        projection: P, with orthogonal rows.
        squares: the squared length of every row of P, ``[k]``.
    """

    def __init__(self, projection: Projection, squares: Tensor) -> None:
        self.projection, self.squares = projection, squares
        self.block = Block("projected", 1, 1, projection.width, weight=0)

    def compress(self, gradients: Gradients) -> BlockGradients:
        """P g of every gradient."""
        values = self.projection.project(gradients)
        one = values.new_ones(1, 1, 1, 1).expand(1, len(values), 1, 1)
        term = Outer(one, values[None, :, None])
        return BlockGradients([self.block], [[term]], len(values), values)

    def restore(self, kept: BlockGradients) -> Gradients:
        """The gradients that have these projections."""
        return Lifted(kept, self.projection, self.squares)
