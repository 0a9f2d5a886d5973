"""Questions about scores: which training examples made the model predict this."""

from abc import ABC
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from upweight import audits, explanation
from upweight.answers import Sweep
from upweight.data import Data
from upweight.explanation import Question
from upweight.front.asked import Asked
from upweight.objective import Measure
from upweight.prepared import answering
from upweight.scores import Extremes, Scores
from upweight.tables import Table

__all__ = ["Scoring"]


class Scoring(Asked, ABC):
    """Scores of training examples, for queries and for themselves."""

    @answering
    def explain(
        self, queries: Any, *, measure: Measure | None = None, accept: bool = False
    ) -> Scores:
        """Scores of every training example for every query.

        score[q, i] = + share_i ∇m(q) H⁻¹ ∇ℓ̃(z_i): predicted change of the query's measure if the
        example is removed (Koh & Liang, 2017, up to sign and scale). Positive = helpful for a loss.

        Args:
            queries: like ``train``; inputs with targets.
            measure: what is asked of a query; the objective's own by default.
            accept: keep solves that failed; the scores then say so.

        Raises:
            NotConvergedError, IndefiniteError: a solve failed.
        """
        asked = Question(self._made, Data.of(queries), measure, accept=accept)
        return explanation.explain(asked)

    @answering
    def explain_into(
        self, path: str | PathLike[str], queries: Any, *, replace: bool = False
    ) -> Scores:
        """The scores of ``explain`` in a run directory, written batch by batch.

        A killed run goes on where it was; the values are memory-mapped.

        Args:
            path: a new directory, or one of the same run.
            queries: like ``train``; inputs with targets.
            replace: write over a directory of another run.

        Raises:
            StoreError: the place belongs to another run or cannot be written.
            NotConvergedError, IndefiniteError: a solve failed.
        """
        asked = Question(self._made, Data.of(queries), None)
        return explanation.explain_into(asked, path, replace=replace)

    @answering
    def extremes(self, queries: Any, k: int = 10, *, measure: Measure | None = None) -> Extremes:
        """The k most helpful and most harmful examples of every query, kept while scores stream by.

        Memory is q·k and not q·N.

        Raises:
            NotConvergedError, IndefiniteError: a solve failed.
        """
        return explanation.extremes(Question(self._made, Data.of(queries), measure), k)

    @answering
    def sweep(
        self,
        queries: Any,
        dampings: Sequence[float] | None = None,
        *,
        measure: Measure | None = None,
    ) -> Sweep:
        """Scores at several dampings from one fit and one pass: what depends on the damping.

        Args:
            queries: like ``train``; inputs with targets.
            dampings: ascending; by default around the curvature's mean eigenvalue.
            measure: what is asked of a query; the objective's own by default.

        Raises:
            InputError: the method has no curvature to add a damping to.
        """
        return explanation.sweep(Question(self._made, Data.of(queries), measure), dampings)

    @answering
    def self_influence(self) -> np.ndarray:
        """Predicted rise of each example's own loss if it is removed, ``[N]``, in the loss's unit.

        share_i ∇ℓ_i H⁻¹ ∇ℓ̃_i, without the N x N matrix. Large: memorised, unusual or mislabelled.
        """
        self._made.refuse_ablation()
        return explanation.self_influence(self._made)

    def audit(self) -> Table:
        """Suspicious labels, worst first, from this one model, in cleanlab's column names."""
        return audits.audit(self.risk, self.self_influence())
