"""Projections of each layer's gradient matrix from both sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.errors import InputError
from upweight.gradients import Gradients, risk_layout
from upweight.linalg import Eigenblock, Outer
from upweight.linalg.blocks import form, pieces
from upweight.linalg.columns import as_blocks
from upweight.projections.lifted import ProjectedRows, Stored
from upweight.projections.projection import Projection
from upweight.risk import Risk

__all__ = ["RandomSides", "Side", "TwoSided"]


@final
@dataclass(frozen=True)
class Side:
    """W = c · Q_Lᵀ G Q_R of one block, or some entries of it.

    Attributes:
        basis: Q_L, ``[g, o, j]``, and Q_R, ``[g, i, l]``, with orthonormal columns; its values are
            the squared length of every row of P, c², ``[g, j, l]``.
        kept: positions of entries in ``[g · j · l]``; all by default.
    """

    basis: Eigenblock
    kept: Tensor | None = None

    @property
    def squares(self) -> Tensor:
        """Squared lengths of the rows of P, ``[k]``."""
        values = self.basis.values.flatten()
        return values if self.kept is None else values[self.kept]

    @property
    def shape(self) -> tuple[int, ...]:
        """(g, j, l), or (1, 1, k) of some entries."""
        return self.basis.values.shape if self.kept is None else (1, 1, len(self.kept))

    def factors(self, terms: Sequence[Outer]) -> Outer:
        """C · Q_Lᵀ l and Q_Rᵀ r of all positions: W is turned before it is multiplied."""
        turned = [self.basis.turned_factors(term) for term in terms]
        left = torch.cat([left for left, _ in turned], 2) * self.basis.values[0, 0, 0].sqrt()
        return Outer(left, torch.cat([right for _, right in turned], 2))

    def project(self, terms: Sequence[Outer], count: int) -> Tensor:
        """The entries ``[n, k]`` of n examples."""
        squares = self.squares
        if not terms:
            return squares.new_zeros(count, len(squares))
        found = []
        for piece in pieces(count, self.basis.values.numel() * squares.element_size()):
            turned = self.factors([term.part(piece) for term in terms])
            flat = form([turned], turned.left.shape[3]).flatten(1)
            found.append(flat if self.kept is None else flat[:, self.kept])
        return torch.cat(found)

    def spread(self, values: Tensor) -> Tensor:
        """Entries ``[m, k]`` to matrices ``[m, g, o, i]``."""
        flat = values * self.squares.sqrt()
        if self.kept is not None:
            whole = flat.new_zeros(len(flat), self.basis.values.numel())
            whole[:, self.kept] = flat
            flat = whole
        return self.basis.back(flat.view(-1, *self.basis.values.shape))


@final
class TwoSided(Projection):
    """P of two sides in every block of parameters; its rows are orthogonal.

    Args:
        sides: of all blocks.
        risk: of the objective whose parameters these are.
        notes: what a reader of results must know.

    Attributes:
        squares: squared lengths of all rows of P, ``[k]``.
    """

    def __init__(self, sides: Sequence[Side], risk: Risk, notes: tuple[str, ...] = ()) -> None:
        self.sides, self.notes, self.size = tuple(sides), notes, risk.objective.space.size
        # Numbers in the factors of an example's gradient.
        self.factors = risk_layout(risk).row_bytes // (2 * risk.objective.space.dtype.itemsize)
        self.blocks = tuple(side.basis.block for side in sides)
        self.widths = tuple(len(side.squares) for side in sides)
        self.width, self.squares = sum(self.widths), torch.cat([s.squares for s in self.sides])

    def project(self, gradients: Gradients) -> Tensor:
        """Block by block."""
        seen = as_blocks(gradients, self.blocks)
        parts = zip(self.sides, seen.terms, strict=True)
        return torch.cat([side.project(terms, seen.count) for side, terms in parts], 1)

    def spread(self, values: Tensor) -> Tensor:
        """Block by block."""
        out = values.new_zeros(len(values), self.size)
        for side, part in zip(self.sides, values.split(self.widths, 1), strict=True):
            side.basis.block.write(out, side.spread(part))
        return out

    def ridge(self, l2: Tensor) -> Tensor:
        """Λ of each block, which has one."""
        parts = zip(self.blocks, self.widths, strict=True)
        return torch.cat([l2[block.weight].expand(width) for block, width in parts])

    def compression(self) -> Stored | None:
        """The k numbers, where they are fewer than those of the factors."""
        return Stored(self, self.squares) if self.width < self.factors else None

    def rows(self, values: Tensor) -> ProjectedRows:
        """Rows that project what they meet: cheaper than to be matrices."""
        return ProjectedRows(values, self)


@final
@dataclass(frozen=True)
class RandomSides:
    """Random orthonormal Q_L and Q_R of every layer, scaled so that E[PᵀP] = 1.

    A layer's gradient of o x i numbers becomes one of at most side x side; a side that is no longer
    than that is left as it is.

    Args:
        side: numbers on each side.
        seed: of all layers.

    Raises:
        InputError: a side of less than one.

    Example:
        >>> from torch import nn
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.eye(8), torch.arange(8) % 2))
        >>> RandomSides(4)(Risk(Objective(nn.Linear(8, 2), "cross_entropy"), data)).widths
        (8,)
    """

    side: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.side < 1:
            raise InputError(f"A side of a layer keeps at least 1 number, got {self.side}.")

    def __call__(self, risk: Risk) -> TwoSided:
        """The projection of an objective's layers."""
        layout, like = risk_layout(risk), risk.objective.l2
        generator = torch.Generator().manual_seed(self.seed)
        found = []
        for block in layout.blocks:
            bases = [self._basis(block.groups, d, generator) for d in (block.outputs, block.inputs)]
            left, right = (None if basis is None else basis.to(like) for basis in bases)
            j, l = min(block.outputs, self.side), min(block.inputs, self.side)
            square = block.outputs / j * block.inputs / l
            values = like.new_full((block.groups, j, l), square)
            found.append(Side(Eigenblock(block, left, right, values)))
        return TwoSided(found, risk)

    def _basis(self, groups: int, length: int, generator: torch.Generator) -> Tensor | None:
        """Orthonormal columns ``[g, d, side]``, evenly distributed (Stewart, 1980)."""
        if length <= self.side:
            return None
        shape = (groups, length, self.side)
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        basis, corner = torch.linalg.qr(normal)
        signed: Tensor = basis * corner.diagonal(dim1=1, dim2=2).sign()[:, None]
        return signed
