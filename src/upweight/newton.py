"""A Newton step on what remains of the data, from the factorisation of the whole.

Without a group the curvature is A − E, with A = H + λ over all of the data and E the group's part.
Where A = L Lᵀ is factorised, the step solves

    (1 − L⁻¹ E L⁻ᵀ) y = L⁻¹ g,    Δθ = L⁻ᵀ y

by conjugate gradients. But for the group's L2, L⁻¹ E L⁻ᵀ has the rank (examples · outputs); of one
example with one output its eigenvalue is the leverage. There are about so many steps, each with a
product by the group's own curvature, in place of a factorisation for every group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.errors import DataError, IndefiniteError, NotConvergedError, UpweightError
from upweight.linalg import CholeskyInverse, Operator, Status
from upweight.risk import Risk
from upweight.solvers import CG

__all__ = ["Factorised", "kept_share"]

# Of a residual, by the precision of the group's products.
RTOL = {torch.float64: 1e-13, torch.float32: 1e-6}


def kept_share(risk: Risk, gone: Tensor) -> float:
    """Share of the mean that stays when a group at positions ``[k]`` goes.

    Raises:
        DataError: nothing that has weight is left.
    """
    kept = torch.ones(len(risk.data), dtype=torch.bool, device="cpu")
    kept[gone] = False
    share = float(risk.weights[kept].sum() / risk.total)
    if not share > 0:
        raise DataError("A group holds all of the weight, so nothing is left to train on.")
    return share


@final
class _Remaining(Operator):
    """1 − L⁻¹ E L⁻ᵀ, E = share · (H_group + shift): what a group leaves of A, seen from A.

    Args:
        factor: L, ``[p, p]``, in float64.
        group: H_group, with its L2.
        share: of the group in the mean.
        shift: added to H_group: a number, or a diagonal ``[p]``.
    """

    def __init__(
        self, factor: Tensor, group: Operator, share: float, shift: Tensor | float
    ) -> None:
        self.factor, self.group, self.share, self.shift = factor, group, share, shift
        self.size, self.dtype, self.device = group.size, factor.dtype, factor.device

    def into(self, rows: Tensor) -> Tensor:
        """Rows L⁻ᵀ: a right-hand side as this operator takes it."""
        found: Tensor = torch.linalg.solve_triangular(self.factor, rows.T, upper=False)
        return found.T

    def back(self, rows: Tensor) -> Tensor:
        """Rows L⁻¹: a solution as a step of the parameters."""
        found: Tensor = torch.linalg.solve_triangular(self.factor.T, rows.T, upper=True)
        return found.T

    def apply(self, rows: Tensor) -> Tensor:
        """Rows minus the group's part of them."""
        inner = self.back(rows).to(self.group.dtype)
        lost = self.group.apply(inner) + inner * self.shift
        return rows - self.share * self.into(lost.to(self.dtype))


@final
@dataclass(frozen=True)
class Factorised:
    """A curvature that is a mean over examples, factorised with all of them.

    Attributes:
        fit: the curvature of given examples, with L2.
        inverse: (H + λ)⁻¹ of all examples.
        damping: λ.

    Example:
        >>> import upweight as uw
        >>> x, y = torch.eye(4).double(), torch.arange(4).double()
        >>> model = torch.nn.Linear(4, 1, bias=False).double()
        >>> inf = uw.Influence(model, (x, y), loss="mean_squared_error", l2=0.1)
        >>> one = Factorised(inf.method.fit, inf.inverse, damping=0.0)
        >>> one.step(inf.risk, torch.tensor([0]), torch.ones(4).double()).shape
        torch.Size([4])
    """

    fit: Callable[[Risk], Operator]
    inverse: CholeskyInverse
    damping: float

    def step(self, risk: Risk, gone: Tensor, slope: Tensor) -> Tensor:
        """Δθ = (H − H_group + λ)⁻¹ g, ``[p]``; where removal is "mean", λ leaves as L2 does.

        Args:
            risk: objective and all examples.
            gone: positions of the group, ``[k]``.
            slope: g, what the group pulled with, ``[p]``.

        Raises:
            NotConvergedError, IndefiniteError: what remains has no minimum nearby.
            DataError: nothing that has weight is left.
        """
        kept_share(risk, gone)
        share = float(risk.weights[gone].sum() / risk.total)
        if not share:
            return torch.zeros_like(slope)
        objective = risk.objective
        group = self.fit(Risk(objective, risk.data.take(gone)))
        # "sum": L2 and damping stay whole, so that the group's own L2 is none of E.
        shift = self.damping if objective.removal == "mean" else -objective.l2
        remaining = _Remaining(self.inverse.factor, group, share, shift)
        solver = CG(rtol=RTOL.get(group.dtype, 1e-3), max_steps=2 * group.size + 100)
        found = solver.init(remaining).solve(remaining.into(slope[None].to(remaining.dtype)))
        if found.status[0] != Status.CONVERGED:
            raise _refusal(found.status[0], float(found.residual[0]))
        return remaining.back(found.value)[0].to(slope.dtype)


def _refusal(status: Status, residual: float) -> UpweightError:
    """Why there is no step."""
    if status == Status.NEGATIVE_CURVATURE:
        return IndefiniteError(
            "Without the group the curvature bends down along a direction, so that no minimum is "
            "near. Use method='ggn', or add damping."
        )
    return NotConvergedError(
        f"The Newton step without the group was not found (relative residual {residual:.1e}). Add "
        "damping, or compute in float64 (model.double())."
    )
