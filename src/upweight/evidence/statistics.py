"""What methods are compared by, and when it is known well enough."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from upweight.evidence.findings import Finding

__all__ = ["Ranking", "Rise", "Statistic", "statistic_of"]

# Of what the best possible prediction reaches, by the lower end of the interval.
TRUST, USE = 0.5, 0.2
# A rank correlation that is known no better than this decides nothing.
WIDE = 0.3


class Statistic(ABC):
    """A number per method, larger = better.

    Attributes:
        name: in tables.
        unit: of the number; empty for correlations.
    """

    name: str
    unit: str

    @abstractmethod
    def wide(self, finding: Finding) -> float:
        """The width of an interval that decides nothing."""

    @abstractmethod
    def grade(self, finding: Finding) -> str:
        """Of scores that are ahead of every baseline: "good", "partly" or "not"."""

    @abstractmethod
    def said(self, finding: Finding) -> str:
        """The numbers in words, for a sentence."""


@final
@dataclass(frozen=True)
class Ranking(Statistic):
    """A rank correlation of predicted and actual changes, mean over queries.

    Attributes:
        name: in tables.
        unit: none.
    """

    name: str
    unit: str = ""

    def wide(self, finding: Finding) -> float:
        """The same for all."""
        del finding
        return WIDE

    def grade(self, finding: Finding) -> str:
        """By the lower end, as a share of what the best possible prediction reaches.

        Noise in the outcomes lowers every correlation with them by the same factor, which the
        ceiling is (Spearman, 1904).
        """
        ceiling = finding.ceiling
        best = ceiling.value if ceiling is not None and ceiling.value > 0 else 1.0
        reach = finding.ours.order.low / min(best, 1.0)
        if reach >= TRUST:
            return "good"
        return "partly" if reach >= USE else "not"

    def said(self, finding: Finding) -> str:
        """Value, ceiling, and the best baseline's value."""
        rival = finding.rival
        best = "unknown" if finding.ceiling is None else f"{finding.ceiling.value:.2f}"
        beside = "" if rival is None else f"; {rival.words} reach {rival.order.value:.2f}"
        return f"{self.name} {finding.ours.order}, ceiling {best}{beside}"


@final
@dataclass(frozen=True)
class Rise(Statistic):
    """How far the queries' measure moves when the examples go that a method puts first.

    Attributes:
        name: in tables.
        unit: of the measure.
    """

    name: str
    unit: str

    def wide(self, finding: Finding) -> float:
        """As wide as the larger of the two values that are compared."""
        values = [finding.ours.order.value]
        values += [] if finding.rival is None else [finding.rival.order.value]
        return max(*map(abs, values), math.ulp(0.0))

    def grade(self, finding: Finding) -> str:
        """Never good: nothing is known of the examples further down."""
        del finding
        return "partly"

    def said(self, finding: Finding) -> str:
        """How far the measure moved, and how far by the others' choices."""
        beside = [f"{one.words} reach {one.order.value:.2g}" for one in finding.ratings[1:]]
        return (
            f"{self.name} {finding.ours.order} {self.unit} without {finding.trials}; "
            f"{', '.join(beside)}"
        )


def statistic_of(name: str, unit: str) -> Statistic:
    """The statistic with this name and unit.

    Example:
        >>> statistic_of("LDS", "")
        Ranking(name='LDS', unit='')
    """
    return Rise(name, unit) if unit else Ranking(name)
