"""The inverse of a diagonal plus few outer products, block by block."""

from collections.abc import Sequence
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
        shifts: D of each block, positive.

    Raises:
        IndefiniteError: a shift is not positive.

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
        shifts: Sequence[float],
    ) -> None:
        if not all(shift > 0 for shift in shifts):
            raise IndefiniteError(
                "A diagonal plus few outer products is inverted only where the diagonal is "
                "positive. Add damping, or the l2 that the model was trained with."
            )
        self.blocks, self.parts, self.shifts = tuple(blocks), tuple(parts), tuple(shifts)
        self.size = sum(block.size for block in blocks)
        grams = [
            part.gram() / shift
            for part, shift in zip(self.parts, self.shifts, strict=True)
            if part is not None
        ]
        kernel = grams[0]
        for gram in grams[1:]:
            kernel += gram
        self.dtype, self.device = kernel.dtype, kernel.device
        kernel.diagonal().add_(1)
        self.factor = torch.linalg.cholesky(kernel)

    def apply(self, rows: Tensor) -> Tensor:
        """The inverse times rows ``[q, p]``."""
        rows = rows.to(self.dtype)
        read = [block.read(rows) / d for block, d in zip(self.blocks, self.shifts, strict=True)]
        products = sum(
            part.dot(matrices)
            for part, matrices in zip(self.parts, read, strict=True)
            if part is not None
        )
        assert isinstance(products, Tensor)
        weights = torch.cholesky_solve(products, self.factor).T
        out = torch.empty_like(rows)
        for block, part, d, matrices in zip(
            self.blocks, self.parts, self.shifts, read, strict=True
        ):
            taken = 0.0 if part is None else part.combine(weights) / d
            block.write(out, matrices - taken)
        return out
