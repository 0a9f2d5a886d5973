"""Block conjugate gradients: many right-hand sides share one Krylov space."""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.budget import budget
from upweight.errors import InputError, NonFiniteError
from upweight.linalg.cost import Cost, Load
from upweight.linalg.operator import Operator, Recycled, Shifted
from upweight.linalg.solution import Solution, Status, relative_residual
from upweight.linalg.solver import Inverse, Solver
from upweight.solvers.directions import Directions
from upweight.solvers.stopping import Progress, Rule

__all__ = ["CG"]

Preconditioner = Callable[[Operator, int], Operator | None]
PROBES, BLOCK, LANCZOS_STEPS = 2, 128, 10
ROUNDING = 100  # units of the last place of a right side that a residual may consist of
# For plans: steps with a preconditioner that suits, and rows carried for each that is solved.
USUAL_STEPS, CARRIED = 10, 5


@final
@dataclass(frozen=True)
class CG(Solver):
    """Preconditioned block conjugate gradients (O'Leary, 1980; Hestenes & Stiefel, 1952).

    Every step multiplies A with the directions of all unfinished rows and gives every row the best
    combination of them, so that many rows need fewer steps than one. Directions are
    orthonormalised, rows that met their tolerance take no more of them, and a direction of negative
    curvature ends the solve at the last good iterate.

    Several dampings of one A (``prepared``) share their directions: the solve of one starts from
    the best combination of those of all before it, which costs no product (Galerkin), and goes on
    in directions conjugate to them (Erhel & Guyomarc'h, 2000).

    Args:
        rtol: stop a row when ‖b − A x‖ ≤ rtol ‖b‖.
        max_steps: products at most; to run into it is a failure, unlike into a named budget.
        preconditioner: a function of (A, number of rows to solve) that makes an approximate
            inverse, or None where it would not pay; asked until it makes one.
        stop: what may end a solve earlier, without being a failure: a ``Budget`` of steps or
            seconds, or ``Settled`` ranks.

    Example:
        >>> from upweight.linalg import Dense
        >>> A = Dense(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        >>> CG().init(A) @ torch.ones(3)
        tensor([1.0000, 0.5000, 0.2500])
    """

    rtol: float = 1e-6
    max_steps: int = 1000
    preconditioner: Preconditioner | None = None
    stop: tuple[Rule, ...] = ()

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

    def prepared(self, operator: Operator) -> Recycled:
        """A that keeps directions for other dampings, as many as fit into half of the budget."""
        return Recycled(operator, Directions(budget() // 2))

    def init(self, operator: Operator) -> "CGInverse":
        """Nothing yet: a preconditioner is made when there are rows to solve.

        Raises:
            InputError: in half precision, where directions do not stay conjugate.
        """
        if operator.dtype.itemsize < 4:
            raise InputError(
                "Conjugate gradients need single precision, and the parameters are "
                f"{operator.dtype}. Use model.float(), or method='ekfac' as it is."
            )
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
        # Not ``unshifted``: what is kept for other dampings is wanted here.
        self.base, self.shift = operator, 0.0
        if isinstance(operator, Shifted):
            self.base, self.shift = operator.base, operator.shift

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """All rows, in blocks: wider ones lose their directions to rounding."""
        began, rhs = monotonic(), rows.to(self.dtype)
        if self.preconditioner is None and self.solver.preconditioner is not None:
            self.preconditioner = self.solver.preconditioner(self.operator, len(rhs))
        parts, done = [], 0
        for block in rhs.split(BLOCK):
            done += len(block)
            parts.append(_Block(self, block, began, done / len(rhs)).solve())
        return Solution(
            torch.cat([part.value for part in parts]),
            torch.cat([part.residual for part in parts]),
            tuple(status for part in parts for status in part.status),
            max(part.steps for part in parts),
            detail=next((part.detail for part in parts if part.detail), ""),
        )


@final
class _Block:
    """Rows that are solved together.

    Args:
        inverse: what is known of A.
        rhs: B, ``[m, p]``.
        began: when the solve of all rows began.
        share: of all rows that are solved after these.
    """

    def __init__(self, inverse: CGInverse, rhs: Tensor, began: float, share: float) -> None:
        self.inverse, self.solver, self.rhs = inverse, inverse.solver, rhs
        self.base, self.shift = inverse.base, inverse.shift
        self.began, self.share, self.steps, self.detail = began, share, 0, ""
        self.norm = rhs.norm(dim=1)
        eps = torch.finfo(rhs.dtype).eps
        self.goal, self.rounding = max(self.solver.rtol, eps) * self.norm, ROUNDING * eps
        self.least = torch.full_like(self.norm, torch.inf)
        self.x, self.r = torch.zeros_like(rhs), rhs.clone()
        kept = self.base.kept if isinstance(self.base, Recycled) else None
        self.directions: Directions = Directions(0) if kept is None else kept
        self.end, self.bent = Status.NOT_CONVERGED, torch.zeros_like(self.norm, dtype=torch.bool)

    def solve(self) -> Solution[Tensor]:
        """Steps until every row is solved, or there is a reason to end."""
        if self.directions.pairs:
            self.directions.project(self.shift)
            self.directions.advance(self.x, self.r)
        watches = [(rule, rule.begin(self.inverse.operator)) for rule in self.solver.stop]
        for _ in track(range(self.solver.max_steps), "conjugate gradients"):
            before = monotonic()
            active = self._unfinished()
            if not bool(active.any()) or not self._step(active):
                break
            now = self._progress(before)
            ended = [rule for rule, watch in watches if watch(now)]
            if ended:
                self.end, self.detail = Status.ENDED, repr(ended[0])
                break
        return self._conclude()

    def _unfinished(self) -> Tensor:
        """Rows above their goal, but for those whose residual is rounding and falls no more.

        Whatever is in there of a null direction of A would only grow.
        """
        size = self.r.norm(dim=1)
        stuck = (size >= self.least) & (size <= self.rounding * self.norm)
        self.least = torch.minimum(self.least, size)
        active: Tensor = (size > self.goal) & ~stuck
        return active

    def _step(self, active: Tensor) -> bool:
        """One product with directions from the residuals of unfinished rows; False at an end."""
        inverse, z = self.inverse.preconditioner, self.r[active]
        z = z if inverse is None else inverse.apply(z)
        directions = _orthonormal(self.directions.conjugate(z))
        product = self.base.apply(directions)
        if not bool(torch.isfinite(product.sum())):
            raise NonFiniteError("A product with the curvature is NaN or infinite.")
        self.directions.keep(directions, product)
        lowest, curvature = self.directions.project(self.shift)
        if curvature < 0:
            self.bent = active
            self.detail = self._bent(self.directions.combination(lowest), curvature)
        elif bool(self.directions.inverse.any()):
            self.steps += 1
            self.directions.advance(self.x, self.r)
            return True
        return False

    def _progress(self, before: float) -> Progress:
        now = monotonic()
        residual = self.r.norm(dim=1) / torch.where(self.norm > 0, self.norm, 1.0)
        return Progress(self.steps, self.x, residual, now - self.began, now - before, self.share)

    def _bent(self, row: Tensor, curvature: float) -> str:
        """How far A + λ bends down along a row, and at least: Lanczos (1950) goes on from there."""
        diagonal: list[float] = []
        beside: list[float] = []
        before, least = torch.zeros_like(row), curvature
        for _ in range(min(LANCZOS_STEPS, len(row))):
            product = self.base.apply(row[None])[0].add(row, alpha=self.shift)
            product -= before * (beside[-1] if beside else 0.0)
            diagonal.append(float(product @ row))
            product -= row * diagonal[-1]
            known = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
            if beside:
                known += torch.diag(torch.tensor(beside, dtype=torch.float64), 1)
                known += torch.diag(torch.tensor(beside, dtype=torch.float64), -1)
            least = min(least, float(torch.linalg.eigvalsh(known)[0]))
            size = float(product.norm())
            if not size > 1e-6 * max(map(abs, diagonal)):
                break
            beside.append(size)
            before, row = row, product / size
        return (
            f"Along the direction found it is {curvature:.2e}, and its smallest eigenvalue "
            f"{least:.2e} or less: damping={self.shift - 1.1 * least:.1e} would make it positive."
        )

    def _conclude(self) -> Solution[Tensor]:
        """Residuals of the recursion plus the drift that rounding gave them.

        The drift b − A x − r is measured on a random signed sum of all rows, whose square is
        in expectation the sum of the rows' squares: two rows' product instead of m, and all of it
        is charged to every row. Where that is too much to tell, the residuals are measured.
        """
        rhs, x, r = self.rhs, self.x, self.r
        unit = torch.where(self.norm > 0, self.norm, 1.0)
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (PROBES, len(rhs)), generator=generator, device="cpu")
        signs = (signs.to(rhs) * 2 - 1) / unit
        gap = signs @ (rhs - r) - self._product(signs @ x)
        residual = r.norm(dim=1) / unit + gap.norm(dim=1).max() * (self.norm > 0)
        allowed = max(2 * self.solver.rtol, self.rounding)
        if bool((residual > allowed).any()):
            residual = relative_residual(rhs, self._product(x))
        status = tuple(
            Status.NEGATIVE_CURVATURE if bent else Status.CONVERGED if met else self.end
            for bent, met in zip(self.bent.tolist(), (residual <= allowed).tolist(), strict=True)
        )
        return Solution(x, residual, status, self.steps, detail=self.detail)

    def _product(self, rows: Tensor) -> Tensor:
        return self.base.apply(rows).add(rows, alpha=self.shift)
