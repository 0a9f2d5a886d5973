"""From what a user passes as a loss (name, torch criterion, function, callable) to a Loss."""

import copy
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from upweight.errors import LossError
from upweight.losses.base import CustomLoss, Loss
from upweight.losses.cross_entropy import CrossEntropy
from upweight.losses.elementwise import BinaryCrossEntropy, Hinge, MeanSquaredError, SmoothHinge

__all__ = ["NAMES", "resolve"]

NAMES: dict[str, Callable[[], Loss]] = {
    "cross_entropy": CrossEntropy,
    "binary_cross_entropy": BinaryCrossEntropy,
    "mean_squared_error": MeanSquaredError,
    "hinge": Hinge,
    "smooth_hinge": SmoothHinge,
}

_FUNCTIONS: dict[Any, Callable[[], Loss]] = {
    F.cross_entropy: CrossEntropy,
    F.binary_cross_entropy_with_logits: BinaryCrossEntropy,
    F.mse_loss: MeanSquaredError,
}

_ELEMENTWISE = (nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.SoftMarginLoss)


def _criterion(criterion: nn.Module) -> Loss:
    """A torch criterion's per-example loss; its reduction is the library's business."""
    if getattr(criterion, "reduction", "mean") == "sum":
        raise LossError(
            f"{type(criterion).__name__}(reduction='sum') trains on a sum, and the objective here "
            "is a mean. Divide l2 by the number of examples and pass reduction='mean'."
        )
    if isinstance(criterion, nn.CrossEntropyLoss):
        return CrossEntropy(
            weight=criterion.weight,
            label_smoothing=criterion.label_smoothing,
            ignore_index=criterion.ignore_index,
        )
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        if criterion.weight is not None:
            raise LossError(
                "BCEWithLogitsLoss(weight=...) rescales positions of one batch. Pass sample "
                "weights with Data.of(..., weights=...), or a callable returning [n]."
            )
        return BinaryCrossEntropy(pos_weight=criterion.pos_weight)
    if isinstance(criterion, nn.MSELoss):
        return MeanSquaredError()
    if isinstance(criterion, _ELEMENTWISE):
        each = copy.copy(criterion)
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
    if callable(loss):
        return _FUNCTIONS[loss]() if loss in _FUNCTIONS else CustomLoss(loss)
    raise LossError(
        f"A loss is a name ({', '.join(NAMES)}), a torch criterion, or a callable of (outputs, "
        f"targets) returning [n]; got {type(loss).__name__}."
    )
