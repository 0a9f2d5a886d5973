"""The mixed derivative ∇_x ∇_θ ℓ: how a training input moves a product with a parameter row."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.func import grad

from upweight.data import Batch
from upweight.errors import InputError
from upweight.gradients.autograd import map_rows, math_attention, push_forward
from upweight.objective import Objective

__all__ = ["mixed_derivative"]


def _floating(batch: Batch) -> Any:
    """Where the first floating input stands: a position or a keyword."""
    items = batch.inputs.items() if isinstance(batch.inputs, dict) else enumerate(batch.inputs)
    for key, value in items:
        if isinstance(value, Tensor) and value.is_floating_point():
            return key
    raise InputError(
        "The inputs are integers (token ids?), which have no derivative. Use "
        "whatif(replace=...) for edits, or a model that takes embeddings."
    )


def _with_input(batch: Batch, key: Any, value: Tensor) -> Batch:
    if isinstance(batch.inputs, dict):
        return replace(batch, inputs={**batch.inputs, key: value})
    return replace(batch, inputs=(*batch.inputs[:key], value, *batch.inputs[key + 1 :]))


def mixed_derivative(
    objective: Objective, batch: Batch, rows: Tensor, *, at: Tensor | None = None
) -> Tensor:
    """∇_{x_i} (s_q · ∇_θ ℓ(x_i, y_i)) for all rows and all examples of a batch.

    Args:
        objective: the model and its loss.
        batch: n placed examples; the derivative is in their first floating input.
        rows: s, ``[q, p]``.
        at: θ, ``[p]``; the model's own parameters by default.

    Returns:
        ``[q, n, *shape of x]``.

    Raises:
        InputError: no input is floating.
    """
    key = _floating(batch)
    x, row = batch.inputs[key], objective.space.row() if at is None else at

    def product(value: Tensor, direction: Tensor) -> Tensor:
        changed = _with_input(batch, key, value)

        def losses(at: Tensor) -> Tensor:
            return objective.losses(objective.space.unflatten(at), changed)

        total: Tensor = push_forward(losses, row, direction)
        return total.sum()

    with math_attention():
        return map_rows(lambda direction: grad(product)(x, direction), rows).detach()
