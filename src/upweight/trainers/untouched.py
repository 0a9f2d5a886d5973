"""Modules, gradients and random states exactly as they were, whatever a user's function does."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Changes", "untouched"]


@final
class Changes:
    """Names of parameters and buffers that had to be put back."""

    def __init__(self) -> None:
        self.names: list[str] = []


def _bits(tensor: Tensor) -> Tensor:
    """Bytes: NaN is itself there, and −0 is not 0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@final
class _Kept:
    """A parameter or buffer with its value, its gradient and what it requires."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.value = tensor.detach().clone()
        self.requires_grad = tensor.requires_grad
        self.grad = tensor.grad if tensor.is_leaf else None
        self.grad_value = None if self.grad is None else self.grad.detach().clone()

    def put_back(self) -> bool:
        """Restore; whether the value had changed."""
        tensor = self.tensor.detach()
        changed = not torch.equal(_bits(tensor), _bits(self.value))
        if changed:
            tensor.copy_(self.value)
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self.requires_grad)
            self.tensor.grad = self.grad
        if self.grad is not None and self.grad_value is not None:
            self.grad.detach().copy_(self.grad_value)
        return changed


@contextmanager
def _same_random_states(devices: list[int]) -> Iterator[None]:
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


@contextmanager
def untouched(modules: Sequence[nn.Module]) -> Iterator[Changes]:
    """Put parameters, buffers, gradients, modes and random states back, also after an exception.

    Costs a copy of the modules.

    Args:
        modules: whose state is kept.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> with untouched([layer]) as changes:
        ...     _ = layer.train(False), nn.init.zeros_(layer.weight)
        >>> changes.names, layer.training, bool(layer.weight == 0)
        (['weight'], True, False)
    """
    changes = Changes()
    layers = {id(part): part for module in modules for part in module.modules()}
    held = [
        (part, part.training, dict(part._parameters), dict(part._buffers))
        for part in layers.values()
    ]
    named = [
        pair for module in modules for pair in (*module.named_parameters(), *module.named_buffers())
    ]
    kept = [_Kept(name, tensor) for name, tensor in {id(t): (n, t) for n, t in named}.values()]
    devices = sorted({item.tensor.get_device() for item in kept if item.tensor.is_cuda})
    try:
        with _same_random_states(devices):
            yield changes
    finally:
        with torch.no_grad():
            for part, training, parameters, buffers in held:
                part.training = training
                part._parameters.update(parameters)
                part._buffers.update(buffers)
            changes.names += [item.name for item in kept if item.put_back()]
