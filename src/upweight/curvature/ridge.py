"""The curvature of an objective's L2 alone, as if the losses did not bend: representer points."""

from upweight.gradients import risk_layout
from upweight.linalg import Eigenblock, KroneckerEigen
from upweight.risk import Risk

__all__ = ["ridge"]

STATIONARY = 0.01


def ridge(risk: Risk) -> KroneckerEigen:
    """Λ, with a note if the model is not where representer points presume (Yeh et al., 2018).

    Where ∇R = 0, θ = −Σ_i share_i ∇ℓ_i / Λ: a measure that is linear in θ is a sum over training
    examples, and minus an example's term is its score when Λ is all of H. So it is with
    ``removal="sum"``; with ``"mean"`` the example takes its part of the L2 along, as for any H. The
    note says ‖∇R‖ / (‖Σ_i share_i ∇ℓ_i‖ + ‖Λθ‖) where it is above 1 %. Damping makes all terms
    smaller.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.eye(3), torch.tensor([0, 1, 1])))
        >>> model = nn.Linear(3, 2, bias=False)
        >>> ridge(Risk(Objective(model, "cross_entropy", l2=0.5), data)) @ torch.ones(6)
        tensor([0.5000, 0.5000, 0.5000, 0.5000, 0.5000, 0.5000])
    """
    objective = risk.objective
    slope, pull = risk.gradient(), objective.l2 * objective.space.row()
    whole = float((slope - pull).norm() + pull.norm())
    relative = float(slope.norm()) / max(whole, 1e-300)
    notes = (
        f"the gradient of the regularised risk is {relative:.0%} of its parts, not 0: representer "
        "values do not add up to the model's outputs",
    )
    layout = risk_layout(risk)
    blocks = [Eigenblock(b, None, None, b.read(objective.l2[None])[0]) for b in layout.blocks]
    known = notes if relative > STATIONARY else ()
    return KroneckerEigen(blocks, objective.space.size, known, mass=risk.total)
