"""What retraining found, for the page: numbers as texts, drawings as coordinates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from upweight.report.ladder import Ladder, ladder
from upweight.report.numbers import MISSING, Scale, scale_of
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
    scale = _scale(part["findings"])
    unit = scale.unit(statistic["unit"])
    return Retrained(
        part["verdict"]["sentence"],
        f"{statistic['name']} ({unit})" if unit else statistic["name"],
        tuple(_found(finding, statistic, scale) for finding in part["findings"]),
        scatter([] if model.get("per") else part["points"], part["unit"]),
        part["pairs"],
        part["truth"],
        tuple(part["notes"]),
    )


def _scale(findings: Sequence[Mapping[str, Any]]) -> Scale:
    """One scale for what is compared, of all questions."""
    ratings = [rating for finding in findings for rating in finding["ratings"]]
    return scale_of(rating["order"]["value"] for rating in ratings)


def _found(finding: Mapping[str, Any], statistic: Mapping[str, Any], scale: Scale) -> Found:
    failed = f", {finding['failed']:,} failed" if finding["failed"] else ""
    basis = f"without {finding['trials']}: {finding['count']:,} trials{failed}"
    rows = [_row(rating, scale) for rating in finding["ratings"]]
    if finding["ceiling"]:
        value, ends = _texts(finding["ceiling"], scale)
        rows.append(("best possible", value, ends, "", "", "", ""))
    return Found(finding["question"], basis, ladder(finding, statistic), tuple(rows))


def _row(rating: Mapping[str, Any], scale: Scale) -> Row:
    """Name, value, interval, how far the scores are ahead, r, slope and its interval."""
    ahead, slope = rating["ahead"], rating["slope"]
    plain = Scale(0, 2)
    return (
        str(rating["name"]),
        *_texts(rating["order"], scale),
        "" if ahead is None else " ".join(_texts(ahead, scale)),
        plain.plain(rating["r"]["value"]),
        *(("", "") if slope is None else _texts(slope, plain)),
    )


def _texts(part: Mapping[str, Any], scale: Scale) -> tuple[str, str]:
    """A value and its interval, a dash for what is unknown."""
    ends = [scale.plain(end) for end in part["interval"]]
    return scale.plain(part["value"]), MISSING if MISSING in ends else f"[{', '.join(ends)}]"
