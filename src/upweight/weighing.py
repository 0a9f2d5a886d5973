"""Factors on training gradients: what an example could do at all is divided out, or its misfit."""

import copy
from typing import final

import torch
from torch import Tensor

from upweight.engine import Rescale, Scales
from upweight.errors import IndefiniteError, InputError
from upweight.gradients import Seen
from upweight.linalg import Gradients, Inverse, KroneckerInverse, Solution
from upweight.meaning import removal_gradient_row
from upweight.risk import Risk

__all__ = ["per_parameter_change", "per_self_influence", "without_loss"]

# Where a sum is a hundredth of its parts, rounding has a hundred times its share in it.
CANCELS = 1e-2


def without_loss(inverse: Inverse, risk: Risk) -> Rescale:
    """1/(1 − exp(−ℓ)): divides out how badly the example is fitted, leaving −y x for logistic.

    For cross-entropy 1 − exp(−ℓ) is the probability of the other classes, the factor by which
    Figure 1 of Koh & Liang (2017) shows training loss to matter. The L2 part is left out.

    Raises:
        InputError: the loss is not a cross-entropy.

    Example:
        >>> from upweight import Influence
        >>> rows = torch.eye(3), torch.tensor([0, 1, 1])
        >>> inf = Influence(torch.nn.Linear(3, 2), rows, loss="cross_entropy", l2=0.1)
        >>> factors = without_loss(inf.inverse, inf.risk)
    """
    del inverse
    objective = risk.objective
    if objective.loss.unit != "nats":
        raise InputError(
            "The ablation 'no train loss' is defined for cross-entropies. Use another method."
        )

    def factors(seen: Seen) -> Scales:
        with torch.no_grad():
            losses = objective.losses(objective.space.values(), seen.batch())
        factor = 1 / -torch.expm1(-losses).clamp_max(-torch.finfo(losses.dtype).tiny)
        return Scales(factor, torch.zeros_like(factor))

    return factors


def per_parameter_change(inverse: Inverse, risk: Risk) -> Rescale:
    """1/‖H⁻¹∇ℓ̃_i‖: θ-RelatIF of Barshan, Brunet & Dziugaite (2020).

    Of examples that move the parameters equally far, which one moves the query most? Outliers,
    which are influential for every query, no longer lead. An example with ∇ℓ̃_i = 0 scores 0. An
    iterative solver solves once for every training example.

    Raises:
        NotConvergedError, IndefiniteError: a solve failed.

    Example:
        >>> from upweight import Influence
        >>> rows = torch.eye(3), torch.tensor([0, 1, 1])
        >>> inf = Influence(torch.nn.Linear(3, 2), rows, loss="cross_entropy", l2=0.1)
        >>> factors = per_parameter_change(inf.inverse, inf.risk)
    """
    return _relative(_squared(inverse), risk)


def per_self_influence(inverse: Inverse, risk: Risk) -> Rescale:
    """1/√(∇ℓ̃_i H⁻¹ ∇ℓ̃_i): ℓ-RelatIF of Barshan, Brunet & Dziugaite (2020).

    Of examples that change their own loss equally, which one changes the query's most? The rest is
    as for ``per_parameter_change``.

    Raises:
        NotConvergedError, IndefiniteError: a solve failed, or a product is negative.

    Example:
        >>> from upweight import Influence
        >>> rows = torch.eye(3), torch.tensor([0, 1, 1])
        >>> inf = Influence(torch.nn.Linear(3, 2), rows, loss="cross_entropy", l2=0.1)
        >>> factors = per_self_influence(inf.inverse, inf.risk)
    """
    return _relative(inverse, risk)


@final
class _Squared(Inverse):
    """A⁻² of a given A⁻¹: its quadratic form is ‖A⁻¹ b‖², for one solve."""

    def __init__(self, inverse: Inverse) -> None:
        self.inverse = inverse
        self.size, self.dtype, self.device = inverse.size, inverse.dtype, inverse.device

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """Two solves, one after the other."""
        return self.inverse.solve(self.inverse.apply(rows))

    def quadratic(self, rows: Tensor) -> Tensor:
        """‖A⁻¹ b‖² of every row."""
        return self.inverse.apply(rows).square().sum(1)


def _squared(inverse: Inverse) -> Inverse:
    """A⁻², in the same basis where there is one, so that gradients stay in their factors."""
    if not isinstance(inverse, KroneckerInverse):
        return _Squared(inverse)
    twin = copy.copy(inverse)
    twin.inverses = [values.square() for values in inverse.inverses]
    return twin


def _relative(form: Inverse, risk: Risk) -> Rescale:
    """1/√(∇ℓ̃_i A ∇ℓ̃_i) for a form A."""
    row = removal_gradient_row(risk.objective)
    turned = form.apply(row[None])[0] if bool(row.any()) else row
    own = row @ turned

    def squares(gradients: Gradients) -> Tensor:
        # (g + r) A (g + r), opened so that g stays in its factors.
        whole = form.self_products(gradients)
        found = whole + 2 * gradients.dot(turned[None])[0] + own
        unsure = (found < CANCELS * (whole + own)).nonzero()[:, 0].tolist()
        for place in unsure:
            gradient = gradients.part(slice(place, place + 1)).dense()
            found[place] = form.quadratic(gradient + row)[0]
        return found

    def factors(seen: Seen) -> Scales:
        found = squares(seen.gradients)
        if bool((found < 0).any()):
            place = seen.start + int(found.argmin())
            raise IndefiniteError(
                f"∇ℓ H⁻¹ ∇ℓ of row {place} is {float(found.min()):.1e}, so it has no root. Use a "
                "positive curvature (method='l_relatif', or a Gauss-Newton), or more damping."
            )
        factor = torch.where(found > 0, found, torch.inf).rsqrt()
        return Scales(factor, factor)

    return factors
