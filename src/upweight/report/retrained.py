"""What retraining found, for the page: numbers as texts, drawings as coordinates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from upweight.report.ladder import Ladder, ladder
from upweight.report.numbers import MISSING, figure, finite, interval
from upweight.report.scatter import Scatter, scatter

__all__ = ["Found", "Retrained", "retrained_view"]

Row = tuple[str, ...]


@final
@dataclass(frozen=True)
class Found:
    """One question: what was removed, the drawing, and a row of texts per method."""

    question: str
    basis: str
    ladder: Ladder
    rows: tuple[Row, ...]


@final
@dataclass(frozen=True)
class Retrained:
    """Everything that the page shows of retraining."""

    sentence: str
    statistic: str
    found: tuple[Found, ...]
    scatter: Scatter
    pairs: int
    truth: str
    notes: tuple[str, ...]


def retrained_view(model: Mapping[str, Any]) -> Retrained | None:
    """The view of a model's "retrained" part; None where there is none.

    Raises:
        KeyError: a part is missing.
    """
    part = model.get("retrained")
    if not part:
        return None
    statistic = part["statistic"]
    return Retrained(
        part["verdict"]["sentence"],
        f"{statistic['name']} ({statistic['unit']})" if statistic["unit"] else statistic["name"],
        tuple(_found(finding, statistic) for finding in part["findings"]),
        scatter(part["points"], part["unit"]),
        part["pairs"],
        part["truth"],
        tuple(part["notes"]),
    )


def _found(finding: Mapping[str, Any], statistic: Mapping[str, Any]) -> Found:
    failed = f", {finding['failed']:,} failed" if finding["failed"] else ""
    basis = f"without {finding['trials']}: {finding['count']:,} trials{failed}"
    rows = tuple(_row(rating) for rating in finding["ratings"])
    if finding["ceiling"]:
        best = finding["ceiling"]
        value = figure(best["value"]), interval(best["interval"], 2)
        rows = (*rows, ("best possible", *value, "", MISSING, MISSING, ""))
    return Found(finding["question"], basis, ladder(finding, statistic), rows)


def _row(rating: Mapping[str, Any]) -> Row:
    """Name, value, interval, how far the scores are ahead, r, slope and its interval."""
    ahead, slope = rating["ahead"], rating["slope"]
    return (
        str(rating["name"]),
        figure(rating["order"]["value"]),
        _interval(rating["order"]),
        "" if ahead is None else f"{figure(ahead['value'])} {_interval(ahead)}",
        figure(rating["r"]["value"]),
        MISSING if slope is None else figure(slope["value"]),
        "" if slope is None else _interval(slope),
    )


def _interval(part: Mapping[str, Any]) -> str:
    """An interval with three figures of its width."""
    ends = [finite(end) for end in part["interval"]]
    if None in ends:
        return MISSING
    return f"[{', '.join(figure(end) for end in ends)}]"
