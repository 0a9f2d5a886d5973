"""Where a training begins: fresh weights from a seed, the weights at hand, or a user's own."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from upweight.errors import InputError, ModelError

__all__ = ["Fresh", "Start", "Trained", "begun"]


@final
@dataclass(frozen=True)
class Fresh:
    """New weights from a seed: ``reset_parameters()`` of every module, inner ones first.

    That is the order in which constructors draw, so that a model built under
    ``torch.manual_seed(seed)`` has the same weights, where its constructor draws nothing else. A
    model that draws them anew itself, in a constructor, needs a function of the seed instead:
    ``start=lambda seed: build(seed).state_dict()``.

    Example:
        >>> Fresh()
        Fresh()
    """


@final
@dataclass(frozen=True)
class Trained:
    """The weights at hand, from which training goes on.

    Example:
        >>> Trained()
        Trained()
    """


OWN = ("init_weights", "_init_weights")

COPIED = (nn.TransformerEncoder, nn.TransformerDecoder)

Start = Fresh | Trained | Callable[[int], Mapping[str, Tensor]]


def _reset(module: nn.Module) -> None:
    """Draw a module's own weights anew."""
    reset: Any = getattr(module, "reset_parameters", None)
    if reset is None:  # attention and whole transformers of torch hide it
        reset = getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()


OWN_STATE = (
    "Pass start=function, a function of the seed that returns a state_dict of the untrained model, "
    "or start=Trained()."
)


def _refuse_twice(model: nn.Module) -> None:
    """Refuse weights that resets would draw in another way than the constructor did."""
    visited: list[nn.Module] = []
    model.apply(visited.append)
    drawn: set[int] = set()
    for module in visited:
        if isinstance(module, COPIED) and len(module.layers) > 1:
            raise ModelError(
                f"{type(module).__name__} begins with copies of one layer, and resets would draw "
                f"every layer anew, so fresh weights are not those of its constructor. {OWN_STATE}"
            )
        own = [p for p in module._parameters.values() if p is not None and p.requires_grad]
        for value in own:
            if id(value) in drawn:
                every = model.named_parameters(remove_duplicate=False)
                names = " and ".join(name for name, p in every if p is value)
                raise ModelError(
                    f"{names} are one parameter, which two resets would draw after each other, so "
                    f"fresh weights are not the constructor's. {OWN_STATE}"
                )
        drawn |= set(map(id, own))


def _drawn(model: nn.Module) -> None:
    """Reset all modules; what no reset has touched is refused, what is frozen stays."""
    own = next((m for m in model.modules() if any(hasattr(m, name) for name in OWN)), None)
    if own is not None:
        raise ModelError(
            f"{type(own).__name__} draws its weights in its own way (init_weights), and not as "
            f"torch's layers do. {OWN_STATE}"
        )
    _refuse_twice(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    model.apply(_reset)
    missed = []
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad:
                p.copy_(frozen[name])
            elif bool(p.isnan().any()):
                missed.append(name)
    if missed:
        raise ModelError(
            f"No reset_parameters() draws {', '.join(missed)} anew, so fresh weights are not "
            f"known. {OWN_STATE}"
        )


def begun(model: nn.Module, start: Start, seed: int) -> nn.Module:
    """A copy of the model in train mode where a training with this seed begins.

    The global random state is drawn from under ``fork_rng``: it is the same afterwards.

    Args:
        model: as it is at hand.
        start: where to begin.
        seed: of the weights.

    Raises:
        ModelError: weights that nothing draws anew, or that resets draw in another way than the
            constructor.
        InputError: a function returned no state of this model.

    Example:
        >>> a, b = (begun(nn.Linear(2, 1), Fresh(), seed=3).weight for _ in range(2))
        >>> torch.equal(a, b)
        True
    """
    twin = copy.deepcopy(model).train()
    if isinstance(start, Trained):
        return twin
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(start, Fresh):
            _drawn(twin)
            return twin
        state = start(seed)
    try:
        twin.load_state_dict(dict(state))
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"start({seed}) must return a state_dict of the model: {error}") from error
    return twin
