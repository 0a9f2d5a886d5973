"""Conjugate gradients for many right-hand sides at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.linalg.operator import Operator
from upweight.linalg.solution import Solution, Status, relative_residual
from upweight.linalg.solver import Inverse, Solver

__all__ = ["CG"]

Preconditioner = Callable[[Operator, int], Operator | None]


@final
@dataclass(frozen=True)
class CG(Solver):
    """Preconditioned conjugate gradients (Hestenes & Stiefel, 1952), one product for all rows.

    A row that has met its tolerance is frozen, so that further steps cannot spoil it. A direction
    of negative curvature stops its row at the last good iterate.

    Args:
        rtol: stop a row when ‖b − A x‖ ≤ rtol ‖b‖.
        max_steps: products at most.
        preconditioner: an approximate inverse made from A (any function of an operator that
            returns an operator, or None where none would pay).

    Example:
        >>> from upweight.linalg import Dense
        >>> A = Dense(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        >>> CG().init(A) @ torch.ones(3)
        tensor([1.0000, 0.5000, 0.2500])
    """

    rtol: float = 1e-6
    max_steps: int = 1000
    preconditioner: Preconditioner | None = None

    def init(self, operator: Operator) -> "CGInverse":
        """Nothing yet: a preconditioner is made when there are rows to solve."""
        return CGInverse(self, operator)


@final
class CGInverse(Inverse):
    """A⁻¹ by conjugate gradients.

    Args:
        solver: tolerance and budget.
        operator: A.
    """

    def __init__(self, solver: CG, operator: Operator) -> None:
        self.solver, self.operator = solver, operator
        self.preconditioner: Operator | None = None
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device

    def _precondition(self, rows: Tensor) -> Tensor:
        return rows.clone() if self.preconditioner is None else self.preconditioner.apply(rows)

    def solve(self, rows: Tensor) -> Solution:
        """All rows together; the returned residual is measured with one more product."""
        rhs = rows.to(self.dtype)
        if self.preconditioner is None and self.solver.preconditioner is not None:
            self.preconditioner = self.solver.preconditioner(self.operator, len(rhs))
        norm = rhs.norm(dim=1)
        x, r = torch.zeros_like(rhs), rhs.clone()
        active = (norm > 0).nonzero()[:, 0]
        bent = torch.zeros(len(rhs), dtype=torch.bool, device=rhs.device)
        z = self._precondition(r)
        d, rz = z.clone(), (r * z).sum(1)
        eps = torch.finfo(rhs.dtype).eps
        stop = max(self.solver.rtol, eps) * norm
        steps = 0
        for step in track(range(self.solver.max_steps), "conjugate gradients"):
            if not len(active):
                break
            steps = step + 1
            product = self.operator.apply(d[active])
            curve = (d[active] * product).sum(1)
            noise = eps * d[active].norm(dim=1) * product.norm(dim=1)
            bent[active[curve < -noise]] = True
            keep = curve > noise
            active, product, curve = active[keep], product[keep], curve[keep]
            alpha = (rz[active] / curve)[:, None]
            x[active] += alpha * d[active]
            r[active] -= alpha * product
            active = active[r[active].norm(dim=1) > stop[active]]
            z = self._precondition(r[active])
            after = (r[active] * z).sum(1)
            d[active] = z + (after / rz[active])[:, None] * d[active]
            rz[active] = after
        return self._conclude(rhs, x, bent, steps)

    def quadratic(self, rows: Tensor) -> Tensor:
        """B A⁻¹ b of every row by a solve."""
        return (rows * self.solve(rows).require()).sum(1)

    def _conclude(self, rhs: Tensor, x: Tensor, bent: Tensor, steps: int) -> Solution:
        residual = relative_residual(rhs, self.operator.apply(x))
        # Rounding keeps the true residual a little above the recursive one.
        floor = 100 * torch.finfo(rhs.dtype).eps
        met = residual <= max(2 * self.solver.rtol, floor)
        status = tuple(
            Status.NEGATIVE_CURVATURE if b else Status.CONVERGED if m else Status.NOT_CONVERGED
            for b, m in zip(bent.tolist(), met.tolist(), strict=True)
        )
        return Solution(x, residual, status, steps)
