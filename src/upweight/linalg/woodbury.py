"""The inverse of a diagonal plus few outer products, block by block."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from upweight.errors import IndefiniteError
from upweight.linalg.block import Block
from upweight.linalg.operator import Operator
from upweight.linalg.rows import RowPart

__all__ = ["Woodbury"]


@final
class Woodbury(Operator):
    """(D + Vᵀ V)⁻¹ = D⁻¹ − D⁻¹ Vᵀ (1 + V D⁻¹ Vᵀ)⁻¹ V D⁻¹, D a multiple of 1 in each block.

    Exact up to rounding, at the price of an m x m factorisation once and of two products with V
    for any rows (Woodbury, 1950).

    Args:
        blocks: all of them together hold every parameter once.
        parts: V in each block, m rows; None where it is 0.
        diagonal: D of each block, positive with the shift.
        shift: λ, added to all of D.
        grams: sums of V Vᵀ over the blocks of one D, by that D; made anew by default.

    Raises:
        IndefiniteError: D is not positive.

    Example:
        >>> import torch
        >>> from upweight.linalg.blocks import Outer
        >>> from upweight.linalg.rows import rows_of
        >>> block = Block("w", 1, 1, 2, weight=0)
        >>> outer = Outer(torch.ones(1, 1, 1, 1), torch.tensor([[[[3.0, 0.0]]]]))
        >>> inverse = Woodbury([block], [rows_of(block, [[outer]])], [1.0])
        >>> (inverse @ torch.tensor([10.0, 2.0])).round(decimals=4)
        tensor([1., 2.])
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        parts: Sequence[RowPart | None],
        diagonal: Sequence[float],
        *,
        shift: float = 0.0,
        grams: Mapping[float, Tensor] | None = None,
    ) -> None:
        self.blocks, self.parts, self.diagonal = tuple(blocks), tuple(parts), tuple(diagonal)
        self.shift, self.shifts = shift, [d + shift for d in self.diagonal]
        if not all(d > 0 for d in self.shifts):
            raise IndefiniteError(
                "A diagonal plus few outer products is inverted only where the diagonal is "
                "positive. Add damping, or the l2 that the model was trained with."
            )
        self.size = sum(block.size for block in blocks)
        self.grams = _grams(self.parts, self.diagonal) if grams is None else grams
        scaled = [gram / (d + shift) for d, gram in self.grams.items()]
        kernel = scaled[0]
        for gram in scaled[1:]:
            kernel += gram
        self.dtype, self.device = kernel.dtype, kernel.device
        kernel.diagonal().add_(1)
        self.factor = torch.linalg.cholesky(kernel, out=kernel)

    def damped(self, shift: float) -> "Woodbury":
        """The same with another λ, which costs a factorisation."""
        return Woodbury(self.blocks, self.parts, self.diagonal, shift=shift, grams=self.grams)

    def apply(self, rows: Tensor) -> Tensor:
        """The inverse times rows ``[q, p]``."""
        out = rows.to(self.dtype, copy=True)
        for block, d in zip(self.blocks, self.shifts, strict=True):
            for view in block.views(out):
                if view is not None:
                    view /= d
        known = [(b, v) for b, v in zip(self.blocks, self.parts, strict=True) if v is not None]
        products = sum(part.dot(*block.views(out)) for block, part in known)
        assert isinstance(products, Tensor)
        weights = torch.cholesky_solve(products, self.factor).T
        for block, part, d in zip(self.blocks, self.parts, self.shifts, strict=True):
            if part is not None:
                part.add(weights / -d, *block.views(out))
        return out


def _grams(parts: Sequence[RowPart | None], diagonal: Sequence[float]) -> dict[float, Tensor]:
    """Σ V Vᵀ over the blocks of one D, by that D."""
    found: dict[float, Tensor] = {}
    for part, d in zip(parts, diagonal, strict=True):
        if part is not None:
            found[d] = found[d].add_(part.gram()) if d in found else part.gram()
    return found
