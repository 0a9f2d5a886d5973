"""Queries explained by training examples: all scores, their extremes, or at several dampings."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from upweight import baselines, engine
from upweight.answers import Sweep
from upweight.data import Data
from upweight.engine import Job, located, query_gradients, score
from upweight.errors import InputError, NumericalError
from upweight.linalg import Operator, RowValues
from upweight.meaning import Meaning, meaning_of
from upweight.methods import Baseline
from upweight.objective import Measure
from upweight.prepared import Prepared, require_targets
from upweight.scores import Extremes, Provenance, Scores
from upweight.sinks import ExtremesSink, MatrixSink, StoredSink
from upweight.store import resume, write_manifest

__all__ = [
    "Question",
    "compare",
    "explain",
    "explain_into",
    "extremes",
    "self_influence",
    "sweep",
    "usual_dampings",
]

SWEPT = tuple(10.0**power for power in (-3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))


@final
class Question:
    """Queries, what is asked of them, and of whom.

    Args:
        made: the model, its data and a method.
        queries: to be explained.
        measure: what is asked of them; the objective's own by default.
        accept: whether solves that failed are kept.
    """

    def __init__(
        self, made: Prepared, queries: Data, measure: Measure | None, *, accept: bool = False
    ) -> None:
        self.made, self.queries, self.accept = made, queries, accept
        self.measure: Measure = made.objective.measure if measure is None else measure
        require_targets(made.objective, queries, role="queries")
        self.identity = made.identity_of(queries, self.measure)

    def rescale(self) -> engine.Rescale | None:
        """The method's factors on training gradients."""
        made = self.made
        rescaling = made.fitted.rescale
        with located(made.risk):
            return None if rescaling is None else rescaling(made.inverse, made.risk)

    @property
    def meaning(self) -> Meaning:
        """What the scores say."""
        return replace(meaning_of(self.made.objective, self.measure), per=self.made.fitted.per)

    def precondition(self) -> tuple[Tensor | RowValues, Provenance]:
        """Rows s_q, and how they came about."""
        made = self.made
        rows, residual, caveats = made.precondition(self.queries, self.measure, accept=self.accept)
        return rows, made.provenance(self.identity, residual, caveats, made.shift)

    def scores(self, values: np.ndarray, provenance: Provenance) -> Scores:
        """Scores with everything needed to read them."""
        made = self.made
        return Scores(
            values,
            self.queries.ids,
            made.data.ids,
            shares=made.shares,
            meaning=self.meaning,
            provenance=provenance,
        )

    def sink(self) -> MatrixSink:
        """Room for all scores in memory."""
        made = self.made
        return MatrixSink(len(self.queries), len(made.data), made.objective.space.dtype)


def explain(asked: Question) -> Scores:
    """Scores of every training example for every query, in memory."""
    if isinstance(asked.made.method, Baseline):
        return compare(asked, asked.made.method)
    (rows, provenance), sink = asked.precondition(), asked.sink()
    with located(asked.made.risk):
        score(asked.made.training, [Job(rows, sink, asked.rescale())])
    return asked.scores(sink.matrix, provenance)


def compare(asked: Question, baseline: Baseline) -> Scores:
    """What a baseline says, in the layout of scores."""
    made, queries = asked.made, asked.queries
    caveats = ("a similarity or ranking, not a change on removal",)
    nothing = torch.full((len(queries),), torch.nan)
    return Scores(
        baselines.compare(baseline, made.risk, queries, asked.measure),
        queries.ids,
        made.data.ids,
        shares=made.shares,
        meaning=baselines.meaning_of(baseline),
        provenance=made.provenance(asked.identity, nothing, caveats, 0.0),
    )


def explain_into(asked: Question, path: str | os.PathLike[str], *, replace: bool) -> Scores:
    """The same in a run directory, batch by batch; a killed run goes on where it was.

    Raises:
        StoreError: the place belongs to another run or cannot be written.
    """
    made = asked.made
    with resume(path, asked.identity, replace=replace) as part:
        rows, provenance = asked.precondition()
        sink = StoredSink(part, len(asked.queries), len(made.data), made.objective.space.dtype)
        with located(made.risk):
            score(made.training, [Job(rows, sink, asked.rescale())], first=sink.first)
        scores = asked.scores(sink.matrix, provenance)
        scores.write_beside(part)
        write_manifest(part, {"kind": "scores", **scores.summary()})
    return Scores.load(path)


def extremes(asked: Question, k: int) -> Extremes:
    """The k most positive and most negative scores of every query; never q·N numbers in memory.

    Raises:
        InputError: k is less than 1.
    """
    made, sink = asked.made, ExtremesSink(len(asked.queries), k)
    rows, provenance = asked.precondition()
    with located(made.risk):
        score(made.training, [Job(rows, sink, asked.rescale())])
    ids = asked.queries.ids, made.data.ids
    return Extremes.of(sink, ids, meaning=asked.meaning, provenance=provenance)


def usual_dampings(curvature: Operator) -> list[float]:
    """From a thousandth of the mean eigenvalue of a curvature to ten times it.

    Example:
        >>> from upweight.linalg import Dense
        >>> usual_dampings(Dense(torch.eye(2)))[:3]
        [0.001, 0.00316, 0.01]
    """
    mean = max(curvature.trace(), 0.0) / curvature.size
    return [float(f"{share * mean:.3g}") for share in SWEPT]


def sweep(asked: Question, dampings: Sequence[float] | None) -> Sweep:
    """Scores at several dampings from one fit, one set of query gradients and one pass.

    Args:
        asked: what is explained.
        dampings: ascending; by default from a thousandth of the curvature's mean eigenvalue to
            ten times it.

    Raises:
        InputError: the method has no curvature to add a damping to, or one is negative.
        NumericalError: no damping gives an answer.
    """
    made = asked.made
    method = made.fitted.require_fit()
    assert method.solver is not None
    base = method.solver.prepared(made.curvature)
    if dampings is None:
        dampings = usual_dampings(base)
    if not dampings or any(not 0 <= value < float("inf") for value in dampings):
        raise InputError(f"Dampings are finite numbers ≥ 0, got {list(dampings)}.")
    gradients = query_gradients(made.objective, asked.queries, asked.measure)
    jobs, found, refused = [], {}, {}
    for damping in dampings:
        try:
            inverse = method.invert(base, damping)
            solution = inverse.precondition(gradients)
            rows = solution.value if asked.accept else solution.require()
            rescale = method.rescale and method.rescale(inverse, made.risk)
        except NumericalError as error:
            refused[damping] = str(error)
            continue
        caveats = (*inverse.notes, *solution.caveats())
        sink = asked.sink()
        jobs.append(Job(rows, sink, rescale))
        provenance = made.provenance(asked.identity, solution.residual, caveats, damping)
        found[damping] = asked.scores(sink.matrix, provenance)
    if not jobs:
        raise NumericalError(f"No damping gives an answer. {refused[max(refused)]}")
    with located(made.risk):
        score(made.training, jobs)
    return Sweep(found, refused)


def self_influence(made: Prepared) -> np.ndarray:
    """Predicted rise of each example's own loss if it is removed, ``[N]``."""
    made.refuse_ablation()
    with located(made.risk):
        return engine.self_influence(made.training, made.inverse)
