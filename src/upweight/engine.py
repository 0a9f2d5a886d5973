"""The score engine: preconditioned queries meet each training batch once; blocks go to a sink."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

import numpy as np
import torch
from torch import Tensor

from upweight.bars import track
from upweight.data import Batch, Data
from upweight.errors import NonFiniteError, NotConvergedError
from upweight.gradients import dense_gradients, layout_of, linear_form, per_example
from upweight.linalg import BlockRows, DenseGradients, Gradients, Inverse
from upweight.meaning import removal_gradient_row, removal_score
from upweight.objective import Measure, Objective, require_finite
from upweight.risk import DEFAULT_BATCH, Risk

__all__ = [
    "MatrixSink",
    "Rescale",
    "Sink",
    "locate_nonfinite",
    "located",
    "query_batches",
    "query_products",
    "query_rows",
    "score",
    "self_influence",
]

Rescale = Callable[[Objective, Batch], Tensor]
LARGE_BATCH = 4096
ROW_BYTES = 256 * 2**20
# Small batches stay in the cache; below FEW rows the products with queries are slow instead.
BATCH_BYTES, MOST_BYTES, FEW = 64 * 2**20, 256 * 2**20, 64


class Sink(ABC):
    """Where blocks of scores go."""

    @abstractmethod
    def write(self, start: int, block: Tensor) -> None:
        """Take the scores ``[q, b]`` of training rows start to start + b."""


def _widened(values: Tensor) -> np.ndarray:
    """Values as an array; half precision, of which NumPy lacks bfloat16, in single."""
    known = values.dtype in (torch.float32, torch.float64)
    array: np.ndarray = (values if known else values.float()).cpu().numpy()
    return array


@final
class MatrixSink(Sink):
    """Keeps all scores in memory.

    Args:
        queries: q.
        examples: N.
        dtype: of the scores.
    """

    def __init__(self, queries: int, examples: int, dtype: torch.dtype) -> None:
        self.matrix = np.empty((queries, examples), _widened(torch.empty(0, dtype=dtype)).dtype)

    def write(self, start: int, block: Tensor) -> None:
        """Copy the block into its columns."""
        self.matrix[:, start : start + block.shape[1]] = _widened(block)


def query_batches(objective: Objective, queries: Data, measure: Measure) -> Iterator[Batch]:
    """Placed batches of queries, checked.

    Raises:
        LossError, NonFiniteError: the measure is not per example, or not finite.
    """
    objective.probe(queries, measure, role="queries")
    for batch in queries.batches(queries.batch_size or DEFAULT_BATCH):
        placed = objective.place(batch)
        if measure == "loss":
            objective.loss.check(
                objective.outputs(objective.space.values(), placed), placed.targets
            )
        yield placed


def query_gradients(objective: Objective, queries: Data, measure: Measure) -> Gradients:
    """Gradients of the measure of every query, checked.

    Raises:
        LossError, NonFiniteError: the measure is not per example, or not finite.
    """
    parts = []
    for batch in query_batches(objective, queries, measure):
        found = per_example(objective, batch, measure)
        if not found.finite():
            dense_gradients(objective, batch, measure)  # names the row and the parameter
        parts.append(found)
    if len(parts) == 1:
        return parts[0]
    return DenseGradients(torch.cat([part.dense() for part in parts]))


def query_rows(objective: Objective, queries: Data, measure: Measure) -> Tensor:
    """Gradients ``[q, p]`` of the measure of every query, checked.

    Raises:
        LossError, NonFiniteError: the measure is not per example, or not finite.
    """
    batches = query_batches(objective, queries, measure)
    return torch.cat([dense_gradients(objective, batch, measure) for batch in batches])


def query_products(objective: Objective, queries: Data, measure: Measure, rows: Tensor) -> Tensor:
    """∇m(q) · rows, ``[q, m]``: how the measures move along directions ``[m, p]``.

    Raises:
        LossError, NonFiniteError: the measure is not per example, or not finite.
    """
    parts = []
    for batch in query_batches(objective, queries, measure):
        products = per_example(objective, batch, measure).dot(rows).T
        require_finite(products, "The gradient product", batch)
        parts.append(products)
    return torch.cat(parts)


def locate_nonfinite(risk: Risk) -> None:
    """Find the first loss or gradient that is NaN or infinite, batch by batch.

    Raises:
        NonFiniteError: naming the batch, the row and the parameter. Returns if all is finite.
    """
    objective = risk.objective
    size = max(1, min(DEFAULT_BATCH, ROW_BYTES // (8 * objective.space.size)))
    for batch, _ in track(risk.batches(size), "looking for NaN"):
        with torch.no_grad():
            require_finite(objective.losses(objective.space.values(), batch), "The loss", batch)
        dense_gradients(objective, batch)


@contextmanager
def located(risk: Risk) -> Iterator[None]:
    """When the numbers fail inside, look for the batch and parameter that made them fail."""
    try:
        yield
    except (NonFiniteError, NotConvergedError):
        locate_nonfinite(risk)
        raise


def batch_rows(risk: Risk) -> int:
    """Training examples looked at together: what the user's loader says, or as memory allows."""
    if risk.data.batch_size is not None:
        return risk.data.batch_size
    batch, _ = risk.at(torch.arange(min(16, len(risk.data)), device="cpu"))
    if linear_form(risk.objective, batch) is not None:
        return LARGE_BATCH
    row = max(layout_of(risk.objective, batch).row_bytes, 1)
    return max(1, min(LARGE_BATCH, max(BATCH_BYTES // row, min(FEW, MOST_BYTES // row))))


def score(risk: Risk, rows: Tensor | BlockRows, sink: Sink, rescale: Rescale | None = None) -> None:
    """One pass over the training data: score[q, i] = share_i · s_q·∇ℓ̃(z_i).

    Args:
        risk: objective and training data.
        rows: preconditioned queries s_q = ∇m(q) H⁻¹, ``[q, p]`` or block by block.
        sink: takes the blocks.
        rescale: a factor ``[b]`` on each example's gradient, for the ablations; the L2 part is
            left out then.

    Raises:
        NonFiniteError: naming the batch.
    """
    objective = risk.objective
    row = removal_gradient_row(objective)
    extra = (rows.times(row) if isinstance(rows, BlockRows) else rows @ row)[:, None]
    size = batch_rows(risk)
    start, count = 0, -(-len(risk.data) // size)
    for batch, share in track(risk.batches(size), "scores", count):
        gradients = per_example(objective, batch)
        products = rows.dot(gradients) if isinstance(rows, BlockRows) else gradients.dot(rows)
        products = products + extra if rescale is None else products * rescale(objective, batch)
        require_finite(products.T, "The gradient product", batch)
        sink.write(start, removal_score(products, share))
        start += len(batch)


def self_influence(risk: Risk, inverse: Inverse) -> np.ndarray:
    """score[i, i] for every training example, ``[N]``, without the N x N matrix.

    share_i · ∇ℓ_i H⁻¹ ∇ℓ̃_i: the predicted rise of an example's own loss when it is removed.

    Raises:
        NotConvergedError, IndefiniteError: a solve failed.
    """
    objective = risk.objective
    extra = removal_gradient_row(objective)[None]
    turned = inverse.apply(extra)[0] if bool(extra.any()) else None
    size = max(1, min(DEFAULT_BATCH, ROW_BYTES // (8 * objective.space.size)))
    parts = []
    count = -(-len(risk.data) // size)
    for batch, share in track(risk.batches(size), "self-influence", count):
        gradients = per_example(objective, batch)
        own = inverse.self_products(gradients)
        if turned is not None:
            own = own + gradients.dot(turned[None])[0]
        parts.append(removal_score(own, share))
    values = torch.cat(parts)
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("A self-influence is not finite. Check the damping and the losses.")
    return _widened(values)
