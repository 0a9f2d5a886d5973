"""Per-example gradients of any module through torch.func, formed only when that is cheaper."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError

from upweight.data import Batch
from upweight.errors import ModelError
from upweight.linalg.values import Gradients
from upweight.objective import Measure, Objective

__all__ = [
    "ROW_CHUNK",
    "AutogradGradients",
    "map_rows",
    "math_attention",
    "open_attention",
    "pull_back",
    "push_forward",
]

DENSE_BYTES = 256 * 2**20
FEW_ROWS = 4
ROW_CHUNK = 32


@contextmanager
def open_attention() -> Iterator[None]:
    """No fused path of whole attention layers, which has no derivative, for this block only."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def math_attention() -> Iterator[None]:
    """Attention in plain operations, which have every derivative, for this block only.

    Raises:
        ModelError: another operation of the model lacks a derivative that is asked for.
    """
    try:
        with open_attention(), sdpa_kernel(SDPBackend.MATH):
            yield
    except NotImplementedError as error:
        raise ModelError(
            f"The model has an operation without the second derivative that this method takes: "
            f"torch says {str(error).rstrip('.')}. Write it in operations that have one "
            "(nn.Embedding and a mean for nn.EmbeddingBag), or use a method that takes first "
            "derivatives alone, as 'ekfac' or 'no_hessian'."
        ) from error


def map_rows(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """A function of one row on all rows ``[m, ...]``: vectorised, or one by one if it must be.

    Some operations have no vectorised rule and say so in many ways; the loop gives the same
    numbers, and raises whatever is really wrong.
    """
    if len(rows) == 1:
        return function(rows[0])[None]
    try:
        mapped: Tensor = vmap(function, chunk_size=ROW_CHUNK)(rows)
        return mapped
    except (RuntimeError, NotImplementedError, ModelError):
        return torch.stack([function(row) for row in rows])


def pull_back(function: Callable[..., Any], point: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The value at a point, and the map from a cotangent of it to one of the point."""
    value, pull = vjp(function, point)[:2]
    return value, lambda cotangent: pull(cotangent)[0]


def push_forward(function: Callable[[Tensor], Any], point: Tensor, direction: Tensor) -> Any:
    """The derivative of a function at a point along a direction, in the function's shape.

    Forward mode; where an operation has no forward rule, two reverse passes give the same number.
    """
    try:
        return jvp(function, (point,), (direction,))[1]
    except (RuntimeError, NotImplementedError):
        value, pull = pull_back(function, point)
        _, pull_twice = pull_back(pull, torch.ones_like(value))
        return pull_twice(direction)


@final
class AutogradGradients(Gradients):
    """Gradients of a measure of each example in the chosen parameters.

    ``dot`` uses one forward-mode pass per row for a few rows, and per-example gradients in pieces
    of bounded memory for many; ``combine`` is one reverse pass per row.

    Args:
        objective: the model and its parameters.
        batch: placed examples.
        measure: what to differentiate.
    """

    def __init__(self, objective: Objective, batch: Batch, measure: Measure = "loss") -> None:
        self.objective, self.batch, self.count = objective, batch, len(batch)
        self.measure, self.row = measure, objective.space.row()
        self._measured = objective.measured(measure)

    def _values(self, row: Tensor, batch: Batch) -> Tensor:
        return self._measured(self.objective.space.unflatten(row), batch)

    def dot(self, rows: Tensor) -> Tensor:
        """Rows ``[q, p]`` times Gᵀ, ``[q, n]``."""
        if len(rows) <= FEW_ROWS:
            with math_attention():
                return torch.stack(
                    [
                        push_forward(lambda row: self._values(row, self.batch), self.row, direction)
                        for direction in rows
                    ]
                )
        size = max(1, DENSE_BYTES // (rows.shape[1] * rows.element_size()))
        pieces = [slice(i, i + size) for i in range(0, self.count, size)]
        return torch.cat([rows @ self._dense(self.batch.part(piece)).T for piece in pieces], dim=1)

    def combine(self, weights: Tensor) -> Tensor:
        """Weights ``[m, n]`` times G, ``[m, p]``."""
        _, pull = pull_back(lambda row: self._values(row, self.batch), self.row)
        return map_rows(pull, weights)

    def dense(self) -> Tensor:
        """G, ``[n, p]``."""
        return self._dense(self.batch)

    def part(self, rows: slice) -> "AutogradGradients":
        """Some of the examples."""
        return AutogradGradients(self.objective, self.batch.part(rows), self.measure)

    def _dense(self, batch: Batch) -> Tensor:
        def single(row: Tensor, inputs: Any, targets: Any) -> Tensor:
            one = Batch(_unsqueeze(inputs), _unsqueeze(targets), batch.positions[:1])
            return self._values(row, one)[0]

        try:
            over = (None, 0, None if batch.targets is None else 0)
            mapped = vmap(grad(single), in_dims=over)
            with math_attention():
                matrix: Tensor = mapped(self.row, batch.inputs, batch.targets)
            return matrix.detach()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            ones = (batch.part(slice(i, i + 1)) for i in range(len(batch)))
            try:
                return torch.cat([self._plain(one) for one in ones])
            except CheckpointError:  # it runs again when the parameters are back in their place
                raise error from None

    def _plain(self, one: Batch) -> Tensor:
        """One gradient ``[1, p]`` without ``torch.func``, which some operations refuse."""
        row = self.row.clone().requires_grad_()
        with torch.enable_grad(), math_attention():
            return torch.stack(torch.autograd.grad(self._values(row, one)[0], row))


def _unsqueeze(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree[None]
    if isinstance(tree, dict):
        return {key: _unsqueeze(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_unsqueeze(value) for value in tree)
    return tree
