"""Linear, logistic and softmax models: closed forms that never go through autograd."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from upweight.data import Batch
from upweight.linalg.values import split_rows
from upweight.losses import OutputLoss
from upweight.objective import Measure, Objective

__all__ = ["LinearForm", "linear_form", "residual"]


@final
@dataclass(frozen=True)
class LinearForm:
    """z = x̃ Wᵀ + fixed, the model as seen by its chosen parameters.

    x̃ carries a 1 at its end when the bias is chosen too.

    Attributes:
        prefix: what comes before the last linear layer, without chosen parameters.
        layer: the linear layer.
        bias: whether its bias is a chosen parameter.
    """

    prefix: nn.Module
    layer: nn.Linear
    bias: bool

    def features(self, inputs: tuple[Any, ...]) -> Tensor:
        """x̃, ``[n, d]``."""
        with torch.no_grad():
            x: Tensor = self.prefix(*inputs)
        return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if self.bias else x

    def outputs(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        """Z ``[n, c]`` at the model's parameters, or ``[n, m, c]`` at parameter rows ``[m, p]``."""
        if rows is None:
            with torch.no_grad():
                outputs: Tensor = self.layer(features[:, : self.layer.in_features])
            return outputs
        blocks = split_rows(rows, features.shape[1], bias=self.bias)
        outputs = (features @ blocks.flatten(0, 1).T).view(len(features), *blocks.shape[:2])
        fixed = None if self.bias else self.layer.bias
        return outputs if fixed is None else outputs + fixed.detach()


def linear_form(objective: Objective, batch: Batch) -> LinearForm | None:
    """The closed form of a model whose chosen parameters are its last linear layer, or None.

    Recognised are ``nn.Linear`` and ``nn.Sequential`` ending in one, with a loss that has closed
    derivatives, rows of features ``[n, d]`` and one target per row. Under autocast there is none:
    the numbers would be those of another precision than the model's.

    Example:
        >>> objective = Objective(nn.Linear(3, 2), "cross_entropy")
        >>> batch = Batch((torch.zeros(1, 3),), torch.tensor([0]), torch.tensor([0]))
        >>> linear_form(objective, batch).bias
        True
    """
    model = objective.model
    # Exact types, and no hooks: a subclass or a hook may do anything with the outputs.
    stacked = type(model) is nn.Sequential and len(model) > 0
    last = model[-1] if isinstance(model, nn.Sequential) and stacked else model
    if type(last) is not nn.Linear or not isinstance(objective.loss, OutputLoss):
        return None
    if objective.autocast is not None:
        return None
    if _hooked(model) or _hooked(last):
        return None
    prefix = model[:-1] if isinstance(model, nn.Sequential) else nn.Identity()
    own = {id(last.weight): "weight", id(last.bias): "bias"}
    named = dict(model.named_parameters())
    chosen = [own.get(id(named[name]), "other") for name in objective.space.shapes]
    if chosen not in (["weight"], ["weight", "bias"]) or isinstance(batch.inputs, dict):
        return None
    if any(p is last.weight or p is last.bias for p in prefix.parameters()):
        return None
    with torch.no_grad():
        plain = isinstance(prefix, nn.Sequential) or len(batch.inputs) == 1
        if not plain or prefix(*_first(batch.inputs)).dim() != 2:
            return None
    return LinearForm(prefix, last, len(chosen) == 2)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _first(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x[:1] if isinstance(x, Tensor) else x for x in inputs)


def residual(objective: Objective, outputs: Tensor, targets: Any, measure: Measure) -> Tensor:
    """Derivative ``[n, c]`` of a measure in the outputs; in closed form for the loss."""
    if measure == "loss" and isinstance(objective.loss, OutputLoss):
        return objective.loss.residual(outputs, targets)
    asked = measure if callable(measure) else getattr(objective.loss, measure)
    leaf = outputs.detach().requires_grad_(True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(asked(leaf, targets).sum(), leaf)
    return slope
