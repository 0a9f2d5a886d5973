"""Who is judged by the same truth: the scores, and the cheap baselines they must beat."""

from dataclasses import dataclass
from typing import final

import numpy as np

from upweight import baselines
from upweight.data import Data
from upweight.errors import InputError
from upweight.methods import METHODS, Baseline, Method
from upweight.prepared import Prepared
from upweight.risk import Risk
from upweight.scores import Scores

__all__ = ["CHEAP", "Contender", "contenders"]

# Names in the method table, and what a sentence calls them.
CHEAP = {
    "embedding": "embedding neighbours",
    "cosine": "cosines of gradients",
    "bm25": "shared words (BM25)",
    "loss": "training losses",
    "gradient_norm": "gradient norms",
    "random": "random numbers",
}


@final
@dataclass(frozen=True)
class Contender:
    """What one method says of every query and training example.

    Attributes:
        name: its row of the method table.
        words: what a sentence calls it.
        values: change on removal, or a likeness signed as if it helped, ``[q, N]``.
        sized: whether the values are changes in the measure's unit, and not only an order.
    """

    name: str
    words: str
    values: np.ndarray
    sized: bool


def contenders(
    made: Prepared, queries: Data, scores: Scores
) -> tuple[list[Contender], dict[str, str]]:
    """The scores first, then every cheap baseline that these data and this model have.

    A baseline says which examples come first and not what becomes of the query without them. It is
    read as if those that come first helped: their removal raises a loss, and lowers a margin.

    Returns:
        Contenders, and why a baseline is not among them.

    Raises:
        InputError: the scores are themselves a baseline's.
    """
    if not scores.meaning.change or not isinstance(made.method, Method):
        raise InputError(
            f"{made.method.name!r} is one of the baselines that scores are judged by, a similarity "
            "that predicts no change. Choose another method."
        )
    sized = made.method.rescale is None
    values = np.asarray(scores.values, dtype=np.float64)
    found = [Contender(made.method.name, "these scores", values, sized)]
    absent: dict[str, str] = {}
    whole = made.objective is made.whole
    risk = made.risk if whole else Risk(made.whole, made.data)
    sign = scores.meaning.helpful or 1
    for name, words in CHEAP.items():
        row = METHODS[name]
        assert isinstance(row, Baseline)
        try:
            likeness = baselines.compare(row, risk, queries, made.whole.measure)
        except InputError as error:
            absent[name] = str(error)
            continue
        found.append(Contender(name, words, sign * likeness.astype(np.float64), sized=False))
    return found, absent
