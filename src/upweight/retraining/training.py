"""A training as a recipe: everything that decides which model comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.damping import FiniteTraining
from upweight.errors import InputError
from upweight.retraining.optimisers import SGD, Optimiser
from upweight.retraining.schedules import Constant, Schedule
from upweight.retraining.starts import Fresh, Start, Trained

__all__ = ["Order", "Training", "shuffled"]

CONSTANT, FRESH = Constant(), Fresh()
Order = Callable[[int, int, int], Tensor]


def shuffled(seed: int, epoch: int, count: int) -> Tensor:
    """The order of an epoch: a permutation ``[count]`` drawn from seed and epoch.

    Example:
        >>> sorted(shuffled(0, 1, 4).tolist())
        [0, 1, 2, 3]
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


@final
@dataclass(frozen=True)
class Training:
    """A training by minibatches: what is minimised is in the objective, how is here.

    Every step follows the gradient of the minibatch's weighted mean loss plus L2,
    Σ w_i ℓ_i / Σ w_i + ½ θᵀΛθ. The model trains in train mode; dropout and batch statistics work as
    they do there, one model after the other and from the seed.

    *Without some examples* a training meets the same minibatches with these missing, in the same
    order from the same weights: changes are those of this very run. Where the objective says
    removal "mean", the mean is over what remains of a minibatch; "sum": what remains keeps its
    share. A minibatch of which nothing remains moves along L2 and momentum alone. To ask for
    models of other orders, use other seeds. A long training of a network may amplify rounding as it
    does every other change: the truth then says so, and only the answer on average means much.

    Attributes:
        epochs: passes over the data.
        batch_size: examples of a step; the last step of an epoch has what is left.
        optimiser: ``SGD``, ``Adam`` or ``AdamW``.
        schedule: factor on its rate, ``(step, steps) -> factor``.
        seed: of weights and order of the model at hand; trials name theirs.
        start: ``Fresh()`` weights from the seed, the weights at hand (``Trained()``), or a function
            of the seed that returns a ``state_dict``.
        order: ``(seed, epoch, examples) -> positions`` of an epoch; fewer of them drop the rest.

    Raises:
        InputError: a setting is out of range or of another kind.

    Example:
        >>> training = Training(epochs=10, batch_size=64, optimiser=SGD(0.05, momentum=0.9))
        >>> training.steps(6_000)
        940
    """

    epochs: int
    batch_size: int
    optimiser: Optimiser
    schedule: Schedule = CONSTANT
    seed: int = 0
    start: Start = FRESH
    order: Order = shuffled

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is a whole number ≥ 1, got {value!r}.")
        if not isinstance(self.optimiser, Optimiser):
            raise InputError(
                f"The optimiser is SGD(...), Adam(...) or AdamW(...) of upweight, got "
                f"{self.optimiser!r}. For another, pass a function (positions, seed) -> model."
            )
        if not (isinstance(self.start, (Fresh, Trained)) or callable(self.start)):
            raise InputError(f"start is Fresh(), Trained() or a function, got {self.start!r}.")

    def epoch(self, seed: int, epoch: int, count: int) -> Tensor:
        """Positions of an epoch in order.

        Raises:
            InputError: the order names an example that is not there, or one twice.
        """
        found = self.order(seed, epoch, count).to("cpu", torch.int64)
        inside = found.dim() == 1 and len(found) and 0 <= int(found.min()) <= int(found.max())
        if not inside or int(found.max()) >= count or len(found.unique()) < len(found):
            raise InputError(
                f"order({seed}, {epoch}, {count}) must return different positions from 0 to "
                f"{count - 1}, got {tuple(found.shape)} from {found.min()} to {found.max()}."
            )
        return found

    def steps(self, examples: int) -> int:
        """Updates of the parameters on data of so many examples."""
        return self.epochs * -(-len(self.epoch(self.seed, 0, examples)) // self.batch_size)

    def finite(self, examples: int) -> FiniteTraining:
        """The damping that this training implies, for ``damping=``.

        Raises:
            InputError: the steps are not those of gradient descent.

        Example:
            >>> Training(10, 64, SGD(0.05, momentum=0.9)).finite(6_000).damping
            0.0021276595744680847
        """
        if not isinstance(self.optimiser, SGD):
            raise InputError(
                f"{type(self.optimiser).__name__}'s steps are no gradient descent, so that no "
                "damping follows from them. Choose one with sweep()."
            )
        steps = self.steps(examples)
        mean = sum(self.schedule(step, steps) for step in range(steps)) / steps
        return FiniteTraining(self.optimiser.lr * mean, steps, self.optimiser.momentum)

    def words(self) -> str:
        """In one line, for results."""
        start = "weights from each seed" if isinstance(self.start, Fresh) else "own start"
        start = "from the trained weights" if isinstance(self.start, Trained) else start
        schedule = "" if isinstance(self.schedule, Constant) else f", {self.schedule!r}"
        return (
            f"{self.optimiser!r}{schedule}, {self.epochs} epochs in minibatches of "
            f"{self.batch_size}, {start}"
        )
