"""Really changing the training data: refits of many changed objectives at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.data import Batch, Data
from upweight.errors import NotConvergedError
from upweight.evaluation.descent import descend
from upweight.gradients import stacked_gradient, stacked_measure
from upweight.linalg import Inverse
from upweight.objective import Measure
from upweight.risk import Risk

__all__ = ["Edit", "Refits", "refit"]

BATCH_ROWS = 8192
MODELS_AT_ONCE = 128
MOST_FAILURES = 0.2


@final
@dataclass(frozen=True)
class Edit:
    """A change of the training data.

    Attributes:
        gone: positions left out, ``[k]``.
        inputs: of the examples put in, each with leading axis k; None for none.
        targets: theirs. They take over the weights of those left out, one for one.
    """

    gone: Tensor
    inputs: tuple[Any, ...] | dict[str, Any] | None = None
    targets: Any = None


@final
@dataclass(frozen=True)
class Refits:
    """Minimisers of changed objectives.

    Attributes:
        rows: parameters ``[m, p]``, float64.
        slope: ‖∇R‖ of each changed objective at its row, ``[m]``.
        met: whether each reached its minimum, ``[m]``.
        steps: iterations of the slowest.
    """

    rows: Tensor
    slope: Tensor
    met: Tensor
    steps: int

    def measure(self, risk: Risk, queries: Data, measure: Measure) -> Tensor:
        """The measure of every query under every refit, ``[m, q]``."""
        batch = risk.objective.place(queries.rows())
        return stacked_measure(risk.objective, batch, self.rows, measure)


def _weights(risk: Risk, edits: Sequence[Edit], start: int, stop: int) -> Tensor:
    """Share of rows start..stop in each changed objective, ``[m, b]``.

    "mean": what stays is averaged anew. "sum": what stays keeps its share, so that L2 does too.
    Where examples take the place of others the total does not change.
    """
    shares = risk.share(torch.arange(start, stop, device="cpu")).repeat(len(edits), 1)
    for model, edit in enumerate(edits):
        inside = edit.gone[(edit.gone >= start) & (edit.gone < stop)] - start
        shares[model, inside] = 0
        if risk.objective.removal == "mean" and edit.inputs is None:
            shares[model] /= 1 - float(risk.weights[edit.gone].sum()) / risk.total
    return shares


def _slopes(risk: Risk, edits: Sequence[Edit], rows: Tensor) -> Tensor:
    """∇R of each changed objective at its own row, ``[m, p]``: one pass over the data."""
    total = rows * risk.objective.l2
    for batch, _ in risk.batches(BATCH_ROWS):
        start, stop = int(batch.positions[0]), int(batch.positions[-1]) + 1
        weights = _weights(risk, edits, start, stop)
        total = total + stacked_gradient(risk.objective, batch, rows, weights)
    for model, edit in enumerate(edits):
        if edit.inputs is not None:
            put = risk.objective.place(Batch(edit.inputs, edit.targets, edit.gone))
            share = risk.share(edit.gone)[None]
            total[model] += stacked_gradient(risk.objective, put, rows[model, None], share)[0]
    return total


def refit(
    risk: Risk,
    inverse: Inverse,
    edits: Sequence[Edit],
    *,
    start: Tensor | None = None,
    max_steps: int = 200,
    rtol: float = 1e-9,
) -> Refits:
    """Minimise the objective of changed data, from the full minimiser or from given rows.

    All m objectives descend together by limited-memory BFGS that starts from the inverse Hessian
    of the unchanged data, the right one up to the changed examples. What counts is where it ends,
    and that is checked: ∇R_m = 0 up to ``rtol`` of the change's own gradient.

    Args:
        risk: the full objective, in float64.
        inverse: of its Hessian.
        edits: one change of the data for each refit; an empty one refits the whole.
        start: where to begin, ``[m, p]``; by default all at the model's parameters.
        max_steps: of the iteration.
        rtol: on the gradient, relative to that of the changed objective at the full minimiser.

    Raises:
        NotConvergedError: more than a fifth of the refits did not reach their minimum.
    """
    full = risk.objective.space.row()
    rows = full.repeat(len(edits), 1) if start is None else start
    starts = range(0, len(edits), MODELS_AT_ONCE)
    chunks = [slice(i, i + MODELS_AT_ONCE) for i in starts]
    done = [
        _refit_chunk(risk, inverse, edits[cut], rows[cut], limits=(max_steps, rtol))
        for cut in track(chunks, "refits", len(chunks))
    ]
    found = Refits(
        torch.cat([part.rows for part in done]),
        torch.cat([part.slope for part in done]),
        torch.cat([part.met for part in done]),
        max(part.steps for part in done),
    )
    failed = int((~found.met).sum())
    if failed > MOST_FAILURES * len(edits):
        raise NotConvergedError(
            f"{failed} of {len(edits)} refits did not reach their minimum (gradient up to "
            f"{float(found.slope.max()):.1e}). The model may not be at a minimum of its objective "
            "(train it to the end, state its l2), or a change is too large for a refit from "
            "here: pass retrain= instead."
        )
    return found


def _refit_chunk(
    risk: Risk,
    inverse: Inverse,
    edits: Sequence[Edit],
    start: Tensor,
    *,
    limits: tuple[int, float],
) -> Refits:
    max_steps, rtol = limits
    full = risk.objective.space.row()
    whole = full.repeat(len(edits), 1)
    origin = _slopes(risk, edits, whole)
    first = origin.norm(dim=1)
    # A refit of the whole starts at its minimum: relative to itself nothing is left to gain.
    goal = (rtol * first).clamp_min(1e-11 * float(full.norm() + 1))
    found = descend(
        lambda rows, which: _slopes(risk, [edits[i] for i in which.tolist()], rows),
        inverse,
        start,
        goal=goal,
        max_steps=max_steps,
        known=origin if torch.equal(start, whole) else None,
    )
    return Refits(found.rows, found.slope, found.slope <= goal, found.steps)
