"""Intervals of predicted changes, from changes that were really made: conformal prediction.

The u changes that were retrained and a new one, if it is drawn as they were, are exchangeable. So
is any score of how far each actual change is from its prediction,

    e_j = sign(p_j) (a_j − p_j) / scale_j,    scale_j = |p_j| + τ √k_j,

with predicted change p_j, actual a_j, and k_j examples changed; τ is the root mean square of
p_j/√k_j over all u + 1, a number that needs no outcome. The score of the new change is as likely to
be in any place among the u + 1, so that it is between the k-th smallest and the k-th largest of the
others with a chance of at least 1 − 2k/(u + 1), whatever the model, the method and the size of its
errors. From 19 changes on, each side has its own bound, of 5 %: where predictions are too small, as
first order is for groups, the interval lies further out than the prediction. From 9 to 18 there are
not enough of them to bound a side, and |e_j| is bounded in its place.

Nothing is fitted to outcomes, so that none are lost to fitting. The guarantee is about new changes
on average, and not about one that was chosen because its prediction is extreme.

Vovk, Gammerman & Shafer (2005); Lei, G'Sell, Rinaldo, Tibshirani & Wasserman (2018).
"""

import math
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch

from upweight.answers import WhatIf
from upweight.data import Data
from upweight.errors import InputError
from upweight.evaluation import slope
from upweight.fingerprints import fingerprint
from upweight.meaning import Meaning
from upweight.outcomes import Outcomes
from upweight.tables import Table

__all__ = ["LEAST", "LEVEL", "Calibration", "Predicted", "bounds", "row_fingerprints"]

LEVEL = 0.9
# The fewest changes among which a rank of 90 % exists, and of which both sides have a rank of 95 %.
LEAST, BOTH_SIDES = 9, 19
FEW = 3


def _rank(count: int, level: float) -> int:
    """The place among sorted scores that a new one stays below with at least this chance."""
    return math.ceil((count + 1) * level - 1e-9)


def bounds(
    predicted: np.ndarray, actual: np.ndarray, sizes: np.ndarray, *, new: np.ndarray, size: float
) -> tuple[np.ndarray, np.ndarray]:
    """90 % intervals ``[q]`` of a new change, low and high.

    Args:
        predicted: of earlier changes, ``[q, u]``, u ≥ 9.
        actual: ``[q, u]``.
        sizes: examples changed, ``[u]``.
        new: predicted for the new change, ``[q]``.
        size: examples that it changes.

    Example:
        >>> predicted = np.arange(1.0, 10.0)[None]
        >>> low, high = bounds(predicted, 2 * predicted, np.ones(9), new=np.array([5.0]), size=1)
        >>> low.round(1), high.round(1)
        (array([-1.5]), array([11.5]))
    """
    count = predicted.shape[1]
    squares = (predicted**2 / sizes).sum(1) + new**2 / size
    typical = np.sqrt(squares / (count + 1))[:, None]
    scale, own = (
        np.abs(predicted) + typical * np.sqrt(sizes),
        np.abs(new) + typical[:, 0] * size**0.5,
    )
    # Where every prediction is 0, so is the scale, and errors count as they are.
    scale, own = np.where(typical > 0, scale, 1.0), np.where(typical[:, 0] > 0, own, 1.0)
    errors = np.sort(np.where(predicted < 0, -1, 1) * (actual - predicted) / scale, axis=1)
    if count >= BOTH_SIDES:
        place = _rank(count, 1 - (1 - LEVEL) / 2) - 1
        least, most = errors[:, count - 1 - place], errors[:, place]
    else:
        most = np.sort(np.abs(errors), axis=1)[:, _rank(count, LEVEL) - 1]
        least = -most
    sign = np.where(new < 0, -1, 1)
    ends = np.stack([new + sign * own * least, new + sign * own * most])
    return ends.min(0), ends.max(0)


def row_fingerprints(queries: Data) -> tuple[str, ...]:
    """A hash of each query's inputs and target, ``[q]``: ids may repeat in other data.

    Example:
        >>> row_fingerprints(Data.of(np.eye(2))) == row_fingerprints(Data.of(np.eye(2)))
        True
    """
    places = (torch.tensor([place], device="cpu") for place in range(len(queries)))
    batches = map(queries.at, places)
    return tuple(fingerprint((batch.inputs, batch.targets)) for batch in batches)


@final
@dataclass(frozen=True)
class Predicted:
    """Predicted changes of queries, each after some change of the data.

    Attributes:
        first: to first order, ``[q, u]``.
        second: by a Newton step, ``[q, u]``; None where there is none.
        removed: examples that leave, ``[u]``.
        relabelled: examples with another label, ``[u]``.
    """

    first: np.ndarray
    second: np.ndarray | None
    removed: np.ndarray
    relabelled: np.ndarray

    @property
    def best(self) -> np.ndarray:
        """The second order where there is one, ``[q, u]``."""
        return self.first if self.second is None else self.second

    @property
    def sizes(self) -> np.ndarray:
        """Examples changed, ``[u]``."""
        total: np.ndarray = self.removed + self.relabelled
        return total


