"""What a truth says of a model: one number per query and distinct change of the data."""

from dataclasses import dataclass
from typing import final

import numpy as np

from upweight.errors import InputError
from upweight.evaluation import outcomes
from upweight.meaning import Meaning
from upweight.retraining import Trials, Truth

__all__ = ["Asked", "Outcomes"]

CLOSE = 1e-3


@final
@dataclass(frozen=True)
class Asked:
    """What a truth is asked about.

    Attributes:
        query_ids: ``[q]``.
        now: each query's measure under the model at hand, ``[q]``.
        meaning: measure and unit.
        examples: N, of the training data.
    """

    query_ids: np.ndarray
    now: np.ndarray
    meaning: Meaning
    examples: int


@final
@dataclass(frozen=True)
class Outcomes:
    """What really happened to each query after each distinct change of the data.

    Where the truth has trainings of the model's own seed and they lead to the model at hand, what
    happened is what happened to *this model*; elsewhere it is the mean over the truth's seeds.

    Attributes:
        trials: one for each distinct change, ``u`` of them.
        actual: change of each query's measure, ``[q, u]``.
        failed: changes left out, because a training failed.
        words: whose changes these are: "this model", "one training", "the mean of 3 trainings".
        how: what was trained and how.
    """

    trials: Trials
    actual: np.ndarray
    failed: int
    words: str
    how: str

    @classmethod
    def of(cls, truth: Truth, asked: Asked) -> "Outcomes":
        """Of some of the truth's queries, in the order asked.

        Raises:
            InputError: the truth is of other data, another measure, another model, or other
                queries; or not every change was made with every seed.

        Example:
            >>> meaning = Meaning("loss", "nats", 1)
            >>> trials = Trials.without([[0], [1]], 3, seeds=[0, 1])
            >>> truth = Truth(trials, np.arange(1), np.arange(4.0)[:, None], np.zeros((2, 1)),
            ...               np.arange(2), meaning, "by hand", {})
            >>> found = Outcomes.of(truth, Asked(np.arange(1), np.zeros(1), meaning, 3))
            >>> found.actual.tolist(), found.words
            ([[0.5, 2.5]], 'the mean of 2 trainings')
        """
        columns = _columns(truth, asked)
        if truth.at_hand is not None:
            _require_same_model(truth.at_hand[columns], asked.now)
        seeds = np.unique(truth.trials.seeds)
        if truth.own in seeds.tolist() and truth.reproduced is not False:
            found, words = truth.this_model(), "this model"
        else:
            found = truth.on_average()
            words = "one training" if len(seeds) == 1 else f"the mean of {len(seeds)} trainings"
        actual = found[:, columns].T
        _, first = np.unique(truth.trials.changes(), return_index=True)
        kept = outcomes(actual)
        if not kept.any():
            raise InputError("Every training of the truth failed, so it says nothing. Retrain.")
        trials = truth.trials.take(np.sort(first)[kept])
        return cls(trials, actual[:, kept], int((~kept).sum()), words, truth.how)

    def __len__(self) -> int:
        return len(self.trials)


def _columns(truth: Truth, asked: Asked) -> np.ndarray:
    """Where the queries asked are among the truth's, ``[q]``."""
    if truth.trials.gone.shape[1] != asked.examples:
        raise InputError(
            f"The truth is of {truth.trials.gone.shape[1]} training examples, the model of "
            f"{asked.examples}. Retrain with this Influence's own data: inf.retrain(...)."
        )
    measured, wanted = ((one.measure, one.unit) for one in (truth.meaning, asked.meaning))
    if measured != wanted:
        raise InputError(
            f"The truth measured {measured[0]} ({measured[1]}), and {wanted[0]} ({wanted[1]}) is "
            "predicted. Retrain with this Influence: inf.retrain(...)."
        )
    places = {key: place for place, key in enumerate(truth.query_ids.tolist())}
    unknown = [key for key in asked.query_ids.tolist() if key not in places]
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(asked.query_ids)} queries were not measured by the truth, "
            f"{unknown[0]!r} among them. Pass the queries that it was made with, or some of them."
        )
    return np.array([places[key] for key in asked.query_ids.tolist()], dtype=np.int64)


def _require_same_model(known: np.ndarray, now: np.ndarray) -> None:
    apart = np.abs(known - now)
    if not bool((apart <= CLOSE * np.abs(now).max()).all()):
        raise InputError(
            f"The truth was made beside another model, or of other queries with the same ids: a "
            f"measure was {known[apart.argmax()]:.4g} and is {now[apart.argmax()]:.4g}. Retrain "
            "with this Influence and these queries: inf.retrain(...)."
        )
