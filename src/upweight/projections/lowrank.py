"""Low-rank factors in place of projected gradients, and the curvature they give (LoRIF)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.curvature.moments import eigen
from upweight.errors import InputError, NonFiniteError
from upweight.gradients import Compression, Gradients, Seen, TrainingGradients
from upweight.linalg import Block, BlockGradients, Outer, Solver
from upweight.linalg.blocks import pieces
from upweight.linalg.columns import as_blocks
from upweight.linalg.operator import MeanOperator
from upweight.projections.kernel import ProjectedFit
from upweight.projections.lifted import Lifted
from upweight.projections.operator import Projected
from upweight.projections.sides import TwoSided
from upweight.risk import Risk

__all__ = ["LowRankKernel", "RankFactors"]


@final
class RankFactors(Compression):
    """Training gradients kept as the best c outer products of each layer's projected matrix.

    An example takes c (j + l) numbers for a layer of j x l projected ones. Where it has no more
    than c positions nothing is lost.

    Args:
        projection: P.
        rank: c.
    """

    def __init__(self, projection: TwoSided, rank: int) -> None:
        self.projection, self.rank, at = projection, rank, 0
        blocks = []
        for side in projection.sides:
            g, j, l = side.shape
            blocks.append(Block(side.basis.block.name, g, j, l, weight=at))
            at += blocks[-1].size
        self.blocks = tuple(blocks)

    def compress(self, gradients: Gradients) -> BlockGradients:
        """The factors of all layers.

        Raises:
            NonFiniteError: a gradient is NaN or infinite, and has no factors.
        """
        seen = as_blocks(gradients, self.projection.blocks)
        if not seen.finite():
            raise NonFiniteError("A training gradient is NaN or infinite.")
        terms = [[self._factors(place, seen)] for place in range(len(self.blocks))]
        return BlockGradients(self.blocks, terms, seen.count, seen.like)

    def _factors(self, place: int, seen: BlockGradients) -> Outer:
        """The factors of one layer: as they are, or the best few."""
        side, terms, block = self.projection.sides[place], seen.terms[place], self.blocks[place]
        if side.kept is None and 1 <= sum(term.positions for term in terms) <= self.rank:
            return side.factors(terms)
        parts = []
        for piece in pieces(seen.count, 4 * block.size * seen.like.element_size()):
            some = [term.part(piece) for term in terms]
            values = side.project(some, len(range(seen.count)[piece]))
            parts.append(_best(values.view(-1, *block.shape), self.rank))
        left = torch.cat([part.left for part in parts], 1)
        return Outer(left, torch.cat([part.right for part in parts], 1))

    def restore(self, kept: BlockGradients) -> Gradients:
        """The gradients that have these projections."""
        return Lifted(kept, self.projection, self.projection.squares)


def _best(matrices: Tensor, rank: int) -> Outer:
    """The c outer products nearest to matrices ``[n, g, j, l]``, from their leading eigenvectors.

    W ≈ U Uᵀ W with U the leading eigenvectors of W Wᵀ (Eckart & Young, 1936), or the same of Wᵀ.
    """
    wide = matrices.shape[2] <= matrices.shape[3]
    w = matrices if wide else matrices.mT
    # Squares of small gradients are kept away from 0.
    size = w.abs().amax((2, 3), keepdim=True)
    scaled = (w / torch.where(size > 0, size, 1.0)).to(_wide(w))
    vectors = eigen(scaled @ scaled.mT)[1][..., -rank:].to(w)
    first, second = vectors.mT.transpose(0, 1), (vectors.mT @ w).transpose(0, 1)
    return Outer(first, second) if wide else Outer(second, first)


def _wide(like: Tensor) -> torch.dtype:
    """Of long sums."""
    return torch.promote_types(like.dtype, torch.float32)


@final
class _Moment(MeanOperator):
    """Σ_i share_i w_i w_iᵀ + Λ of the low-rank projected gradients w of training examples.

    Args:
        training: keeps w.
        ridge: Λ in k dimensions, ``[k]``.
    """

    def __init__(self, training: TrainingGradients, ridge: Tensor) -> None:
        self.training, self.ridge, self.count = training, ridge, len(training.risk.data)
        self.size, self.dtype, self.device = len(ridge), ridge.dtype, ridge.device

    @property
    def l2(self) -> Tensor:
        """Λ."""
        return self.ridge

    def apply(self, rows: Tensor) -> Tensor:
        """One pass over the factors for all rows."""
        total = rows * self.ridge
        for part in self.training.each(lambda seen: _product(seen, rows), "low-rank curvature"):
            total += part
        return total

    def apply_sampled(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Each group of rows times the moment of its own examples."""
        return torch.stack(
            [
                self.restrict(where).apply(group)
                for group, where in zip(rows, positions, strict=True)
            ]
        )

    def restrict(self, positions: Tensor) -> "_Moment":
        """The moment of some of the examples."""
        risk = self.training.risk
        some = Risk(risk.objective, risk.data.take(positions))
        return _Moment(TrainingGradients(some, compression=self.training.compression), self.ridge)


def _product(seen: Seen, rows: Tensor) -> Tensor:
    """Σ share w wᵀ of a batch times rows ``[m, k]``."""
    assert isinstance(seen.gradients, Lifted)
    inner, total = seen.gradients.inner, torch.zeros_like(rows)
    for piece in pieces(inner.count, inner.size * rows.element_size()):
        w = inner.part(piece).dense().to(rows)
        total += (rows @ w.T * seen.share[piece].to(rows)) @ w
    return total


@final
@dataclass(frozen=True)
class LowRankKernel(ProjectedFit):
    """Σ_i share_i w_i w_iᵀ + Λ of low-rank projected gradients w, as a solver sketches it.

    The sketch is made in a pass over the factors, which are kept meanwhile if they fit into a
    quarter of the memory budget; no matrix of k x k is made. It is of all layers together.

    Args:
        projection: makes two-sided projections of a Risk.
        solver: whose ``prepared`` makes the sketch, as ``Nystrom`` does.
        rank: c, outer products that an example keeps of a layer.

    Raises:
        InputError: fewer than one product.

    Example:
        >>> from torch import nn
        >>> from upweight import Data, Objective
        >>> from upweight.linalg import Cholesky
        >>> from upweight.projections import RandomSides
        >>> data = Data.of((torch.eye(8), torch.arange(8) % 2))
        >>> risk = Risk(Objective(nn.Linear(8, 2), "cross_entropy"), data)
        >>> LowRankKernel(RandomSides(4), Cholesky())(risk).size
        8
    """

    projection: Callable[[Risk], TwoSided]
    solver: Solver
    rank: int = 1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"An example keeps at least 1 product of a layer, got {self.rank}.")

    def __call__(self, risk: Risk) -> Projected:
        """Fit over the training data."""
        projection = self.projection(risk)
        factors = RankFactors(projection, self.rank)
        training = TrainingGradients(risk, compression=factors)
        l2 = risk.objective.l2
        moment = _Moment(training, projection.ridge(l2.to(_wide(l2))))
        return Projected(projection, [self.solver.prepared(moment)], factors)
