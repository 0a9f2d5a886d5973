"""Questions about trust: whether predictions come true, and whether the loss is the right one."""

from abc import ABC
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from upweight import validation
from upweight.answers import Validation
from upweight.data import Data
from upweight.errors import InputError
from upweight.front.scoring import Scoring
from upweight.prepared import answering
from upweight.retraining import Training, Trials, Truth, retrain
from upweight.risk import Risk
from upweight.scores import Scores
from upweight.trainers import Comparison, compare

__all__ = ["Proving"]


class Proving(Scoring, ABC):
    """Predictions held against what really happens."""

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

        Args:
            queries: whose measures are compared.
            top: removals with the largest scores over the queries.
            random: removals drawn at random.
            seed: of the draw.
            retrain: kept positions ``[N − 1]`` -> a model trained on them; by default each refit
                continues from the present minimum in float64 until its gradient vanishes.
            scores: of these queries, if they are there already; made anew by default.

        Raises:
            NotConvergedError: the model is not at a minimum, so a refit has no meaning; pass
                ``retrain``.
        """
        data = Data.of(queries)
        if scores is None:
            scores = self.explain(data)
        elif scores.provenance.identity != self._made.identity_of(data, self.objective.measure):
            raise InputError(
                "The scores belong to other queries, another measure, model or method. Pass those "
                "of explain(queries), or leave them out."
            )
        asked = validation.removals(scores, top, random, seed)
        if retrain is None:
            return validation.by_refit(self.risk, data, scores, asked)
        return validation.by_retraining(self.objective, data, scores, (asked, retrain))

    @answering
    def retrain(self, queries: Any, trials: Trials, how: Training) -> Truth:
        """Really train again on changed data, once for each trial, and measure the queries.

        Args:
            queries: whose measure is asked of every model.
            trials: what to leave out or relabel, and with which seeds.
            how: a recipe of the training.

        Raises:
            InputError: the trials are of other data.
        """
        return retrain(Risk(self._made.whole, self.data), Data.of(queries), trials, how)

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
