"""Block conjugate gradients: many right-hand sides share one Krylov space."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.errors import NonFiniteError
from upweight.linalg.cost import Cost, Load
from upweight.linalg.operator import Operator
from upweight.linalg.solution import Solution, Status, relative_residual
from upweight.linalg.solver import Inverse, Solver

__all__ = ["CG"]

Preconditioner = Callable[[Operator, int], Operator | None]
PROBES, BLOCK = 2, 128
# For plans: steps with a preconditioner that suits, and rows carried for each that is solved.
USUAL_STEPS, CARRIED = 10, 5


@final
@dataclass(frozen=True)
class CG(Solver):
    """Preconditioned block conjugate gradients (O'Leary, 1980; Hestenes & Stiefel, 1952).

    Every step multiplies A with the directions of all unfinished rows and gives every row the best
    combination of them, so that many rows need fewer steps than one. Directions are
    orthonormalised, rows that met their tolerance are frozen, and a direction of negative
    curvature ends the solve at the last good iterate.

    Args:
        rtol: stop a row when ‖b − A x‖ ≤ rtol ‖b‖.
        max_steps: products at most.
        preconditioner: a function of (A, number of rows to solve) that makes an approximate
            inverse, or None where it would not pay; asked until it makes one.

    Example:
        >>> from upweight.linalg import Dense
        >>> A = Dense(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        >>> CG().init(A) @ torch.ones(3)
        tensor([1.0000, 0.5000, 0.2500])
    """

    rtol: float = 1e-6
    max_steps: int = 1000
    preconditioner: Preconditioner | None = None

    def cost(self, load: Load) -> Cost:
        """A usual number of steps, each with products of rows with rows of their block."""
        steps = min(USUAL_STEPS, self.max_steps)
        between = 6.0 * min(load.rows, BLOCK) * load.rows * load.size
        return Cost(
            products=steps,
            operations=steps * between,
            bytes=CARRIED * load.bytes,
            without="" if self.preconditioner is None else "making its preconditioner",
        )

    def init(self, operator: Operator) -> "CGInverse":
        """Nothing yet: a preconditioner is made when there are rows to solve."""
        return CGInverse(self, operator)


def _orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis ``[k, p]`` that contains rows ``[m, p]``, k = min(m, p)."""
    scale = rows.norm(dim=1, keepdim=True)
    basis: Tensor = torch.linalg.qr((rows / torch.where(scale > 0, scale, 1.0)).T)[0]
    return basis.T.contiguous()


@final
class CGInverse(Inverse):
    """A⁻¹ by block conjugate gradients.

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

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """All rows, in blocks: wider ones lose their directions to rounding."""
        rhs = rows.to(self.dtype)
        if self.preconditioner is None and self.solver.preconditioner is not None:
            self.preconditioner = self.solver.preconditioner(self.operator, len(rhs))
        parts = [self._solve(block) for block in rhs.split(BLOCK)]
        return Solution(
            torch.cat([part.value for part in parts]),
            torch.cat([part.residual for part in parts]),
            tuple(status for part in parts for status in part.status),
            max(part.steps for part in parts),
        )

    def _solve(self, rhs: Tensor) -> Solution[Tensor]:
        goal = max(self.solver.rtol, torch.finfo(rhs.dtype).eps) * rhs.norm(dim=1)
        x, r = torch.zeros_like(rhs), rhs.clone()
        active = (r.norm(dim=1) > goal).nonzero()[:, 0]
        steps, bent = 0, False
        directions = r[active]
        if len(active):
            directions = _orthonormal(self._precondition(directions))
        for step in track(range(self.solver.max_steps), "conjugate gradients"):
            if not len(active):
                break
            product = self.operator.apply(directions)
            if not bool(torch.isfinite(product.sum())):
                raise NonFiniteError("A product with the curvature is NaN or infinite.")
            inverse, bent = _projected_inverse(directions, product)
            if bent or not inverse.any():
                break
            steps = step + 1
            best = r[active] @ directions.T @ inverse
            x[active] += best @ directions
            r[active] -= best @ product
            active = active[r[active].norm(dim=1) > goal[active]]
            if len(active):
                z = self._precondition(r[active])
                conjugate = z - (z @ product.T @ inverse) @ directions
                directions = _orthonormal(conjugate)
        return self._conclude(rhs, x, r, (active if bent else active[:0], steps))

    def quadratic(self, rows: Tensor) -> Tensor:
        """Products b A⁻¹ b of every row by a solve."""
        return (rows * self.solve(rows).require()).sum(1)

    def _conclude(
        self, rhs: Tensor, x: Tensor, r: Tensor, stop: tuple[Tensor, int]
    ) -> Solution[Tensor]:
        """Residuals of the recursion plus the drift that rounding gave them.

        The drift b − A x − r is measured on a random signed sum of all rows, whose square is
        in expectation the sum of the rows' squares: two rows' product instead of m, and all of it
        is charged to every row. Where that is too much to tell, the residuals are measured.
        """
        norm = rhs.norm(dim=1)
        unit = torch.where(norm > 0, norm, 1.0)
        generator = torch.Generator().manual_seed(0)
        signs = (
            torch.randint(0, 2, (PROBES, len(rhs)), generator=generator, device="cpu").to(rhs) * 2
            - 1
        )
        signs = signs / unit
        gap = signs @ (rhs - r) - self.operator.apply(signs @ x)
        residual = r.norm(dim=1) / unit + gap.norm(dim=1).max() * (norm > 0)
        allowed = max(2 * self.solver.rtol, 100 * torch.finfo(rhs.dtype).eps)
        if bool((residual > allowed).any()):
            residual = relative_residual(rhs, self.operator.apply(x))
        met = residual <= allowed
        bent, steps = set(stop[0].tolist()), stop[1]
        status = tuple(
            Status.NEGATIVE_CURVATURE if i in bent else Status.CONVERGED if m else
            Status.NOT_CONVERGED
            for i, m in enumerate(met.tolist())
        )  # fmt: skip
        return Solution(x, residual, status, steps)


def _projected_inverse(directions: Tensor, product: Tensor) -> tuple[Tensor, bool]:
    """(S A Sᵀ)⁻¹ ``[k, k]`` without its null directions, and whether A bends down in S."""
    projected = (directions @ product.T).double()
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    noise = 10 * len(values) ** 0.5 * torch.finfo(product.dtype).eps * values.abs().max()
    inverse = torch.where(values > noise, 1 / values, 0.0)
    dense = (vectors * inverse) @ vectors.T
    return dense.to(product.dtype), bool(values[0] < -noise)
