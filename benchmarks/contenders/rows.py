"""Gradients of single examples with torch.func, for libraries that leave them to the user."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


def gradient_rows(
    problem: Any, model: nn.Module, names: list[str], pair: tuple[Tensor, Tensor]
) -> Tensor:
    """∇ℓ of each example ``[b, p]`` in the named parameters."""
    fixed = {name: p.detach() for name, p in model.named_parameters() if name not in names}
    fixed |= dict(model.named_buffers())
    moved = {name: model.get_parameter(name).detach() for name in names}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(model, {**fixed, **params}, (x[None],))
        one: Tensor = problem.losses(outputs, y[None])[0]
        return one

    found = vmap(grad(loss), in_dims=(None, 0, 0))(moved, *pair)
    return torch.cat([found[name].flatten(1) for name in names], 1)
