"""From a model to scores in one call."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from upweight.front import Influence
from upweight.objective import Objective
from upweight.scores import Scores

__all__ = ["influence"]


def influence(
    model: nn.Module | Objective,
    train: Any,
    queries: Any,
    *,
    loss: object = None,
    l2: float | Mapping[str, float] = 0.0,
    method: object = "exact",
) -> Scores:
    """Scores in one call: ``Influence(model, train, ...).explain(queries)``.

    Args:
        model: a trained module or an Objective.
        train: its training data.
        queries: what to explain.
        loss: as in Influence.
        l2: as in Influence.
        method: as in Influence.

    Example:
        >>> import torch
        >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
        >>> influence(nn.Linear(3, 2), (x, y), (x[:2], y[:2]), loss="cross_entropy", l2=0.1).shape
        (2, 20)
    """
    return Influence(model, train, loss=loss, l2=l2, method=method).explain(queries)
