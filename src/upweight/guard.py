"""What an answer rests on: the model it was asked of, unchanged and in the same mode."""

from typing import final

import torch
from torch import nn

from upweight.errors import InputError, ModelError
from upweight.fingerprints import fingerprint
from upweight.objective import refuse_train_mode

__all__ = ["Guard"]


@final
class Guard:
    """Remembers a module, and refuses to mix what was computed with a later one.

    Args:
        model: any module.

    Attributes:
        fingerprint: hash of its layers, all parameters and buffers.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> guard = Guard(layer)
        >>> guard.check()
        >>> _ = nn.init.zeros_(layer.weight)
        >>> guard.check()
        Traceback (most recent call last):
        ...
        upweight.errors.ModelError: The model's parameters changed after this Influence was made...
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.fingerprint = self._state()

    def _state(self) -> str:
        return fingerprint([repr(self._model), self._model.state_dict()])

    def check(self) -> None:
        """Raise if the model or the mode is another by now.

        Raises:
            ModelError: parameters changed, or random layers are in train mode.
            InputError: autocast is on.
        """
        refuse_train_mode(self._model)
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise InputError(
                "Autocast is on, and derivatives in mixed precision are not those of the model. "
                "Leave the autocast block for this call."
            )
        if self._state() != self.fingerprint:
            raise ModelError(
                "The model's parameters changed after this Influence was made. Make a new one."
            )
