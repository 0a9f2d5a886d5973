"""Gradients of the losses of one minibatch for many models, each in its own parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.func import vmap

from upweight.data import Batch
from upweight.gradients import math_attention
from upweight.losses import OutputLoss
from upweight.objective import Objective
from upweight.retraining.minibatches import Minibatch
from upweight.sources import map_leaves

__all__ = ["Mapped", "Parts", "Single", "Slopes", "output_slope"]

Blocks = Mapping[str, Tensor]


class Slopes(ABC):
    """Σ_i share[m, i] ∇ℓ_i(θ_m) for models θ_m, without L2.

    Attributes:
        name: in words.
    """

    name: str

    @abstractmethod
    def __call__(self, blocks: Blocks, step: Minibatch) -> Sequence[Tensor]:
        """Gradients ``[m, *shape]`` of every block, good until the next call.

        Args:
            blocks: parameters of m models, ``[m, *shape]`` each.
            step: their minibatch.
        """


def output_slope(objective: Objective, outputs: Any, step: Minibatch) -> Tensor | None:
    """∂(Σ share ℓ)/∂z of outputs ``[m · b, c]``, where the loss has it in closed form."""
    plain = isinstance(outputs, Tensor) and outputs.dim() == 2
    if not (plain and isinstance(objective.loss, OutputLoss)):
        return None
    with torch.no_grad():
        found = objective.loss.residual(outputs.detach(), step.batch.targets)
        return found * step.shares.reshape(-1, 1)


def _pulled(
    objective: Objective, outputs: Any, step: Minibatch, leaves: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients in leaves of Σ share ℓ, zero in those that the outputs do not depend on."""
    slope = output_slope(objective, outputs, step)
    if slope is None:
        losses = objective.loss(outputs, step.batch.targets)
        outputs, slope = losses, step.shares.reshape(-1).to(losses)
    found = torch.autograd.grad(outputs, leaves, slope, allow_unused=True)
    return [
        torch.zeros_like(leaf) if part is None else part.contiguous()
        for leaf, part in zip(leaves, found, strict=True)
    ]


@final
class Single(Slopes):
    """One model at a time, as the module computes it.

    Args:
        objective: the model in train mode, and its loss.
    """

    name = "autograd"

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __call__(self, blocks: Blocks, step: Minibatch) -> Sequence[Tensor]:
        """Gradients ``[1, *shape]``."""
        leaves = {name: block[0].detach().requires_grad_() for name, block in blocks.items()}
        with torch.enable_grad():
            outputs = self._objective.outputs(leaves, step.batch)
            found = _pulled(self._objective, outputs, step, list(leaves.values()))
        return [part[None] for part in found]


@final
class Mapped(Slopes):
    """Many models at once, vectorised by ``torch.func``.

    Only the forward pass is mapped; the loss is of all rows together, and one backward pass goes
    through the stacked operations.

    Args:
        objective: the models' form in train mode, and its loss.
    """

    name = "vectorised"

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __call__(self, blocks: Blocks, step: Minibatch) -> Sequence[Tensor]:
        """Gradients ``[m, *shape]``."""
        objective, shape = self._objective, step.shape
        inputs = step.batch.inputs
        if not step.together:
            inputs = map_leaves(lambda leaf: leaf.unflatten(0, shape), inputs)
        leaves = {name: block.detach().requires_grad_() for name, block in blocks.items()}

        def outputs(params: Blocks, inputs: Any) -> Any:
            return objective.outputs(params, Batch(inputs, None, step.batch.positions))

        mapped: Callable[..., Any] = vmap(outputs, in_dims=(0, None if step.together else 0))
        with torch.enable_grad(), math_attention():
            stacked = map_leaves(lambda leaf: leaf.flatten(0, 1), mapped(leaves, inputs))
            return _pulled(objective, stacked, step, list(leaves.values()))


@final
class Parts(Slopes):
    """Many models in parts: together are those that keep about as many rows.

    Rows that only fill up cost as much as others, and of many models the fullest has far more than
    the mean: of a half of eight, four are kept on average, and seven by the fullest of 32.

    Args:
        slopes: of one part.
        at_once: models in it, at most.
    """

    name = "parts"

    def __init__(self, slopes: Slopes, at_once: int) -> None:
        self._of_part, self._at_once = slopes, at_once
        self._found: list[Tensor] = []

    def __call__(self, blocks: Blocks, step: Minibatch) -> Sequence[Tensor]:
        """Gradients ``[m, *shape]``, in memory that the next call writes again."""
        if not self._found:
            self._found = [torch.empty_like(block) for block in blocks.values()]
        order = (step.shares > 0).sum(1).argsort(stable=True)
        for models in order.tensor_split(-(-len(order) // self._at_once)):
            some = {name: block[models] for name, block in blocks.items()}
            for every, part in zip(self._found, self._of_part(some, step.of(models)), strict=True):
                every.index_copy_(0, models, part)
        return self._found
