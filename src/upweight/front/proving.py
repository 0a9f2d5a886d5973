"""Questions about trust: whether predictions come true, and whether the loss is the right one."""

from abc import ABC
from collections.abc import Callable
from os import PathLike
from typing import Any, overload

import numpy as np
from torch import nn

from upweight import validation
from upweight.answers import Validation
from upweight.data import Data
from upweight.errors import InputError
from upweight.evidence import Evidence, gather, kept_in, seconds_of
from upweight.front.dispatch import answered_by
from upweight.front.scoring import Scoring
from upweight.prepared import answering
from upweight.retraining import How, Trials, Truth, retrain
from upweight.risk import Risk
from upweight.scores import Scores
from upweight.trainers import Comparison, compare

__all__ = ["Proving"]


class Proving(Scoring, ABC):
    """Predictions held against what really happens."""

    @answering
    def evidence(
        self,
        queries: Any,
        *,
        budget: float | str,
        how: How | None = None,
        path: str | PathLike[str] | None = None,
        scores: Scores | None = None,
    ) -> Evidence:
        """Spend a budget of time on models that are really trained again, and say what it shows.

        One training is timed, and the most telling truth chosen that the budget affords: random
        halves of the data with two seeds each, which also say how far the noise of training lets
        any prediction come; where few trainings are affordable, the examples that matter most to
        each query; for convex models single examples, by refits. The scores and cheap baselines are
        judged by the same trials.

        Args:
            queries: whose measures are compared.
            budget: seconds, or words like "10 min".
            how: a Training; a function (kept positions ``[n]``, seed) -> model, or an Own that says
                more about it; ``Refit()``, the default, for convex models at their minimum.
            path: a directory that keeps every outcome, so that a longer call goes on from a shorter
                one.
            scores: of these queries, if they are there already; made anew by default.

        Raises:
            InputError: the budget is too small for any evidence, with what it would take.
            NotConvergedError, IndefiniteError: the model is to be refitted and at no minimum.
            StoreError: the directory is of another model, data, queries or recipe.
        """
        with kept_in(path, seconds_of(budget)) as (place, spending):
            data = Data.of(queries)
            known = self._scores_of(data, scores)
            return gather(self._made, data, known, how=how, spending=spending, path=place)

    def _scores_of(self, queries: Data, scores: Scores | None) -> Scores:
        """Scores of these queries: those given, if they are theirs, or new ones."""
        if scores is None:
            return self.explain(queries)
        if scores.provenance.identity != self._made.identity_of(queries, self.objective.measure):
            raise InputError(
                "The scores belong to other queries, another measure, model or method. Pass those "
                "of explain(queries), or leave them out."
            )
        return scores

    @overload
    def validate(
        self,
        queries: Any,
        *,
        top: int = 20,
        random: int = 20,
        seed: int = 0,
        retrain: Callable[[np.ndarray], nn.Module] | None = None,
        scores: Scores | None = None,
    ) -> Validation: ...

    @overload
    def validate(
        self,
        queries: Any,
        *,
        budget: float | str,
        how: How | None = None,
        path: str | PathLike[str] | None = None,
        scores: Scores | None = None,
    ) -> Evidence: ...

    @answered_by(evidence, where="budget")
    @answering
    def validate(
        self,
        queries: Any,
        *,
        top: int = 20,
        random: int = 20,
        seed: int = 0,
        retrain: Callable[[np.ndarray], nn.Module] | None = None,
        scores: Scores | None = None,
    ) -> Validation:
        """Really remove examples one by one, refit, and compare with the predictions.

        With ``budget=`` (and ``how=``, ``path=``) the answer is that of ``evidence``.

        Args:
            queries: whose measures are compared.
            top: removals with the largest scores over the queries.
            random: removals drawn at random.
            seed: of the draw.
            retrain: kept positions ``[N − 1]`` -> a model trained on them; by default each refit
                continues from the present minimum in float64 until its gradient vanishes.
            scores: of these queries, if they are there already; made anew by default.

        Raises:
            IndefiniteError, NotConvergedError: the model is at no minimum, so a refit has no
                meaning; pass ``retrain``, or ``budget`` and ``how``. Or new scores failed.
        """
        data = Data.of(queries)
        known = self._scores_of(data, scores)
        asked = validation.removals(known, top, random, seed)
        if retrain is None:
            return validation.by_refit(self.risk, data, known, asked)
        return validation.by_retraining(self.objective, data, known, (asked, retrain))

    @answering
    def retrain(
        self,
        queries: Any,
        trials: Trials,
        how: How,
        path: str | PathLike[str] | None = None,
    ) -> Truth:
        """Really train again on changed data, once for each trial, and measure the queries.

        Args:
            queries: whose measure is asked of every model.
            trials: what to leave out or relabel, and with which seeds.
            how: a Training; Refit() for convex objectives; or your own function (kept positions
                ``[n]``, seed) -> model, or an Own that says more about it.
            path: a directory that keeps every outcome as soon as it is there, to go on from.

        Raises:
            InputError: the trials are of other data.
            NumericalError: training on all of the data failed.
            StoreError: the directory is of another model, data, queries or recipe.
        """
        risk = Risk(self._made.whole, self.data)
        return retrain(risk, Data.of(queries), trials, how, path=path)

    @answering
    def check_loss(self, training_loss: Any) -> Comparison:
        """Whether this objective is the loss the model was trained with, or how it differs.

        Args:
            training_loss: a criterion that reduces, a function (model, batch) -> scalar, a Trainer
                of Hugging Face, or a LightningModule.

        Raises:
            InputError: it is none of these, or fails.
        """
        return compare(self.risk, training_loss)
