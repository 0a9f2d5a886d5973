"""What was found: how every method's predictions came true, under one question."""

from dataclasses import dataclass
from typing import Any, final

import numpy as np

from upweight.evaluation import Estimate

__all__ = ["AVERAGE", "ONE", "THIS", "Finding", "Points", "Rating"]

THIS, ONE = "this model", "one training of its kind"
AVERAGE = "on average over trainings"


@final
@dataclass(frozen=True)
class Rating:
    """How one method's predictions came true.

    Attributes:
        name: of the method.
        words: what a sentence calls it.
        order: the statistic that methods are compared by.
        ahead: how far the scores are ahead of this method in it, on the same samples; None for the
            scores themselves.
        r: Pearson's correlation over all pairs of queries and trials.
        slope: of actual over predicted; None where the predictions have no unit.
    """

    name: str
    words: str
    order: Estimate
    ahead: Estimate | None
    r: Estimate
    slope: Estimate | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = {"order": self.order, "ahead": self.ahead, "r": self.r, "slope": self.slope}
        plain = {name: one and one.as_dict() for name, one in parts.items()}
        return {"name": self.name, "words": self.words, **plain}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Rating":
        """What ``as_dict`` gave."""
        parts = {name: _estimate(found[name]) for name in ("ahead", "slope")}
        order, r = (_known(found[name]) for name in ("order", "r"))
        return cls(found["name"], found["words"], order, parts["ahead"], r, parts["slope"])


def _known(found: dict[str, Any]) -> Estimate:
    numbers = [found["value"], *found["interval"]]
    return Estimate(*(np.nan if number is None else float(number) for number in numbers))


def _estimate(found: dict[str, Any] | None) -> Estimate | None:
    return None if found is None else _known(found)


@final
@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Attributes:
        question: "this model" (the very training that was explained: same seed, same order), or "on
            average over trainings".
        trials: what was removed in each trial, in words.
        ratings: the scores' own first, then the baselines'.
        ceiling: what the best possible prediction reaches, given the noise of training; None where
            it is unknown.
        count: trials with an outcome.
        failed: trials without.
        constant: queries of which predictions or outcomes do not vary.
    """

    question: str
    trials: str
    ratings: tuple[Rating, ...]
    ceiling: Estimate | None
    count: int
    failed: int
    constant: int

    @property
    def ours(self) -> Rating:
        """The scores' rating."""
        return self.ratings[0]

    @property
    def rival(self) -> Rating | None:
        """The baseline that came closest, or was better; None if there is none."""
        known = [one for one in self.ratings[1:] if np.isfinite(one.order.value)]
        return max(known, key=lambda one: one.order.value, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "question": self.question,
            "trials": self.trials,
            "ratings": [one.as_dict() for one in self.ratings],
            "ceiling": self.ceiling and self.ceiling.as_dict(),
            "count": self.count,
            "failed": self.failed,
            "constant": self.constant,
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Finding":
        """What ``as_dict`` gave."""
        return cls(
            found["question"],
            found["trials"],
            tuple(map(Rating.from_dict, found["ratings"])),
            _estimate(found["ceiling"]),
            found["count"],
            found["failed"],
            found["constant"],
        )


@final
@dataclass(frozen=True)
class Points:
    """Predicted and actual changes, pair by pair.

    Attributes:
        query_ids: ``[q]``.
        removed: what each trial left out, in words, ``[m]``.
        kinds: how each was chosen, ``[m]``.
        predicted: ``[q, m]``.
        actual: ``[q, m]``; NaN where a trial failed, or is not about that query.
    """

    query_ids: np.ndarray
    removed: np.ndarray
    kinds: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "query_ids": self.query_ids.tolist(),
            "removed": self.removed.tolist(),
            "kinds": self.kinds.tolist(),
            "predicted": self.predicted.tolist(),
            "actual": self.actual.tolist(),
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Points":
        """What ``as_dict`` gave, with NaN where JSON has null."""
        names = ("query_ids", "removed", "kinds")
        pairs = ("predicted", "actual")
        return cls(
            *(np.asarray(found[name]) for name in names),
            *(np.asarray(found[name], dtype=np.float64) for name in pairs),
        )
