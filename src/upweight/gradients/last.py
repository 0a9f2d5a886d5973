"""The last layer of a model: the parameters that its forward pass used last."""

import torch

from upweight.data import Batch
from upweight.errors import InputError
from upweight.gradients.watch import Watch
from upweight.objective import Objective

__all__ = ["last_layer"]


def last_layer(objective: Objective, batch: Batch) -> tuple[str, ...]:
    """Names of the parameters in the last operation that used any, by watching one example.

    Raises:
        InputError: no operation with a rule used a parameter.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Softplus())
        >>> batch = Batch((torch.ones(1, 3),), torch.zeros(1, 2), torch.arange(1))
        >>> last_layer(Objective(model, "mean_squared_error"), batch)
        ('2.weight', '2.bias')
    """
    watch = Watch(objective.space.parameters(), len(batch), None, objective.l2)
    with torch.no_grad(), watch:
        objective.call(batch)
    for call in reversed(watch.calls):
        used = {use.name for use in call.uses}
        if used:
            return tuple(name for name in objective.space.shapes if name in used)
    raise InputError(
        "The model's last layer was not found: no known operation uses a parameter. Name it with "
        "parameters=..., and use method='ggn'."
    )
