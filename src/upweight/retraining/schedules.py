"""Learning rates over a training, as a factor on the optimiser's rate at every step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from upweight.errors import InputError

__all__ = ["Constant", "Cosine", "Drops", "Linear", "Schedule"]

Schedule = Callable[[int, int], float]
"""(step from 0, steps in all) -> factor."""


@final
@dataclass(frozen=True)
class Constant:
    """Always 1.

    Example:
        >>> Constant()(3, 10)
        1.0
    """

    def __call__(self, step: int, steps: int) -> float:
        """The factor of a step."""
        del step, steps
        return 1.0


@final
@dataclass(frozen=True)
class Cosine:
    """From 1 to a floor along half a cosine (Loshchilov & Hutter, 2017), without restarts.

    As ``torch.optim.lr_scheduler.CosineAnnealingLR`` stepped after every minibatch, T_max = steps.

    Attributes:
        floor: what it falls to.

    Example:
        >>> [round(Cosine()(step, 4), 3) for step in range(4)]
        [1.0, 0.854, 0.5, 0.146]
    """

    floor: float = 0.0

    def __call__(self, step: int, steps: int) -> float:
        """The factor of a step."""
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * step / steps)) / 2


@final
@dataclass(frozen=True)
class Linear:
    """Rises from 0 to 1, then falls to 0, both linearly.

    As ``get_linear_schedule_with_warmup`` of Hugging Face's transformers: the very first step of a
    warm-up has rate 0.

    Attributes:
        warmup: steps of the rise.

    Raises:
        InputError: warmup is negative.

    Example:
        >>> [Linear(warmup=2)(step, 6) for step in range(6)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """

    warmup: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise InputError(f"warmup is a number of steps ≥ 0, got {self.warmup!r}.")

    def __call__(self, step: int, steps: int) -> float:
        """The factor of a step."""
        if step < self.warmup:
            return step / self.warmup
        return max(0.0, (steps - step) / max(1, steps - self.warmup))


@final
@dataclass(frozen=True)
class Drops:
    """Multiplied by a factor at given parts of the training.

    Attributes:
        at: parts between 0 and 1 at which the rate drops, rising.
        factor: of every drop.

    Raises:
        InputError: the parts do not rise from 0 to 1.

    Example:
        >>> [Drops(at=(0.5, 0.75))(step, 4) for step in range(4)]
        [1.0, 1.0, 0.1, 0.010000000000000002]
    """

    at: tuple[float, ...]
    factor: float = 0.1

    def __post_init__(self) -> None:
        if list(self.at) != sorted(self.at) or not all(0 < part < 1 for part in self.at):
            raise InputError(f"at are rising parts between 0 and 1, got {self.at!r}.")

    def __call__(self, step: int, steps: int) -> float:
        """The factor of a step."""
        return float(self.factor ** sum(step >= part * steps for part in self.at))
