"""From what a user passes as a loss (name, torch criterion, function, callable) to a Loss."""

import copy
import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from upweight.errors import LossError
from upweight.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    CustomLoss,
    Hinge,
    Loss,
    MeanSquaredError,
    SmoothHinge,
)

__all__ = ["NAMES", "resolve"]

NAMES: dict[str, Callable[[], Loss]] = {
    "cross_entropy": CrossEntropy,
    "binary_cross_entropy": BinaryCrossEntropy,
    "mean_squared_error": MeanSquaredError,
    "hinge": Hinge,
    "smooth_hinge": SmoothHinge,
}

# Of log-probabilities the softmax is themselves: their negative is the cross-entropy of logits, and
# linear in the outputs only as long as nobody asks that they stay log-probabilities.
_LIKELIHOOD = functools.partial(CrossEntropy, normalised=True)
_FUNCTIONS: dict[Any, Callable[..., Loss]] = {
    F.cross_entropy: CrossEntropy,
    F.nll_loss: _LIKELIHOOD,
    F.binary_cross_entropy_with_logits: BinaryCrossEntropy,
    F.mse_loss: MeanSquaredError,
}

_ELEMENTWISE = (nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.SoftMarginLoss)


def _refuse_sum(name: str, reduction: str) -> None:
    if reduction == "sum":
        raise LossError(
            f"{name}(reduction='sum') trains on a sum, and the objective here is a mean. Divide l2 "
            "by the number of examples and pass reduction='mean'."
        )


def _criterion(criterion: nn.Module) -> Loss:
    """A torch criterion's per-example loss; its reduction is the library's business."""
    _refuse_sum(type(criterion).__name__, getattr(criterion, "reduction", "mean"))
    if type(criterion) is nn.CrossEntropyLoss:
        return CrossEntropy(
            weight=criterion.weight,
            label_smoothing=criterion.label_smoothing,
            ignore_index=criterion.ignore_index,
        )
    if type(criterion) is nn.NLLLoss:
        return _LIKELIHOOD(weight=criterion.weight, ignore_index=criterion.ignore_index)
    if type(criterion) is nn.BCEWithLogitsLoss:
        if criterion.weight is not None:
            raise LossError(
                "BCEWithLogitsLoss(weight=...) rescales positions of one batch. Pass sample "
                "weights with Data.of(..., weights=...), or a callable returning [n]."
            )
        return BinaryCrossEntropy(pos_weight=criterion.pos_weight)
    if type(criterion) is nn.MSELoss:
        return MeanSquaredError()
    if type(criterion) in _ELEMENTWISE:
        each: Any = copy.copy(criterion)
        each.reduction = "none"

        def elementwise(outputs: Tensor, targets: Tensor) -> Tensor:
            if outputs.shape != targets.shape:
                raise LossError(
                    f"{type(each).__name__} got outputs {tuple(outputs.shape)} and targets "
                    f"{tuple(targets.shape)}. Give them one shape, so that nothing broadcasts."
                )
            losses: Tensor = each(outputs, targets)
            return losses.flatten(1).mean(1) if losses.dim() > 1 else losses

        elementwise.__name__ = type(criterion).__name__
        return CustomLoss(elementwise)
    return CustomLoss(criterion)


def _partial(loss: functools.partial[Any]) -> Loss:
    """functools.partial(F.cross_entropy, ...): its settings belong to the objective too."""
    settings = dict(loss.keywords)
    _refuse_sum(loss.func.__name__, settings.pop("reduction", "mean"))
    try:
        return _FUNCTIONS[loss.func](*loss.args, **settings)
    except TypeError as error:
        raise LossError(
            f"The settings {sorted(settings)} of {loss.func.__name__} cannot enter the objective "
            f"({error}). Pass a torch criterion, or a callable returning [n]."
        ) from error


def resolve(loss: object) -> Loss:
    """A Loss from a Loss, a name, a torch criterion, a torch function or a callable.

    Raises:
        LossError: the name is unknown, or the criterion cannot be taken apart per example.

    Example:
        >>> resolve(nn.CrossEntropyLoss(label_smoothing=0.1)).name
        'cross_entropy'
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in NAMES:
            raise LossError(f"The loss {loss!r} is unknown. Known names: {', '.join(NAMES)}.")
        return NAMES[loss]()
    if isinstance(loss, nn.Module):
        return _criterion(loss)
    if isinstance(loss, functools.partial) and loss.func in _FUNCTIONS:
        return _partial(loss)
    if callable(loss):
        known = _FUNCTIONS.get(loss) if isinstance(loss, Hashable) else None
        return CustomLoss(loss) if known is None else known()
    raise LossError(
        f"A loss is a name ({', '.join(NAMES)}), a torch criterion, or a callable of (outputs, "
        f"targets) returning [n]; got {type(loss).__name__}."
    )
