"""The demo's models, trained to a real minimum of a stated objective."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODELS", "Model", "minimise", "one_thread"]

HIDDEN = 16


@final
@dataclass(frozen=True)
class Model:
    """A model of the demo.

    Attributes:
        name: on the page.
        folder: of its part of the run.
        l2: λ of ½λ‖θ‖² in its objective. The network's is large enough for refits without one
            example to stay in the basin of the full fit (at half of it, some leave).
        build: makes it, untrained, in float64.
    """

    name: str
    folder: str
    l2: float
    build: Callable[[], nn.Module]


def _softmax() -> nn.Module:
    return nn.Linear(64, 10, dtype=torch.float64)


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10)).double()


MODELS = (
    Model("Softmax regression", "softmax", 0.01, _softmax),
    Model(f"Network 64-{HIDDEN}-10, tanh", "network", 0.02, _network),
)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run what is inside on one thread: matrices as small as the demo's are slower on several.

    Example:
        >>> with one_thread():
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def minimise(model: nn.Module, rows: tuple[Tensor, Tensor], l2: float) -> float:
    """Train on the mean cross-entropy plus ½ l2 ‖θ‖² by L-BFGS until nothing moves any more.

    Args:
        model: changed in place.
        rows: inputs and labels.
        l2: λ.

    Returns:
        The norm of the gradient where it ended.

    Example:
        >>> rows = (torch.eye(3, dtype=torch.float64), torch.tensor([0, 1, 2]))
        >>> minimise(nn.Linear(3, 3, dtype=torch.float64), rows, 0.1) < 1e-7
        True
    """
    inputs, labels = rows
    weights = list(model.parameters())
    optimiser = torch.optim.LBFGS(
        weights,
        max_iter=20_000,
        max_eval=40_000,
        tolerance_grad=1e-10,
        tolerance_change=0.0,
        history_size=100,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        optimiser.zero_grad()
        squares = torch.stack([weight.square().sum() for weight in weights]).sum()
        loss = F.cross_entropy(model(inputs), labels) + 0.5 * l2 * squares
        loss.backward()
        return float(loss.detach())

    optimiser.step(objective)
    objective()
    gradients = [weight.grad.flatten() for weight in weights if weight.grad is not None]
    optimiser.zero_grad()
    return float(torch.cat(gradients).norm())
