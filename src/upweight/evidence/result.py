"""Evidence: what retraining found, what is to be made of it, and what it cost."""

import html
import json
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, final

import numpy as np

from upweight.errors import StoreError
from upweight.evaluation import Estimate
from upweight.evidence.findings import Finding, Points, Rating
from upweight.evidence.spending import spoken
from upweight.evidence.statistics import Statistic, statistic_of
from upweight.evidence.verdict import Cost, Verdict, verdict
from upweight.meaning import Meaning
from upweight.packages import require
from upweight.store import plain
from upweight.tables import Table, atomic_write

__all__ = ["Evidence"]

SCHEMA = 1
BEST = "best possible"
UNKNOWN = Estimate(np.nan, np.nan, np.nan)


@final
@dataclass(frozen=True)
class Evidence:
    """How far scores can be trusted, from models that were really trained again.

    Attributes:
        findings: one for each question that was answered, the most telling first.
        statistic: what methods are compared by.
        points: predicted and actual changes.
        meaning: measure, unit and sign of the scores.
        truth: how the actual changes were made.
        cost: trainings and seconds.
        notes: what limits the evidence, and baselines that these data do not have.

    Example:
        >>> import torch, upweight as uw
        >>> from upweight.reference import ridge
        >>> x = torch.randn(40, 2, dtype=torch.float64)
        >>> y, share = x.sum(1) + torch.randn(40), torch.full((40,), 1 / 40, dtype=torch.float64)
        >>> model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
        >>> model.weight.data[0] = ridge(x, y, 0.1, share)
        >>> inf = uw.Influence(model, (x, y), loss="mean_squared_error", l2=0.1)
        >>> found = inf.evidence((x[:3], y[:3]), budget="1 s")
        >>> found.verdict.grade, found.findings[0].trials
        ('good', 'random examples, one at a time')
    """

    findings: tuple[Finding, ...]
    statistic: Statistic
    points: Points
    meaning: Meaning
    truth: str
    cost: Cost
    notes: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """What may be done with the scores, in one sentence."""
        return verdict(self.findings[0], self.statistic, self.cost)

    def table(self) -> Table:
        """One row per question and method: the statistic, how far ahead the scores are, r, slope.

        The best possible prediction, where it is known, is a row too.
        """
        rows = []
        for finding in self.findings:
            rows += [self._row(finding, rating) for rating in finding.ratings]
            if finding.ceiling is not None:
                best = Rating(BEST, BEST, finding.ceiling, None, UNKNOWN, None)
                rows.append(self._row(finding, best))
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        unit = f" ({self.statistic.unit})" if self.statistic.unit else ""
        caption = (
            f"{self.statistic.name}{unit} with 95 % intervals; slope of actual over predicted."
        )
        return Table(columns, caption)

    def _row(self, finding: Finding, rating: Rating) -> dict[str, Any]:
        ahead, slope = rating.ahead or UNKNOWN, rating.slope or UNKNOWN
        return {
            "question": finding.question,
            "removed": finding.trials,
            "trials": finding.count,
            "method": rating.name,
            self.statistic.name: rating.order.value,
            "low": rating.order.low,
            "high": rating.order.high,
            "scores_ahead": ahead.value,
            "ahead_low": ahead.low,
            "ahead_high": ahead.high,
            "r": rating.r.value,
            "slope": slope.value,
            "slope_low": slope.low,
            "slope_high": slope.high,
        }

    def _lines(self) -> list[str]:
        failed = sum(finding.failed for finding in self.findings[:1])
        cost = f"{self.cost.trainings:,} trainings in {spoken(self.cost.seconds)}"
        return [
            f"truth: {self.truth}",
            f"cost: {cost}" + (f", {failed} trials failed" if failed else ""),
            *(f"note: {note}" for note in self.notes),
        ]

    def __repr__(self) -> str:
        return "\n".join([self.verdict.sentence, "", repr(self.table()), *self._lines()])

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in self._lines())
        sentence = html.escape(self.verdict.sentence)
        return f"<p><b>{sentence}</b></p>{self.table()._repr_html_()}{lines}"

    def plot(self, axes: Any = None) -> Any:
        """Every method with its interval, and the ceiling as a line; returns matplotlib's Axes."""
        if axes is None:
            axes = require("matplotlib.pyplot", "plot()").subplots(figsize=(6, 4))[1]
        finding = self.findings[0]
        for place, rating in enumerate(reversed(finding.ratings)):
            found = rating.order
            axes.plot([found.low, found.high], [place, place], color="grey")
            axes.plot([found.value], [place], marker="o", color="black")
        if finding.ceiling is not None:
            axes.axvline(finding.ceiling.value, linestyle="--", color="grey", label=BEST)
            axes.axvspan(finding.ceiling.low, finding.ceiling.high, color="grey", alpha=0.15)
            axes.legend()
        names = [rating.name for rating in reversed(finding.ratings)]
        unit = f" ({self.statistic.unit})" if self.statistic.unit else ""
        axes.set(xlabel=f"{self.statistic.name}{unit}, {finding.question}")
        axes.set_yticks(range(len(names)), names)
        return axes

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the verdict among them."""
        found: dict[str, Any] = plain(
            {
                "schema": SCHEMA,
                "verdict": asdict(self.verdict),
                "statistic": {"name": self.statistic.name, "unit": self.statistic.unit},
                "findings": [finding.as_dict() for finding in self.findings],
                "points": self.points.as_dict(),
                "meaning": asdict(self.meaning),
                "truth": self.truth,
                "cost": asdict(self.cost),
                "notes": list(self.notes),
            }
        )
        return found

    def save(self, path: str | PathLike[str]) -> Path:
        """Write a JSON file, complete or absent.

        Raises:
            StoreError: it cannot be written.
        """
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        return atomic_write(path, text.encode())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Evidence":
        """Read what ``save`` wrote.

        Raises:
            StoreError: absent, damaged, or of another version.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if found["schema"] != SCHEMA:
                raise StoreError(
                    f"{path} has schema {found['schema']}, this version reads {SCHEMA}. Use the "
                    "version that wrote it."
                )
            return cls(
                tuple(map(Finding.from_dict, found["findings"])),
                statistic_of(found["statistic"]["name"], found["statistic"]["unit"]),
                Points.from_dict(found["points"]),
                Meaning(**found["meaning"]),
                found["truth"],
                Cost(**found["cost"]),
                tuple(found["notes"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{path} is no evidence that can be read: {error}.") from error
