"""Which form the gradients of a batch take."""

import torch

from upweight.data import Batch
from upweight.errors import NonFiniteError
from upweight.gradients.autograd import AutogradGradients
from upweight.gradients.capture import Observation, layout_of
from upweight.gradients.linear import linear_form, residual
from upweight.linalg.values import FactoredGradients, Gradients
from upweight.objective import Measure, Objective

__all__ = ["dense_gradients", "per_example"]


def per_example(objective: Objective, batch: Batch, measure: Measure = "loss") -> Gradients:
    """Gradients of a measure of each example, as outer products where they can be.

    Linear models have a closed form; any other model goes forward and back once under watch; one
    that no rule sees is differentiated by ``torch.func``.

    Args:
        objective: the model and its parameters.
        batch: placed examples.
        measure: what to differentiate; the loss without L2 by default.

    Example:
        >>> from torch import nn
        >>> objective = Objective(nn.Linear(3, 2), "cross_entropy")
        >>> batch = Batch((torch.zeros(4, 3),), torch.zeros(4).long(), torch.arange(4))
        >>> per_example(objective, batch).dense().shape
        torch.Size([4, 8])
    """
    form = linear_form(objective, batch)
    if form is None:
        layout = layout_of(objective, batch)
        if not layout.seen:
            return AutogradGradients(objective, batch, measure)
        return Observation(objective, layout, batch).gradients(measure)
    features, outputs = form.seen(batch)
    slope = residual(objective, outputs, batch.targets, measure)
    return FactoredGradients(slope, features, bias=form.bias)


def dense_gradients(objective: Objective, batch: Batch, measure: Measure = "loss") -> torch.Tensor:
    """Gradients ``[n, p]`` of a few examples, checked.

    Raises:
        NonFiniteError: naming the row and the parameter.
    """
    rows = per_example(objective, batch, measure).dense()
    finite = torch.isfinite(rows)
    if not bool(finite.all()):
        place, position = (~finite).nonzero()[0].tolist()
        raise NonFiniteError(
            f"The gradient of row {int(batch.positions[place])} (batch of rows "
            f"{int(batch.positions[0])} to {int(batch.positions[-1])}) is "
            f"{rows[place, position].item()} in parameter {objective.space.locate(position)!r}. "
            "Look for overflow, sqrt(0) or log(0) there."
        )
    return rows
