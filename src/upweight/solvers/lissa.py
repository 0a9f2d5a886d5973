"""LiSSA: a stochastic Neumann series (Agarwal, Bullins & Hazan, 2017; Koh & Liang, 2017)."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.errors import IndefiniteError, InputError
from upweight.linalg.cost import Cost, Load
from upweight.linalg.operator import MeanOperator, Operator, Shifted
from upweight.linalg.solution import Solution, Status, relative_residual
from upweight.linalg.solver import Inverse, Solver

__all__ = ["LiSSA"]

GROWTH_LIMIT = 10.0
CARRIED = 4  # rows of every repeat, at a time
PROBE_GROUPS, PROBE_ROUNDS, RETRIES = 64, 12, 8


@final
@dataclass(frozen=True)
class LiSSA(Solver):
    """x ← mean over repeats of h/σ with h_{j+1} = v + h_j − (A_j + λ) h_j / σ.

    A_j is the curvature of a random batch. The fixed point is (A + λ)⁻¹ v: damping λ stands beside
    the curvature. The reference code of Koh & Liang writes h ← v + (1 − d) h − A_j h / σ, whose
    damping is λ = σ d: pass
    ``damping=LiSSA.damping_from_reference(scale, damp)``.

    The part (1 − e/σ)^(t+1) of the answer is missing along eigenvalue e after t steps, so flat
    directions (e below σ/t) are shortened.

    Args:
        scale: σ, above half the largest curvature of a batch; "auto" estimates the mean-square
            stability limit ρ = max vᵀE[A_j²]v / vᵀE[A_j]v, takes σ = ρ, and doubles it if iterates
            still grow.
        depth: steps t.
        repeats: independent runs r.
        batch_size: rows per step.
        tail: share of the last iterates that each repeat averages (Polyak & Juditsky, 1992), which
            removes most of the noise; 0 takes the last one alone, as Koh & Liang do.
        seed: of the row draws.
        max_error: a row fails when its standard error over the repeats exceeds this share of it.
        max_residual: a row fails when ‖b − A x‖ exceeds this share of ‖b‖: too few steps.

    Raises:
        InputError: the operator is not a mean over examples (and so cannot be sampled).

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

    @staticmethod
    def damping_from_reference(scale: float, damp: float) -> float:
        """λ = σ d: the damping beside the curvature that the reference's (σ, d) amounts to."""
        return scale * damp

    def cost(self, load: Load) -> Cost:
        """As many examples' products as are drawn, and one with all of them for the residual."""
        drawn = self.depth * self.repeats * self.batch_size / load.examples
        return Cost(products=drawn + 1, bytes=CARRIED * self.repeats * load.bytes)

    def init(self, operator: Operator) -> "LiSSAInverse":
        """Find the scale."""
        shift = operator.shift if isinstance(operator, Shifted) else 0.0
        base = operator.base if isinstance(operator, Shifted) else operator
        if not isinstance(base, MeanOperator):
            raise InputError(
                f"LiSSA draws random examples, and {type(base).__name__} is not a mean over "
                "examples. Use 'cg' or 'exact' with it."
            )
        scale = _stable_scale(base, self) + shift if self.scale == "auto" else self.scale
        return LiSSAInverse(self, base, shift, scale)


def _draw(operator: MeanOperator, groups: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(operator.count, (groups, size), generator=generator, device="cpu")


def _stable_scale(operator: MeanOperator, solver: LiSSA) -> float:
    """ρ = max vᵀE[A_j²]v / vᵀE[A_j]v by power iteration on E[A_j²] over random batches."""
    generator = torch.Generator().manual_seed(solver.seed)
    v = torch.randn(operator.size, generator=generator, dtype=torch.float64, device="cpu")
    v = (v / v.norm()).to(operator.device, operator.dtype)
    ratios = []
    for _ in range(PROBE_ROUNDS):
        positions = _draw(operator, PROBE_GROUPS, solver.batch_size, generator)
        rows = v.expand(PROBE_GROUPS, 1, -1)
        once = operator.apply_sampled(rows, positions)
        twice = operator.apply_sampled(once, positions)
        bend = float((rows * once).sum())
        if bend < 0:
            raise IndefiniteError(
                "The curvature bends down along a direction of the probe. Add damping larger than "
                "its most negative eigenvalue, or use the GGN."
            )
        ratios.append(float(once.square().sum()) / max(bend, 1e-30))
        v = twice.mean(0)[0]
        v = v / v.norm()
    return max(ratios)


@final
class LiSSAInverse(Inverse):
    """A⁻¹ by the stochastic series.

    Args:
        solver: depth, repeats and seed.
        operator: the undamped mean.
        shift: λ.
        scale: σ.
    """

    def __init__(self, solver: LiSSA, operator: MeanOperator, shift: float, scale: float) -> None:
        self.solver, self.operator, self.shift, self.scale = solver, operator, shift, scale
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device

    def _run(self, rhs: Tensor, scale: float) -> Tensor | None:
        """Estimates ``[r, q, p]`` of every repeat, or None when an iterate grows without bound."""
        solver = self.solver
        generator = torch.Generator().manual_seed(solver.seed)
        v = rhs.expand(solver.repeats, *rhs.shape)
        h, start = v.clone(), float(v.norm())
        kept = max(1, round(solver.tail * solver.depth))
        total = torch.zeros_like(h)
        for step in track(range(solver.depth), "LiSSA"):
            positions = _draw(self.operator, solver.repeats, solver.batch_size, generator)
            product = self.operator.apply_sampled(h, positions)
            h = h.mul_(1 - self.shift / scale).sub_(product, alpha=1 / scale).add_(v)
            if step >= solver.depth - kept:
                total += h
            # A stable series adds at most v a step; the comparison is false for NaN as well.
            if step % 50 == 0 and not float(h.norm()) <= GROWTH_LIMIT * (step + 1) * start:
                return None
        mean = total.div_(kept * scale)
        return mean if bool(torch.isfinite(mean).all()) else None

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """Mean over repeats, its standard error, and the residual from one full pass."""
        solver, rhs = self.solver, rows.to(self.dtype)
        scale, runs = self.scale, None
        for _ in range(RETRIES if solver.scale == "auto" else 1):
            runs = self._run(rhs, scale)
            if runs is not None:
                break
            scale *= 2
        if runs is None:
            nothing = torch.full_like(rhs, torch.nan)
            lost = torch.full((len(rhs),), torch.inf, device=self.device)
            return Solution(nothing, lost, (Status.DIVERGED,) * len(rhs), solver.depth, lost)
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
        return Solution(value, residual, status, solver.depth, error)

    def quadratic(self, rows: Tensor) -> Tensor:
        """B A⁻¹ b of every row by a solve."""
        return (rows * self.solve(rows).require()).sum(1)
