"""The score engine: preconditioned queries meet each training batch once; blocks go to a sink."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from upweight.bars import track
from upweight.budget import budget
from upweight.checks import probe, require_finite
from upweight.data import Batch, Data
from upweight.errors import NonFiniteError, NotConvergedError
from upweight.gradients import (
    Seen,
    TrainingGradients,
    dense_gradients,
    layout_of,
    linear_form,
    per_example,
)
from upweight.linalg import Gradients, Inverse, Pieces, RowValues
from upweight.meaning import removal_gradient_row, removal_score
from upweight.objective import Measure, Objective
from upweight.risk import DEFAULT_BATCH, Risk, checked_targets
from upweight.sinks import Sink, widened

__all__ = [
    "Job",
    "Rescale",
    "Rescaling",
    "Scales",
    "locate_nonfinite",
    "located",
    "query_batches",
    "query_products",
    "query_rows",
    "score",
    "self_influence",
]

Rows = Tensor | RowValues
QUERY_BYTES = 32 * 2**20


@final
class Scales(NamedTuple):
    """Factors ``[b]`` on what is removed with an example.

    Attributes:
        loss: on the gradient of its loss.
        l2: on its L2 part, where it has one.
    """

    loss: Tensor
    l2: Tensor


Rescale = Callable[[Seen], Scales]
Rescaling = Callable[[Inverse, Risk], Rescale]


@final
@dataclass(frozen=True)
class Job:
    """What one pass over the training data scores.

    Attributes:
        rows: preconditioned queries s_q = ∇m(q) H⁻¹, ``[q, p]`` or in parts.
        sink: takes the blocks.
        rescale: factors on each example's gradient.
    """

    rows: Rows
    sink: Sink
    rescale: Rescale | None = None


def query_batches(objective: Objective, queries: Data, measure: Measure) -> Iterator[Batch]:
    """Placed batches of queries, checked.

    Raises:
        LossError, NonFiniteError: the measure is not per example, or not finite.
    """
    probe(objective, queries, measure, role="queries")
    batches = queries.batches(queries.batch_size or DEFAULT_BATCH)
    if not callable(measure):
        batches = (batch for batch, _ in checked_targets(objective, queries, DEFAULT_BATCH))
    for batch in batches:
        yield objective.place(batch)


def query_gradients(objective: Objective, queries: Data, measure: Measure) -> Gradients:
    """Gradients of the measure of every query, made and checked when they are asked for.

    Raises:
        LossError, NonFiniteError: then: the measure is not per example, or not finite.
    """

    def made() -> Iterator[Gradients]:
        for batch in query_batches(objective, queries, measure):
            for piece in _pieces(objective, batch):
                found = per_example(objective, piece, measure)
                if not found.finite():
                    dense_gradients(objective, piece, measure)  # names the row and the parameter
                yield found

    return Pieces(made, len(queries))


def _pieces(objective: Objective, batch: Batch) -> Iterator[Batch]:
    """A batch of queries in parts whose factors and graph stay small."""
    if linear_form(objective, batch) is not None:
        return iter((batch,))
    size = max(1, QUERY_BYTES // max(layout_of(objective, batch).row_bytes, 1))
    return (batch.part(slice(start, start + size)) for start in range(0, len(batch), size))


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
    size = max(1, min(DEFAULT_BATCH, budget() // 4 // (8 * objective.space.size)))
    for batch, _ in track(risk.batches(size), "looking for NaN"):
        with torch.no_grad():
            require_finite(objective.losses(objective.space.values(), batch), "The loss", batch)
        dense_gradients(objective, batch)


@contextmanager
def located(risk: Risk) -> Iterator[None]:
    """When the numbers fail inside, look for the batch and parameter that made them fail."""
    try:
        yield
    except (NonFiniteError, NotConvergedError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        locate_nonfinite(risk)
        raise


def score(training: TrainingGradients, jobs: Sequence[Job], *, first: int = 0) -> None:
    """One pass over the training data: score[q, i] = share_i · s_q·∇ℓ̃(z_i).

    Args:
        training: gradients of the training data.
        jobs: what is scored on that pass, and where it goes.
        first: place of the first example, where an earlier pass was cut short.

    Raises:
        NonFiniteError: naming the batch.
    """
    row = removal_gradient_row(training.risk.objective)
    extras = [_times(job.rows, row)[:, None] for job in jobs]

    def work(seen: Seen) -> list[Tensor]:
        found = []
        for job, extra in zip(jobs, extras, strict=True):
            products = _products(job.rows, seen.gradients)
            if job.rescale is None:
                products = products + extra
            else:
                scales = job.rescale(seen)
                products = products * scales.loss + extra * scales.l2
            if not bool(torch.isfinite(products.sum())):
                require_finite(products.T, "The gradient product", seen.batch())
            found.append(removal_score(products, seen.share))
        return found

    start = first
    for blocks in training.each(work, "scores", first=first):
        for job, block in zip(jobs, blocks, strict=True):
            job.sink.write(start, block)
        start += blocks[0].shape[1]


def _times(rows: Rows, row: Tensor) -> Tensor:
    return rows @ row if isinstance(rows, Tensor) else rows.times(row)


def _products(rows: Rows, gradients: Gradients) -> Tensor:
    return gradients.dot(rows) if isinstance(rows, Tensor) else rows.dot(gradients)


def self_influence(training: TrainingGradients, inverse: Inverse) -> np.ndarray:
    """score[i, i] for every training example, ``[N]``, without the N x N matrix.

    share_i · ∇ℓ_i H⁻¹ ∇ℓ̃_i: the predicted rise of an example's own loss when it is removed.

    Raises:
        NotConvergedError, IndefiniteError: a solve failed.
    """
    objective = training.risk.objective
    extra = removal_gradient_row(objective)[None]
    turned = inverse.apply(extra)[0] if bool(extra.any()) else None

    def work(seen: Seen) -> Tensor:
        own = inverse.self_products(seen.gradients)
        if turned is not None:
            own = own + seen.gradients.dot(turned[None])[0]
        return removal_score(own, seen.share)

    values = torch.cat(list(training.each(work, "self-influence")))
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("A self-influence is not finite. Check the damping and the losses.")
    return widened(values)
