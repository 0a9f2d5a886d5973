"""What an answer rests on: the model it was asked of, unchanged and in the same mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from torch import Tensor, nn

from upweight.errors import InputError, ModelError
from upweight.fingerprints import fingerprint
from upweight.forms import form_of, settings_of, values_of
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
        fingerprint: hash of what the model computes: the code and settings of its modules, all
            parameters and buffers, those that no state_dict holds too, and its autocast.

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
        model, precision = objective.model, objective.precision
        self._values, self._settings = self._now()
        stated = [self._values, form_of(model)]
        self.fingerprint = fingerprint(stated if precision is None else [*stated, precision])

    def _now(self) -> tuple[str, dict[str, str]]:
        """Hash of parameters and stored buffers; other settings in words, tensors by their hash."""
        model: nn.Module = self._objective.model
        settings = settings_of(model)
        values = dict(values_of(model))
        said = {
            n: fingerprint(v) if isinstance(v, Tensor) else repr(v) for n, v in settings.items()
        }
        return fingerprint(values), said

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
        values, settings = self._now()
        if values != self._values:
            raise ModelError(
                "The model's parameters changed after this Influence was made. Make a new one."
            )
        self._refuse_other(settings)

    def _refuse_other(self, settings: dict[str, str]) -> None:
        """Refuse attributes that are others than they were, by name.

        What forward itself assigns is not among them, so that a model may count its calls or keep
        what it saw.
        """
        for name in sorted(self._settings.keys() | settings.keys()):
            before, now = self._settings.get(name, "absent"), settings.get(name, "absent")
            if before != now:
                raise ModelError(
                    f"The model's {name} was {before} when this Influence was made, and is {now} "
                    "now. Make a new Influence. If it only keeps what forward saw, let its name "
                    "begin with an underscore."
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
