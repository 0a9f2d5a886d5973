"""The evidence drawn: predicted against actual change as coordinates for the page's SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from upweight.report.numbers import Axis, Scale, finite, scale_of

__all__ = ["Mark", "Panel", "Scatter", "scatter", "ticks"]

SIDE = 374.0
LEFT, RIGHT, TOP, BOTTOM = 66.0, 10.0, 12.0, 52.0
TICKS = 6
MAX_POINTS = 3000
# A second panel is drawn where the random removals fill less than this share of the first.
CROWDED = 0.5


@final
@dataclass(frozen=True)
class Mark:
    """One point: its place in the drawing, its kind's number, and what it says."""

    x: float
    y: float
    kind: int
    text: str


@final
@dataclass(frozen=True)
class Panel:
    """One square drawing with the same range on both axes, so that x = y is its diagonal."""

    name: str
    caption: str
    marks: tuple[Mark, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    unit: str
    width: float = LEFT + SIDE + RIGHT
    height: float = TOP + SIDE + BOTTOM
    left: float = LEFT
    right: float = LEFT + SIDE
    top: float = TOP
    bottom: float = TOP + SIDE


@final
@dataclass(frozen=True)
class Scatter:
    """Every panel, the kinds in the order of their markers, and how many points there were."""

    panels: tuple[Panel, ...]
    kinds: tuple[str, ...]
    drawn: int
    total: int


def scatter(points: Sequence[Mapping[str, Any]], unit: str) -> Scatter:
    """Panels of all points and, where they would be a blot in the middle, of the random ones.

    Points without two finite numbers cannot be drawn; of very many, every k-th is.

    Args:
        points: dicts with "x" (predicted), "y" (actual), "kind", "query" and "removed".
        unit: of both axes.

    Example:
        >>> found = scatter([{"x": 1.0, "y": 1.1, "kind": "random", "query": 0, "removed": 7}], "m")
        >>> found.panels[0].marks[0].text
        'query 0, without 7: predicted +1.00, actual +1.10 m (random)'
    """
    kinds = tuple(dict.fromkeys(str(point["kind"]) for point in points))
    usable = [p for p in points if finite(p["x"]) is not None and finite(p["y"]) is not None]
    stride = max(-(-len(usable) // MAX_POINTS), 1)
    shown = usable[::stride]
    panels = []
    if shown:
        panels.append(_panel("all", "All removals", shown, kinds=kinds, unit=unit))
        random = [point for point in shown if "random" in str(point["kind"]).lower()]
        if 0 < len(random) < len(shown) and _reach(random) < CROWDED * _reach(shown):
            caption = "Random removals alone, enlarged"
            panels.append(_panel("random", caption, random, kinds=kinds, unit=unit))
    return Scatter(tuple(panels), kinds, len(shown), len(points))


def _reach(points: Sequence[Mapping[str, Any]]) -> float:
    return max(abs(float(p[axis])) for p in points for axis in "xy")


def _panel(
    name: str,
    caption: str,
    points: Sequence[Mapping[str, Any]],
    *,
    kinds: tuple[str, ...],
    unit: str,
) -> Panel:
    values = [float(v) for point in points for v in (point["x"], point["y"])]
    low, high = min(0.0, *values), max(0.0, *values)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin
    across, up = Axis(low, high, LEFT, LEFT + SIDE), Axis(low, high, TOP + SIDE, TOP)
    places, scale = ticks(low, high)
    said = scale_of(values)
    marks = tuple(
        Mark(
            across.at(point["x"]),
            up.at(point["y"]),
            kinds.index(str(point["kind"])),
            f"query {point['query']}, without {point['removed']}: predicted "
            f"{said.signed(point['x'])}, actual {said.signed(point['y'])} {said.unit(unit)} "
            f"({point['kind']})",
        )
        for point in points
    )
    return Panel(
        name,
        caption,
        marks,
        tuple((across.at(value), scale.plain(value)) for value in places),
        tuple((up.at(value), scale.plain(value)) for value in places),
        scale.unit(unit),
    )


def ticks(low: float, high: float) -> tuple[list[float], Scale]:
    """Round values between two ends, evenly apart, and how to write them.

    Example:
        >>> ticks(0.0, 1.1)
        ([0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0], Scale(exponent=0, decimals=1))
    """
    raw = (high - low) / TICKS
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * 0.999)
    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    places = [n * step for n in numbers]
    exponent = scale_of([max(map(abs, places))]).exponent
    decimals = max(exponent - math.floor(math.log10(step) + 1e-9), 0)
    return places, Scale(exponent, decimals)
