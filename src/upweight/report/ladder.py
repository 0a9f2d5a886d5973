"""Methods compared, drawn: a value and its interval per method, and the ceiling as a line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from upweight.report.numbers import Axis, figure, finite, interval
from upweight.report.scatter import ticks

__all__ = ["Ladder", "Rung", "ladder"]

LEFT, RIGHT, TOP, BOTTOM, STEP = 138.0, 16.0, 24.0, 46.0, 27.0
SPAN = 370.0
MARGIN = 0.05


@final
@dataclass(frozen=True)
class Rung:
    """One method: its name, where its value and interval lie, and what it says."""

    name: str
    y: float
    x: float
    low: float
    high: float
    first: bool
    text: str


@final
@dataclass(frozen=True)
class Ceiling:
    """Where the best possible prediction lies, and its interval."""

    x: float
    low: float
    high: float
    text: str


@final
@dataclass(frozen=True)
class Ladder:
    """Rungs from the top, the scores' own first; ticks along the bottom."""

    rungs: tuple[Rung, ...]
    ceiling: Ceiling | None
    zero: float
    ticks: tuple[tuple[float, str], ...]
    label: str
    height: float
    bottom: float
    width: float = LEFT + SPAN + RIGHT
    left: float = LEFT
    right: float = LEFT + SPAN
    top: float = TOP


def ladder(finding: Mapping[str, Any], statistic: Mapping[str, Any]) -> Ladder:
    """The drawing of one finding.

    Args:
        finding: "ratings" (each "name" and "order") and "ceiling", as Evidence writes them.
        statistic: "name" and "unit".

    Example:
        >>> rating = {"name": "ekfac", "order": {"value": 0.5, "interval": [0.4, 0.6]}}
        >>> found = ladder({"ratings": [rating], "ceiling": None}, {"name": "LDS", "unit": ""})
        >>> found.rungs[0].text, found.label
        ('ekfac: 0.500 [0.400, 0.600]', 'LDS')
    """
    ratings: Sequence[Mapping[str, Any]] = finding["ratings"]
    parts = [rating["order"] for rating in ratings]
    best = finding.get("ceiling")
    values = [0.0, *_numbers([*parts, *([best] if best else [])])]
    low, high = min(values), max(values)
    margin = MARGIN * (high - low) or 1.0
    axis = Axis(low - margin * (low < 0), high + margin, LEFT, LEFT + SPAN)
    places, scale = ticks(axis.low, axis.high)
    bottom = TOP + STEP * len(ratings)
    unit = scale.unit(str(statistic["unit"]))
    return Ladder(
        tuple(
            _rung(rating, axis, TOP + STEP * (place + 0.5), first=place == 0)
            for place, rating in enumerate(ratings)
            if finite(rating["order"]["value"]) is not None
        ),
        _ceiling(best, axis) if best else None,
        axis.at(0.0),
        tuple((axis.at(value), scale.plain(value)) for value in places),
        f"{statistic['name']} ({unit})" if unit else str(statistic["name"]),
        bottom + BOTTOM,
        bottom,
    )


def _numbers(parts: Sequence[Mapping[str, Any]]) -> list[float]:
    found = [finite(number) for part in parts for number in (part["value"], *part["interval"])]
    return [number for number in found if number is not None]


def _ends(part: Mapping[str, Any]) -> tuple[float, float, float]:
    """Value and interval; the value itself where there is no interval."""
    value = float(part["value"])
    low, high = (finite(end) for end in part["interval"])
    return value, value if low is None else low, value if high is None else high


def _rung(rating: Mapping[str, Any], axis: Axis, y: float, *, first: bool) -> Rung:
    value, low, high = _ends(rating["order"])
    text = f"{rating['name']}: {figure(value)} {interval(rating['order']['interval'])}"
    at = axis.at
    return Rung(str(rating["name"]), y, at(value), at(low), at(high), first, text)


def _ceiling(part: Mapping[str, Any], axis: Axis) -> Ceiling:
    value, low, high = _ends(part)
    text = f"best possible prediction: {figure(value)} {interval(part['interval'])}"
    return Ceiling(axis.at(value), axis.at(low), axis.at(high), text)
