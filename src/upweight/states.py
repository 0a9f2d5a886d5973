"""Other states of a model, of other checkpoints and seeds: read, and given to a copy."""

import copy
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from upweight.errors import InputError, ModelError

__all__ = ["State", "in_state", "read_state"]

State = Mapping[str, Tensor] | str | PathLike[str]
SHOWN = 6


def read_state(state: State) -> Mapping[str, Tensor]:
    """A state dict as it is, or from a file of safetensors or of ``torch.save``, on the CPU.

    Nothing is unpickled but tensors (``weights_only=True``).

    Raises:
        InputError: the file cannot be read, or holds something else than named tensors.

    Example:
        >>> list(read_state(nn.Linear(2, 1).state_dict()))
        ['weight', 'bias']
    """
    if isinstance(state, Mapping):
        return _named_tensors(state, "The state")
    if not isinstance(state, (str, PathLike)):
        raise InputError(
            f"A state is a state dict or a path of one, got {type(state).__name__}. Pass "
            "model.state_dict()."
        )
    path = Path(fspath(state))
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path, device="cpu")
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, and nothing else is unpickled. Save the state dict "
            "alone: torch.save(model.state_dict(), path), or safetensors."
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as a state dict: {error}. Pass a file of safetensors, or of "
            "torch.save(model.state_dict(), path)."
        ) from error
    return _named_tensors(found, str(path))


def _named_tensors(found: Any, what: str) -> Mapping[str, Tensor]:
    """What was found, if it is a state dict."""
    if not isinstance(found, Mapping):
        raise InputError(
            f"{what} is a {type(found).__name__} and no state dict. Pass model.state_dict(), or a "
            "file of it."
        )
    others = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if others or not found:
        listed = ", ".join(map(str, list(found)[:SHOWN])) or "nothing"
        raise InputError(
            f"{what} is no state dict: it holds {listed}. Pass the part that is one, such as "
            "torch.load(path, weights_only=True)['state_dict']."
        )
    return found


def in_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with the values of a state, in the model's dtype; the model is left alone.

    Raises:
        ModelError: the state is of another architecture.

    Example:
        >>> model, other = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> torch.equal(in_state(model, other.state_dict()).weight, other.weight)
        True
    """
    twin = copy.deepcopy(model)
    try:
        twin.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ModelError(
            f"The state does not fit the model. {' '.join(str(error).split())} Pass states of the "
            "same architecture, with all parameters and buffers."
        ) from error
    return twin
