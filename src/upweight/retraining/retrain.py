"""Retraining: every trial really trained, its queries measured, one truth."""

from collections.abc import Iterator
from typing import final

import numpy as np
import torch
from torch import nn

from upweight.bars import track
from upweight.data import Data
from upweight.errors import InputError
from upweight.meaning import meaning_of
from upweight.retraining.choosing import chunks, fastest
from upweight.retraining.together import Trainer
from upweight.retraining.training import Training
from upweight.retraining.trials import Trials
from upweight.retraining.truth import Truth
from upweight.risk import Risk

__all__ = ["retrain"]

ROWS = 2048


@final
class Asked:
    """Measures of queries under any model of one form.

    Args:
        risk: what was minimised, and at hand.
        queries: what is asked.
    """

    def __init__(self, risk: Risk, queries: Data) -> None:
        risk.objective.probe(queries, risk.objective.measure, role="queries")
        self._objective, self._queries = risk.objective, queries

    def of(self, model: nn.Module) -> np.ndarray:
        """The measure of every query under a model, ``[q]``, float64."""
        twin = self._objective.on(model)
        measured = twin.measured(twin.measure)
        with torch.no_grad():
            found = [
                measured({}, twin.place(batch)).double().cpu()
                for batch in self._queries.batches(ROWS)
            ]
        return torch.cat(found).numpy()


def _outcomes(
    risk: Risk, asked: Asked, trials: Trials, training: Training
) -> Iterator[tuple[int, np.ndarray]]:
    """Number and measures ``[q]`` of every trial, as each chunk is done."""
    trainer = Trainer(risk, training)
    way = fastest(trainer, trials)
    parts = chunks(trials, way)
    for part in track(parts, f"retraining ({way.words()})", len(parts)):
        for number, model in zip(part, trainer.run(trials.take(part), way), strict=True):
            yield int(number), asked.of(model)


def retrain(risk: Risk, queries: Data, trials: Trials, how: Training) -> Truth:
    """Train a model for every trial, and for all of the data with every seed.

    Args:
        risk: objective and data.
        queries: whose measure is asked of every model.
        trials: what to leave out or relabel, and with which seeds.
        how: a recipe.

    Raises:
        InputError: the trials are of other data.
    """
    if trials.gone.shape[1] != len(risk.data):
        raise InputError(
            f"The trials are of {trials.gone.shape[1]} examples, the training data has "
            f"{len(risk.data)}. Make them with examples=len(data)."
        )
    asked, seeds = Asked(risk, queries), np.unique(trials.seeds)
    everything = Trials.whole(len(risk.data), seeds.tolist()).then(trials)
    measured = np.full((len(everything), len(queries)), np.nan)
    for number, found in _outcomes(risk, asked, everything, how):
        measured[number] = found
    return Truth(
        trials=trials,
        query_ids=queries.ids,
        measured=measured[len(seeds) :],
        whole=measured[: len(seeds)],
        seeds=seeds,
        meaning=meaning_of(risk.objective, risk.objective.measure),
        how=how.words(),
        failures={},
    )
