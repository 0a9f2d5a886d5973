"""Really removing examples: refits of many reduced objectives at once, to machine precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.data import Data
from upweight.errors import NotConvergedError
from upweight.gradients import stacked_gradient, stacked_measure
from upweight.linalg import Inverse
from upweight.objective import Measure
from upweight.risk import Risk

__all__ = ["Refits", "refit"]

BATCH_ROWS = 8192
MODELS_AT_ONCE = 128
SMALLEST_STEP, GROWTH = 1e-2, 100.0
MOST_FAILURES = 0.2


@final
@dataclass(frozen=True)
class Refits:
    """Minimisers of reduced objectives.

    Attributes:
        rows: parameters ``[m, p]``, float64.
        slope: ‖∇R‖ of each reduced objective at its row, ``[m]``.
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


def _weights(risk: Risk, removals: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Share of rows start..stop in each reduced objective, ``[m, b]``.

    "mean": the rest is averaged anew. "sum": the rest keeps its share, so that L2 does too.
    """
    shares = risk.share(torch.arange(start, stop, device="cpu")).repeat(len(removals), 1)
    for model, gone in enumerate(removals):
        inside = gone[(gone >= start) & (gone < stop)] - start
        shares[model, inside] = 0
        if risk.objective.removal == "mean":
            shares[model] /= 1 - float(risk.weights[gone].sum()) / risk.total
    return shares


def _slopes(risk: Risk, removals: Sequence[Tensor], rows: Tensor) -> Tensor:
    """∇R of each reduced objective at its own row, ``[m, p]``: one pass over the data."""
    total = rows * risk.objective.l2
    for batch, _ in risk.batches(BATCH_ROWS):
        start, stop = int(batch.positions[0]), int(batch.positions[-1]) + 1
        weights = _weights(risk, removals, start, stop)
        total = total + stacked_gradient(risk.objective, batch, rows, weights)
    return total


def refit(
    risk: Risk,
    inverse: Inverse,
    removals: Sequence[Tensor],
    *,
    max_steps: int = 200,
    rtol: float = 1e-9,
) -> Refits:
    """Minimise the objective without given examples, warm-started at the full minimiser.

    θ_m ← θ_m − t_m H⁻¹ ∇R_m(θ_m) for all m together, with one factorisation of the full Hessian:
    the error shrinks at each step by about the removed examples' leverage. A refit whose
    gradient grows starts again with half the step. What counts is where it ends, and that is
    checked: ∇R_m = 0 up to ``rtol`` of the removal's own gradient.

    Args:
        risk: the full objective, in float64.
        inverse: of its Hessian.
        removals: positions ``[k]`` that each refit leaves out; an empty one refits the whole.
        max_steps: of the iteration.
        rtol: on the gradient.

    Raises:
        NotConvergedError: more than a fifth of the refits did not reach their minimum.
    """
    start = risk.objective.space.row()
    chunks = [removals[i : i + MODELS_AT_ONCE] for i in range(0, len(removals), MODELS_AT_ONCE)]
    done = [
        _refit_chunk(risk, inverse, chunk, start, limits=(max_steps, rtol))
        for chunk in track(chunks, "refits", len(chunks))
    ]
    found = Refits(
        torch.cat([part.rows for part in done]),
        torch.cat([part.slope for part in done]),
        torch.cat([part.met for part in done]),
        max(part.steps for part in done),
    )
    failed = int((~found.met).sum())
    if failed > MOST_FAILURES * len(removals):
        raise NotConvergedError(
            f"{failed} of {len(removals)} refits did not reach their minimum (gradient up to "
            f"{float(found.slope.max()):.1e}). The model may not be at a minimum of its objective "
            "(train it to the end, state its l2), or a removal is too large for a refit from "
            "here: pass retrain= instead."
        )
    return found


def _refit_chunk(
    risk: Risk,
    inverse: Inverse,
    removals: Sequence[Tensor],
    start: Tensor,
    *,
    limits: tuple[int, float],
) -> Refits:
    max_steps, rtol = limits
    rows = start.repeat(len(removals), 1)
    slopes = _slopes(risk, removals, rows)
    origin, first = slopes.clone(), slopes.norm(dim=1)
    norms = first.clone()
    # A refit of the whole starts at its minimum: relative to itself nothing is left to gain.
    floor = 1e-11 * float(start.norm() + 1)
    goal = torch.maximum(rtol * norms, torch.full_like(norms, floor))
    size = torch.ones_like(norms)
    steps = 0
    for step in range(max_steps):
        active = ((norms > goal) & (size > SMALLEST_STEP)).nonzero()[:, 0]
        if not len(active):
            break
        steps = step + 1
        rows[active] -= size[active, None] * inverse.apply(slopes[active])
        slopes[active] = _slopes(risk, [removals[i] for i in active.tolist()], rows[active])
        norms = slopes.norm(dim=1)
        lost = ~(norms <= GROWTH * first + floor)
        rows[lost], slopes[lost], norms[lost] = start, origin[lost], first[lost]
        size[lost] /= 2
    return Refits(rows, norms, norms <= goal, steps)
