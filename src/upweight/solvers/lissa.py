"""LiSSA: a stochastic Neumann series (Agarwal, Bullins & Hazan, 2017; Koh & Liang, 2017)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.curvature import GaussNewton
from upweight.errors import IndefiniteError, InputError
from upweight.linalg import KroneckerEigen, KroneckerInverse
from upweight.linalg.cost import Cost, Load
from upweight.linalg.operator import MeanOperator, Operator, unshifted
from upweight.linalg.solution import Solution, Status, relative_residual
from upweight.linalg.solver import Inverse, Solver

__all__ = ["LiSSA"]

GROWTH_LIMIT = 10.0
CHECKED = 10  # steps between looks at the size of the iterates
CARRIED = 5  # rows of every repeat, at a time
PROBE_GROUPS, PROBE_ROWS, PROBE_ROUNDS, RETRIES = (4, 64), 512, 12, 8

Preconditioner = Callable[[Operator, int], Operator | None]


@final
@dataclass(frozen=True)
class LiSSA(Solver):
    """x ← mean over repeats of h/σ with h_{j+1} = v + h_j − (A_j + λ) h_j / σ.

    A_j is the curvature of a random batch. The fixed point is (A + λ)⁻¹ v: damping λ stands beside
    the curvature. The reference code of Koh & Liang writes h ← v + (1 − d) h − A_j h / σ, whose
    damping is λ = σ d: pass
    ``damping=LiSSA.damping_from_reference(scale, damp)``.

    The part (1 − e/σ)^(t+1) of the answer is missing along eigenvalue e of A + λ after t steps, so
    flat directions (e below σ/t) are shortened.

    A preconditioner P ≈ (A + λ)⁻¹ makes all directions alike steep:

        x_{j+1} = x_j + P (v − (A_j + λ) x_j) / σ,   x_0 = P v

    With EK-FAC (``Kronecker``) and batches of the Gauss-Newton matrix this is ASTRA (Wang et al.,
    2025), here with averaged last iterates in place of momentum and a schedule of steps, in the
    basis of EK-FAC, where P is diagonal. Without a preconditioner P is 1, and x = h/σ the series
    above.

    Args:
        scale: σ, above half the largest curvature of a batch, times P; "auto" estimates the
            mean-square stability limit ρ = max vᵀE[M_j²]v / vᵀE[M_j]v of M_j = P½ (A_j + λ) P½,
            takes σ = ρ, and doubles it if iterates still grow. What grows all the same has
            diverged, and answers 0.
        depth: steps t.
        repeats: independent runs r.
        batch_size: rows per step.
        tail: share of the last iterates that each repeat averages (Polyak & Juditsky, 1992), which
            removes most of the noise; 0 takes the last one alone, as Koh & Liang do.
        seed: of the row draws.
        max_error: a row fails when its standard error over the repeats exceeds this share of it.
        max_residual: a row fails when ‖b − A x‖ exceeds this share of ‖b‖: too few steps.
        preconditioner: a function of (A + λ, number of rows to solve) that makes P, positive
            definite, or None where it would not pay; asked once.

    Raises:
        InputError: the operator is not a mean over examples (and so cannot be sampled).
        IndefiniteError: A + λ bends down along a direction of the probe.

    Example:
        >>> paper = LiSSA(scale=25.0, depth=5000, repeats=10, batch_size=1, tail=0.0)
        >>> paper.damping_from_reference(25.0, 0.01)
        0.25
    """

    scale: float | Literal["auto"] = "auto"
    depth: int = 5000
    repeats: int = 10
    batch_size: int = 8
    tail: float = 0.25
    seed: int = 0
    max_error: float = 1.0
    max_residual: float = 0.9
    preconditioner: Preconditioner | None = None

    @staticmethod
    def damping_from_reference(scale: float, damp: float) -> float:
        """λ = σ d: the damping beside the curvature that the reference's (σ, d) amounts to."""
        return scale * damp

    def cost(self, load: Load) -> Cost:
        """A small product for every step of every repeat, and a whole one for the residual."""
        return Cost(
            products=1,
            steps=self.depth * self.repeats,
            drawn=self.batch_size,
            bytes=CARRIED * self.repeats * load.bytes,
            without="" if self.preconditioner is None else "its preconditioner",
        )

    def init(self, operator: Operator) -> "LiSSAInverse":
        """Find the scale; with a preconditioner, when there are rows to solve."""
        base, shift = unshifted(operator)
        if not isinstance(base, MeanOperator):
            raise InputError(
                f"LiSSA draws random examples, and {type(base).__name__} is not a mean over "
                "examples. Use 'cg' or 'exact' with it."
            )
        inverse = LiSSAInverse(self, base, shift)
        if self.preconditioner is None:
            inverse.find_scale()
        return inverse