@final
@dataclass(frozen=True)
class Calibration:
    """How far predictions were from what really happened, as intervals of new predictions.

    Attributes:
        query_ids: ``[q]``.
        rows: a hash of each query, ``[q]``.
        predicted: after the changes that were retrained.
        outcomes: what really happened then.
        meaning: measure and unit.

    Raises:
        InputError: fewer changes than a 90 % interval takes, or one that changes nothing.
    """

    query_ids: np.ndarray
    rows: tuple[str, ...]
    predicted: Predicted
    outcomes: Outcomes
    meaning: Meaning

    def __post_init__(self) -> None:
        if not (self.predicted.sizes > 0).all():
            raise InputError(
                "A trial of the truth removes and relabels nothing, so that no error can be "
                "learned from it. Leave it out of the trials: all of the data is trained on anyway."
            )
        count, failed = len(self.outcomes), self.outcomes.failed
        if count < LEAST:
            raise InputError(
                f"A {LEVEL:.0%} interval takes at least {LEAST} changes of the data with an "
                f"outcome, got {count}" + (f" ({failed} failed)" if failed else "") + ". Retrain "
                f"{LEAST - count} more, or {BOTH_SIDES - count} for narrower intervals."
            )

    @property
    def slope(self) -> float:
        """Actual over predicted change, by least squares: above 1, predictions are too small."""
        return slope(self.predicted.best.ravel(), self.outcomes.actual.ravel())

    @property
    def order(self) -> str:
        """What intervals are around: predictions to "first" or to "second" order."""
        return "first" if self.predicted.second is None else "second"

    def judge(self, found: WhatIf, queries: Data, new: Predicted) -> WhatIf:
        """The same what-if with intervals, where it is like the changes that were retrained.

        Args:
            found: predictions for some queries.
            queries: these.
            new: the same predictions, of a single change, with its size.
        """
        places, unlike = self._places(queries), self._unlike(new)
        notes = [*unlike, *self._unknown(found, places)]
        known = (places >= 0) & (not unlike)
        beyond = known & self._beyond(new, places)
        known &= ~beyond
        if beyond.any():
            notes.append(
                f"no interval for {_some(found.query_ids[beyond])}: a larger change is predicted "
                "than any that was retrained"
            )
        low, high = np.full((2, len(places)), np.nan)
        if known.any():
            here = places[known]
            best = new.first if self.predicted.second is None else new.best
            low[known], high[known] = bounds(
                self.predicted.best[here],
                self.outcomes.actual[here],
                self.predicted.sizes,
                new=best[known, 0],
                size=float(new.sizes[0]),
            )
            notes.append(self._promise())
        return replace(found, low=low, high=high, notes=(*found.notes, *notes))

    def _places(self, queries: Data) -> np.ndarray:
        """Where each query is among the calibrated ones, ``[k]``; −1 where it is not."""
        known = {
            (key, row): place
            for place, (key, row) in enumerate(zip(self.query_ids.tolist(), self.rows, strict=True))
        }
        pairs = zip(queries.ids.tolist(), row_fingerprints(queries), strict=True)
        return np.array([known.get(pair, -1) for pair in pairs], dtype=np.int64)

    def _unlike(self, new: Predicted) -> list[str]:
        """Why no query has an interval."""
        known = self.predicted
        for verb, count, seen in (
            ("removed", int(new.removed[0]), known.removed),
            ("given another label", int(new.relabelled[0]), known.relabelled),
        ):
            if not seen.min() <= count <= seen.max():
                span = " to ".join(map(str, sorted({int(seen.min()), int(seen.max())})))
                return [
                    f"no interval: {count} examples are {verb}, and {span} in what was retrained"
                ]
        if known.second is not None and new.second is None:
            return ["no interval: those that were retrained are calibrated to second order"]
        return []

    @staticmethod
    def _unknown(found: WhatIf, places: np.ndarray) -> list[str]:
        unknown = found.query_ids[places < 0]
        if not len(unknown):
            return []
        return [f"no interval for {_some(unknown)}: calibrated with other queries"]

    def _beyond(self, new: Predicted, places: np.ndarray) -> np.ndarray:
        """Queries with a larger prediction than after any retrained change, ``[k]``."""
        pairs = [(self.predicted.first, new.first)]
        if self.predicted.second is not None and new.second is not None:
            pairs.append((self.predicted.second, new.second))
        largest = [np.abs(known[places]).max(1) for known, _ in pairs]
        found: np.ndarray = np.any(
            [np.abs(own[:, 0]) > most for (_, own), most in zip(pairs, largest, strict=True)],
            axis=0,
        )
        return found

    def _promise(self) -> str:
        of, count = self.outcomes, len(self.outcomes)
        return (
            f"low to high holds {LEVEL:.0%} of changes drawn like the {count} that were retrained "
            f"({of.trials.kind}; {of.words}), around {self.order} order, whose slope there was "
            f"{self.slope:.2f}; an example chosen for its score is not drawn like them"
        )

    def table(self) -> Table:
        """One row per query: changes, slope, mean sizes of change and error, typical half width."""
        best, actual = self.predicted.best, self.outcomes.actual
        ends = [
            bounds(best, actual, self.predicted.sizes, new=column, size=float(size))
            for column, size in zip(best.T, self.predicted.sizes, strict=True)
        ]
        columns = {
            "query": self.query_ids,
            "changes": np.full(len(actual), actual.shape[1]),
            "slope": np.array([slope(*pair) for pair in zip(best, actual, strict=True)]),
            "mean_change": np.abs(actual).mean(1),
            "mean_error": np.abs(actual - best).mean(1),
            "half_width": np.median([(high - low) / 2 for low, high in ends], axis=0),
        }
        return Table(
            columns,
            f"Predicted to {self.order} order against {self.outcomes.words}: "
            f"{self.meaning.measure} ({self.meaning.unit}), 90 % intervals.",
        )

    def __repr__(self) -> str:
        failed = self.outcomes.failed
        notes = [f"note: {failed} changes failed and are left out"] if failed else []
        return "\n".join([repr(self.table()), f"truth: {self.outcomes.how}", *notes])

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _some(ids: np.ndarray) -> str:
    """The first of some queries in words."""
    more = f" and {len(ids) - FEW} more" if len(ids) > FEW else ""
    noun = "query" if len(ids) == 1 else "queries"
    return f"{noun} {', '.join(map(str, ids[:FEW].tolist()))}{more}"
