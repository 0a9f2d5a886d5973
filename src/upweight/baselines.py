"""Baselines in the layout of scores, beside which influence must show what it adds."""

import numpy as np
from torch import Tensor

from upweight.bars import track
from upweight.budget import in_steps
from upweight.checks import require_finite
from upweight.data import Data
from upweight.gradients import batch_rows
from upweight.meaning import Meaning
from upweight.methods import Baseline
from upweight.objective import Measure
from upweight.risk import Risk
from upweight.sinks import MatrixSink

__all__ = ["compare", "meaning_of"]


def meaning_of(baseline: Baseline) -> Meaning:
    """What a baseline's values say: neither helpful nor harmful."""
    return Meaning(baseline.quantity, baseline.unit, 0, change=False)


def compare(baseline: Baseline, risk: Risk, queries: Data, measure: Measure) -> np.ndarray:
    """A baseline's values for queries and training examples, ``[q, N]``.

    Raises:
        InputError: these data or this model have no such values.
        NonFiniteError: naming the row.
    """
    likeness = baseline.likeness(risk, queries, measure)
    examples, size = len(risk.data), batch_rows(risk)
    sink = MatrixSink(len(queries), examples, risk.objective.space.dtype)

    def step(start: int, stop: int) -> Tensor:
        batch, _ = risk.rows(start, stop)
        block = likeness(batch)
        require_finite(block.T, f"The baseline {baseline.name!r}", batch)
        return block

    start = 0
    for block in track(in_steps(examples, size, step), baseline.name, -(-examples // size)):
        sink.write(start, block)
        start += block.shape[1]
    return sink.matrix