@final
class LiSSAInverse(Inverse):
    """A⁻¹ by the stochastic series.

    Args:
        solver: depth, repeats and seed.
        operator: the undamped mean.
        shift: λ.
    """

    def __init__(self, solver: LiSSA, operator: MeanOperator, shift: float) -> None:
        self.solver, self.operator, self.shift = solver, operator, shift
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.preconditioner: Operator | None = None
        self.basis: KroneckerEigen | None = None
        self.diagonal: Tensor | None = None
        self.scale: float | None = None

    def _precondition(self, rows: Tensor) -> Tensor:
        """P times rows ``[g, q, p]``."""
        if self.diagonal is not None:
            return rows * self.diagonal
        if self.preconditioner is None:
            return rows
        return self.preconditioner.apply(rows.flatten(0, 1)).view_as(rows)

    def _draw(self, groups: int, generator: torch.Generator) -> Tensor:
        shape = groups, self.solver.batch_size
        return torch.randint(self.operator.count, shape, generator=generator, device="cpu")

    def find_scale(self, rows: int = 1) -> float:
        """Make P for so many rows, and find σ; both once."""
        if self.scale is None:
            maker, stated = self.solver.preconditioner, self.solver.scale
            if maker is not None:
                self.preconditioner = maker(self.operator + self.shift, rows)
                found, base = self.preconditioner, self.operator
                # In its basis it is diagonal, and factors of a batch are cheaper to turn than rows.
                if isinstance(found, KroneckerInverse) and isinstance(base, GaussNewton):
                    self.basis, self.diagonal = found.operator, found.scales
                    self.operator = GaussNewton(base.risk, self.basis)
                if found is None:
                    self.notes = ("solved without preconditioner: there is none of this curvature",)
            self.scale = self._stable_scale() if stated == "auto" else stated
        return self.scale

    def _stable_scale(self) -> float:
        """ρ = max vᵀE[M_j²]v / vᵀE[M_j]v by power iteration on E[M_j²] over random batches.

        It is done on u = P½ v, for which M_j² v is P (A_j + λ) P (A_j + λ) u.
        """
        operator, shift = self.operator, self.shift
        generator = torch.Generator().manual_seed(self.solver.seed)
        least, most = PROBE_GROUPS
        groups = min(most, max(least, PROBE_ROWS // self.solver.batch_size))
        u = torch.randn(operator.size, generator=generator, dtype=torch.float64, device="cpu")
        u = (u / u.norm()).to(operator.device, operator.dtype)
        ratios = []
        for _ in track(range(PROBE_ROUNDS), "LiSSA's scale"):
            positions = self._draw(groups, generator)
            rows = u.expand(groups, 1, -1)
            once = operator.apply_sampled(rows, positions).add(rows, alpha=shift)
            turned = self._precondition(once)
            bend = float((rows * once).sum())
            if bend < 0:
                raise IndefiniteError(
                    "The curvature bends down along a direction of the probe. Add damping larger "
                    "than its most negative eigenvalue, or use the GGN."
                )
            ratios.append(float((once * turned).sum()) / max(bend, 1e-30))
            twice = operator.apply_sampled(turned, positions).add(turned, alpha=shift)
            u = self._precondition(twice.mean(0)[None])[0, 0]
            u = u / u.norm().clamp_min(1e-30)
        return max(ratios)

    def _run(self, rhs: Tensor, scale: float) -> Tensor | None:
        """Estimates ``[r, q, p]`` of every repeat, or None when an iterate grows without bound.

        Iterated is y with x = P y, whose length √(y·x) is the one that a stable series bounds.
        """
        solver = self.solver
        generator = torch.Generator().manual_seed(solver.seed)
        v = rhs.expand(solver.repeats, *rhs.shape)
        y = v / scale if self.preconditioner is None else v.clone()
        start = _length(y, self._precondition(y))
        grown = start if self.preconditioner is None else start / scale
        kept = max(1, round(solver.tail * solver.depth))
        total = torch.zeros_like(y)
        for step in track(range(solver.depth), "LiSSA"):
            x = self._precondition(y)
            # A stable series adds at most v a step; the comparison is false for NaN as well.
            if step % CHECKED == 0 and not _length(y, x) <= GROWTH_LIMIT * (start + step * grown):
                return None
            product = self.operator.apply_sampled(x, self._draw(solver.repeats, generator))
            y.sub_(x, alpha=self.shift / scale).sub_(product, alpha=1 / scale)
            y.add_(v, alpha=1 / scale)
            if step >= solver.depth - kept:
                total += y
        mean = self._precondition(total.div_(kept))
        bounded = _length(total, mean) <= GROWTH_LIMIT * (start + solver.depth * grown)
        return mean if bounded else None

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """Mean over repeats, its standard error, and the residual from one full pass."""
        solver, rhs = self.solver, rows.to(self.dtype)
        scale, runs = self.find_scale(len(rhs)), None
        rhs = rhs if self.basis is None else self.basis.turn(rhs)
        for _ in range(RETRIES if solver.scale == "auto" else 1):
            runs = self._run(rhs, scale)
            if runs is not None:
                break
            scale *= 2
        if runs is None:
            nothing, lost = torch.zeros_like(rhs), (Status.DIVERGED,) * len(rhs)
            return Solution(nothing, relative_residual(rhs, nothing), lost, solver.depth)
        value = runs.mean(0)
        if solver.repeats > 1:
            spread = (runs - value).square().sum((0, 2)) / (solver.repeats - 1)
            error = (spread / solver.repeats).sqrt() / value.norm(dim=1).clamp_min(1e-30)
        else:
            error = torch.full((len(rhs),), torch.nan, dtype=self.dtype, device=self.device)
        product = self.operator.apply(value).add(value, alpha=self.shift)
        residual = relative_residual(rhs, product)
        failed = (error > solver.max_error) | (residual > solver.max_residual)
        status = tuple(
            Status.NOT_CONVERGED if lost else Status.CONVERGED for lost in failed.tolist()
        )
        value = value if self.basis is None else self.basis.back(value)
        return Solution(value, residual, status, solver.depth, error)


def _length(y: Tensor, x: Tensor) -> float:
    """√(y·x) over all rows; NaN where the product is negative."""
    return float((y * x).sum(dtype=torch.float64).sqrt())
