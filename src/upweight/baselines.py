"""Baselines: similarities of inputs, beside which influence must show what it adds."""

import numpy as np

from upweight.bars import track
from upweight.data import Data
from upweight.meaning import Meaning
from upweight.methods import Baseline
from upweight.risk import Risk
from upweight.sinks import MatrixSink

__all__ = ["compare", "meaning_of"]


def meaning_of(baseline: Baseline) -> Meaning:
    """What a baseline's values say: a similarity, neither helpful nor harmful."""
    return Meaning(f"{baseline.name}_similarity", baseline.unit, 0, change=False)


def compare(baseline: Baseline, risk: Risk, queries: Data) -> np.ndarray:
    """Similarities of queries and training examples, ``[q, N]``."""
    sink = MatrixSink(len(queries), len(risk.data), risk.objective.space.dtype)
    asked = risk.objective.place(queries.rows())
    for batch, _ in track(risk.batches(4096), baseline.name):
        block = baseline.similarity(asked.inputs, batch.inputs)
        sink.write(int(batch.positions[0]), block)
    return sink.matrix
