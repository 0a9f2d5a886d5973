"""One plain sentence of what the evidence allows."""

import math
from dataclasses import dataclass
from typing import final

from upweight.evaluation import Estimate
from upweight.evidence.findings import Finding, Rating
from upweight.evidence.spending import spoken
from upweight.evidence.statistics import Statistic

__all__ = ["Cost", "Verdict", "verdict"]

GOOD_SLOPES = (0.8, 1.25)
HEADLINES = {
    "good": "Trust the ranking",
    "partly": "Use the ranking to choose what to look at, not to act on single scores",
    "not": "Do not act on these scores, which tell little of what happens",
}


@final
@dataclass(frozen=True)
class Verdict:
    """What may be done with the scores.

    Attributes:
        grade: "good", "partly", "not" or "unknown".
        sentence: for a person.
    """

    grade: str
    sentence: str


@final
@dataclass(frozen=True)
class Cost:
    """What evidence cost, so that it can be said what more of it would.

    Attributes:
        trainings: models that were trained, those of all data among them.
        seconds: that all of it took.
        pace: seconds of one training.
    """

    trainings: int
    seconds: float
    pace: float

    def narrowing(self, width: float, wanted: float) -> str:
        """What a narrower interval takes; widths fall as one over the root of the trials."""
        count = math.ceil(self.trainings * (width / wanted) ** 2)
        return f"about {count:,} retrainings ({spoken(count * self.pace)})"


def verdict(finding: Finding, statistic: Statistic, cost: Cost) -> Verdict:
    """The verdict on a finding.

    The scores must be ahead of the best baseline, and above 0, by an interval that leaves no doubt;
    then the statistic grades them. Where the interval leaves a doubt and is narrow, they are no
    better; where it is wide, nothing can be told yet.

    Args:
        finding: ratings, the scores' own first.
        statistic: what is compared.
        cost: of the evidence.

    Example:
        >>> from upweight.evidence.statistics import Ranking
        >>> def rated(value, ahead=None):
        ...     order = Estimate(value, value - 0.05, value + 0.05)
        ...     return Rating("m", "random numbers", order, ahead, order, None)
        >>> ratings = (rated(0.61), rated(0.22, Estimate(0.39, 0.3, 0.48)))
        >>> found = Finding("this model", "halves", ratings, Estimate(0.84, 0.8, 0.88), 40, 0, 0)
        >>> print(verdict(found, Ranking("LDS"), Cost(82, 170.0, 2.0)).sentence)
        Trust the ranking: LDS 0.61 [0.56, 0.66], ceiling 0.84; random numbers reach 0.22.
    """
    ours, rival = finding.ours, finding.rival
    if not math.isfinite(ours.order.low):
        return Verdict(
            "unknown", "Cannot tell: what was predicted, or what happened, does not vary."
        )
    said, wide = statistic.said(finding), statistic.wide(finding)
    if rival is not None and rival.ahead is not None and rival.ahead.low <= 0:
        ahead = rival.ahead
        if ahead.high < 0:
            return Verdict("not", f"Use {rival.words} instead, which do better here: {said}.")
        if ahead.width > wide:
            return _open(f"whether they are better than {rival.words}", ahead, wide, cost)
        return Verdict(
            "not",
            f"These scores are no better than {rival.words} on this model: {said}, a difference "
            f"of {ahead}.",
        )
    if ours.order.low <= 0:
        if ours.order.width > wide:
            return _open("whether they are better than chance", ours.order, wide, cost)
        return Verdict("not", f"These scores are no better than chance: {said}.")
    grade = statistic.grade(finding)
    return Verdict(grade, f"{HEADLINES[grade]}: {said}{_sizes(ours)}.")


def _open(what: str, found: Estimate, wide: float, cost: Cost) -> Verdict:
    more = cost.narrowing(found.width, wide)
    return Verdict(
        "unknown",
        f"Cannot tell {what}: the interval {found} is wider than {wide:.2g}; it would take {more}.",
    )


def _sizes(ours: Rating) -> str:
    """A word where the order holds and the sizes do not."""
    slope = ours.slope
    if slope is None or not math.isfinite(slope.low):
        return ""
    if slope.low <= GOOD_SLOPES[1] and slope.high >= GOOD_SLOPES[0]:
        return ""
    return f"; real changes are about {slope.value:.2g} times the predicted"
