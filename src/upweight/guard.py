"""What an answer rests on: the model it was asked of, unchanged and in the same mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from torch import nn

from upweight.errors import InputError, ModelError
from upweight.fingerprints import fingerprint
from upweight.objective import Objective
from upweight.precision import Precision, full_precision
from upweight.refusals import refuse_train_mode

__all__ = ["Guard"]


@final
class Guard:
    """Remembers the model of an objective, and refuses to mix what was computed with a later one.

    Args:
        objective: what will be asked.

    Attributes:
        fingerprint: hash of the model's layers, all parameters and buffers, and its autocast.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> guard = Guard(Objective(layer, "mean_squared_error"))
        >>> with guard.answering():
        ...     pass
        >>> _ = nn.init.zeros_(layer.weight)
        >>> guard.check()
        Traceback (most recent call last):
        ...
        upweight.errors.ModelError: The model's parameters changed after this Influence was made...
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.fingerprint = self._state()

    def _state(self) -> str:
        model: nn.Module = self._objective.model
        stated = [repr(model), model.state_dict()]
        precision = self._objective.precision
        return fingerprint(stated if precision is None else [*stated, precision])

    def check(self) -> None:
        """Raise if the model, its mode or its autocast is another by now.

        Raises:
            ModelError: parameters changed, or random layers are in train mode.
            InputError: autocast is on, and it is not that of the objective.
        """
        refuse_train_mode(self._objective.model)
        known = self._objective.autocast
        ambient = Precision.ambient(self._objective.space.device)
        if ambient is not None and ambient != known:
            made = "without" if known is None else f"under {known},"
            raise InputError(
                f"This question is asked under {ambient}, of a model that was explained {made} "
                "when the Influence was made. Make the Influence inside the autocast block, or "
                "leave the block for this call."
            )
        if self._state() != self.fingerprint:
            raise ModelError(
                "The model's parameters changed after this Influence was made. Make a new one."
            )

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Check, and compute inside with autocast off: the model alone runs under its own.

        Raises:
            ModelError, InputError: as ``check``.
        """
        self.check()
        with full_precision(self._objective.space.device):
            yield
