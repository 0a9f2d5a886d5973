"""A preconditioner for any curvature of a risk: EK-FAC of the same risk, inverted."""

from dataclasses import dataclass, field
from functools import partial
from typing import final
from weakref import WeakKeyDictionary

from upweight.curvature import EKFAC, KFAC, kronecker_fit
from upweight.linalg import KroneckerEigen, Operator, Spectral, unshifted
from upweight.risk import OfRisk

__all__ = ["Kronecker"]


_FITTED: WeakKeyDictionary[Operator, dict[KFAC | EKFAC, KroneckerEigen]] = WeakKeyDictionary()


@final
@dataclass(frozen=True)
class Kronecker:
    """(K + λ)⁻¹ for a Kronecker-factored K of the risk behind a curvature A.

    It is fitted once for A, whatever the damping. An iteration corrects it, so it decides the
    number of steps and not the answer.

    Args:
        fit: how K is made; as the row ``ekfac`` does by default.

    Raises:
        IndefiniteError: K + λ is singular: there is neither L2 nor damping.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from upweight import CG, Data, Objective, Risk
        >>> from upweight.curvature import GaussNewton
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
        >>> data = Data.of((torch.eye(3), torch.tensor([0, 1, 1])))
        >>> matrix = GaussNewton(Risk(Objective(model, "cross_entropy", l2=0.1), data))
        >>> CG(preconditioner=Kronecker()).init(matrix).solve(torch.ones(1, 14)).status
        (<Status.CONVERGED: 'converged'>,)
    """

    fit: KFAC | EKFAC = field(default_factory=partial(kronecker_fit, "ekfac"))

    def __call__(self, operator: Operator, rows: int) -> Operator | None:
        """The preconditioner of a risk's curvature, or None of anything else."""
        del rows
        base, shift = unshifted(operator)
        if not isinstance(base, OfRisk):
            return None
        known = _FITTED.setdefault(base, {})
        if self.fit not in known:
            known[self.fit] = self.fit(base.risk)
        return Spectral().init(known[self.fit] + shift)
