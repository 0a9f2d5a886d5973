"""A preconditioner for conjugate gradients: the curvature of a random sample, inverted exactly."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.linalg import MeanOperator, Operator, Shifted

__all__ = ["Subsample"]


@final
@dataclass(frozen=True)
class Subsample:
    """(A_S + λ)⁻¹ for a random sample S of the examples, as an operator.

    Where examples outnumber the curvature's effective directions this removes most of the
    condition number, and costs one dense factorisation. Conjugate gradients correct the rest, so
    the sample decides the number of steps and not the answer.

    Args:
        size: examples in the sample.
        largest: parameters above which no preconditioner is made (a dense matrix is p² numbers).
        rows: right-hand sides below which plain conjugate gradients are cheaper.
        seed: of the sample.
    """

    size: int = 5000
    largest: int = 12_000
    rows: int = 16
    seed: int = 0

    def __call__(self, operator: Operator, rows: int) -> Operator | None:
        """The preconditioner of A or A + λ for a number of rows, or None where it would not pay."""
        shift = operator.shift if isinstance(operator, Shifted) else 0.0
        base = operator.base if isinstance(operator, Shifted) else operator
        if not isinstance(base, MeanOperator) or base.size > self.largest:
            return None
        if base.count <= self.size or rows < self.rows:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        positions = torch.randperm(base.count, generator=generator)[: self.size]
        dense = (base.restrict(positions) + shift).to_dense()
        factor, info = torch.linalg.cholesky_ex(dense.to(base.dtype))
        return None if int(info) else _Factored(factor)


@final
class _Factored(Operator):
    """(L Lᵀ)⁻¹ in the factor's dtype, without a residual."""

    def __init__(self, factor: Tensor) -> None:
        self.factor, self.size = factor, len(factor)
        self.dtype, self.device = factor.dtype, factor.device

    def apply(self, rows: Tensor) -> Tensor:
        """Two triangular solves."""
        return torch.cholesky_solve(rows.T, self.factor).T.contiguous()
