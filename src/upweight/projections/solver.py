"""Inverses in the dimensions of a projection, brought back to all parameters."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from upweight.linalg import (
    Cholesky,
    Cost,
    DenseGradients,
    Gradients,
    Inverse,
    Load,
    Operator,
    RowValues,
    Solution,
    Solver,
    Status,
    unshifted,
)
from upweight.projections.lifted import inside
from upweight.projections.operator import Projected, projected

__all__ = ["Pulled", "PulledInverse"]


@final
@dataclass(frozen=True)
class Pulled(Solver):
    """Pᵀ(P G Pᵀ + λ)⁻¹P: solves in the k dimensions of a projection, for all p parameters.

    Args:
        solver: in k dimensions, of each part that acts apart.

    Raises:
        InputError: the operator is not in the dimensions of a projection.

    Example:
        >>> from upweight.linalg import Dense
        >>> from upweight.projections.projection import Unprojected
        >>> kernel = Projected(Unprojected(2), [Dense(torch.eye(2))])
        >>> Pulled().init(kernel + 1.0) @ torch.tensor([2.0, 4.0])
        tensor([1., 2.])
    """

    solver: Solver = field(default_factory=Cholesky)

    def prepared(self, operator: Operator) -> Projected:
        """The operator itself: it was fitted, and takes no more passes over the data."""
        return projected(operator)

    def init(self, operator: Operator) -> "PulledInverse":
        """An inverse of every part with its damping."""
        outer, shift = unshifted(operator)
        base = projected(outer)
        return PulledInverse(base, [self.solver.init(part + shift) for part in base.parts])

    def cost(self, load: Load) -> Cost:
        """No products: what it takes shows on a curvature of a few examples."""
        del load
        return Cost()


@final
class PulledInverse(Inverse):
    """Pᵀ K⁻¹ P of a K⁻¹ in k dimensions, where its residuals are measured.

    Args:
        operator: K with its projection.
        parts: inverses of its parts, damping included.
    """

    def __init__(self, operator: Projected, parts: Sequence[Inverse]) -> None:
        self.projection, self.parts = operator.projection, tuple(parts)
        self.size, self.dtype = self.projection.size, operator.dtype
        self.device, self.widths = operator.device, [part.size for part in parts]
        self.notes = (*self.projection.notes, *(note for part in parts for note in part.notes))

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """There and back."""
        found = self._solve(DenseGradients(rows))
        return replace(found, value=self.projection.spread(found.value))

    def quadratic(self, rows: Tensor) -> Tensor:
        """In k dimensions."""
        return self.self_products(DenseGradients(rows))

    def self_products(self, gradients: Gradients) -> Tensor:
        """In k dimensions, the sum over the parts."""
        values = inside(self.projection, gradients).dense()
        split = values.to(self.dtype).split(self.widths, 1)
        found = [part.quadratic(some) for part, some in zip(self.parts, split, strict=True)]
        return torch.stack(found).sum(0).to(values)

    def precondition(self, gradients: Gradients) -> Solution[Tensor] | Solution[RowValues]:
        """Solved in k dimensions, and back if that is where products are cheaper."""
        found = self._solve(gradients)
        rows = self.projection.rows(found.value)
        if isinstance(rows, Tensor):
            return replace(found, value=rows)
        return Solution(rows, found.residual, found.status)

    def _solve(self, gradients: Gradients) -> Solution[Tensor]:
        """Each part by itself; a row is solved where all its parts are."""
        given = inside(self.projection, gradients).dense()
        rows = given.to(self.dtype)
        split = rows.split(self.widths, 1)
        found = [part.solve(some) for part, some in zip(self.parts, split, strict=True)]
        gaps = [one.residual * some.norm(dim=1) for one, some in zip(found, split, strict=True)]
        norm = rows.norm(dim=1)
        residual = torch.stack(gaps).norm(dim=0) / torch.where(norm > 0, norm, 1.0)
        rest = zip(*(one.status for one in found), strict=True)
        status = tuple(next((s for s in row if s != Status.CONVERGED), row[0]) for row in rest)
        value = torch.cat([one.value for one in found], 1).to(given)
        return Solution(value, residual, status)
