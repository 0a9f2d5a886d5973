"""Update rules, as torch has them, for many models stacked in one tensor per parameter."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from upweight.errors import InputError

__all__ = ["SGD", "Adam", "AdamW", "Optimiser"]

FUSED = ("cpu", "cuda")


class Optimiser(ABC):
    """An update rule that works on every number by itself, so that stacked models do not mix."""

    lr: float
    momentum: float = 0.0
    couples_l2 = True

    @abstractmethod
    def of(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """Torch's own optimiser of groups ``{"params": [...], "weight_decay": λ}``.

        Where ``couples_l2`` is true, the λ of a group joins the gradient as that of L2 does.
        """


def _check(lr: float, betas: tuple[float, float] = (0.0, 0.0)) -> None:
    if not 0 < lr < float("inf"):
        raise InputError(f"lr is a positive number, got {lr!r}.")
    if not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"betas are from 0 to below 1, got {betas!r}.")


def _fused(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether there is one kernel for the whole update: on a processor it reads memory once."""
    first: Tensor = groups[0]["params"][0]
    return first.device.type in FUSED


@final
@dataclass(frozen=True)
class SGD(Optimiser):
    """Stochastic gradient descent, v ← momentum·v + ∇R, θ ← θ − lr·v, as ``torch.optim.SGD``.

    Attributes:
        lr: learning rate, before the schedule.
        momentum: from 0 to below 1.
        nesterov: θ ← θ − lr·(∇R + momentum·v).

    Raises:
        InputError: a setting is out of range, or nesterov has no momentum.

    Example:
        >>> SGD(0.05, momentum=0.9)
        SGD(lr=0.05, momentum=0.9, nesterov=False)
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check(self.lr)
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum is from 0 to below 1, got {self.momentum!r}.")
        if self.nesterov and not self.momentum:
            raise InputError("nesterov looks ahead along the momentum. Pass momentum > 0.")

    def of(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """``torch.optim.SGD``."""
        return torch.optim.SGD(
            groups, self.lr, self.momentum, nesterov=self.nesterov, fused=_fused(groups)
        )


@final
@dataclass(frozen=True)
class Adam(Optimiser):
    """Adam (Kingma & Ba, 2015), as ``torch.optim.Adam``; L2 is part of the gradient.

    Attributes:
        lr: learning rate, before the schedule.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the second.

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> Adam(1e-3).betas
        (0.9, 0.999)
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check(self.lr, self.betas)

    def of(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """``torch.optim.Adam``."""
        return torch.optim.Adam(groups, self.lr, self.betas, self.eps, fused=_fused(groups))


@final
@dataclass(frozen=True)
class AdamW(Optimiser):
    """Adam with decoupled decay (Loshchilov & Hutter, 2019), as ``torch.optim.AdamW``.

    The decay θ ← θ − lr·weight_decay·θ is no part of the loss: an objective's L2 comes on top.

    Attributes:
        lr: learning rate, before the schedule.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the second.
        weight_decay: of every parameter.

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> AdamW(1e-3).weight_decay
        0.01
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    couples_l2 = False

    def __post_init__(self) -> None:
        _check(self.lr, self.betas)
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(f"weight_decay is a number ≥ 0, got {self.weight_decay!r}.")

    def of(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """``torch.optim.AdamW``."""
        decayed = [group | {"weight_decay": self.weight_decay} for group in groups]
        return torch.optim.AdamW(decayed, self.lr, self.betas, self.eps, fused=_fused(groups))
