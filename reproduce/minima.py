"""Training convex models to their minimum, in float64."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["binary_losses", "linear", "minimise"]


def binary_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy ``[n]`` of logits ``[n, 1]`` and labels 0 or 1."""
    return F.binary_cross_entropy_with_logits(outputs[:, 0], targets.double(), reduction="none")


def linear(width: int, outputs: int = 1) -> nn.Linear:
    """A linear model without bias, at zero, in float64."""
    model = nn.Linear(width, outputs, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def minimise(
    model: nn.Module,
    losses: Callable[[Tensor, Tensor], Tensor],
    data: tuple[Tensor, Tensor],
    l2: float,
    *,
    steps: int = 600,
) -> nn.Module:
    """The minimiser of mean loss + ½ l2 ‖θ‖² over all parameters, from where the model stands.

    Args:
        model: trained in place, and returned.
        losses: (outputs, targets) -> ``[n]``.
        data: inputs and targets.
        l2: of every parameter.
        steps: of L-BFGS; it ends earlier at a gradient of 1e-9.
    """
    x, y = data
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, tolerance_grad=1e-9, tolerance_change=0,
        history_size=50, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        norm = sum(p.square().sum() for p in model.parameters())
        loss = losses(model(x), y).mean() + 0.5 * l2 * norm
        loss.backward()
        return loss

    optimiser.step(closure)
    return model
