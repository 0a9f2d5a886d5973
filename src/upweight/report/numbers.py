"""How the page writes numbers: true minus signs, three figures, powers of ten that can be read."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

__all__ = [
    "MISSING",
    "Axis",
    "Scale",
    "figure",
    "finite",
    "interval",
    "percent",
    "power",
    "scale_of",
]

MISSING = "–"
MINUS = "−"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def finite(value: Any) -> float | None:
    """A float, or None where there is no finite number.

    Example:
        >>> finite(2), finite(float("nan")), finite(None), finite("2")
        (2.0, None, None, None)
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


@final
@dataclass(frozen=True)
class Axis:
    """From values to places in a drawing.

    Attributes:
        low: the value at ``start``.
        high: the value at ``end``.
        start: a place.
        end: another.

    Example:
        >>> Axis(0.0, 2.0, start=100.0, end=0.0).at(0.5)
        75.0
    """

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The place of a value."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def power(exponent: int) -> str:
    """Ten to a power.

    Example:
        >>> power(-4)
        '10⁻⁴'
    """
    return "10" + str(exponent).translate(_RAISED)


def figure(value: Any, digits: int = 3) -> str:
    """A number with some significant digits, its power of ten apart where it is far from 1.

    Example:
        >>> figure(-0.01234), figure(0.0000123), figure(1234.5, 2), figure(None)
        ('−0.0123', '1.23 × 10⁻⁵', '1200', '–')
    """
    number = finite(value)
    if number is None:
        return MISSING
    if number == 0:
        return "0"
    mantissa, _, tail = f"{number:.{digits - 1}e}".partition("e")
    exponent = int(tail)
    if -3 <= exponent < 5:
        rounded = float(f"{mantissa}e{exponent}")
        return f"{rounded:.{max(digits - 1 - exponent, 0)}f}".replace("-", MINUS)
    return f"{mantissa} × {power(exponent)}".replace("-", MINUS)


def interval(pair: Any, decimals: int = 3) -> str:
    """Two ends in brackets, or a dash where there are none.

    Example:
        >>> interval([0.9951, 0.9987])
        '[0.995, 0.999]'
    """
    ends = [finite(end) for end in pair] if pair else []
    if len(ends) != 2 or any(end is None for end in ends):
        return MISSING
    return f"[{', '.join(f'{end:.{decimals}f}' for end in ends)}]".replace("-", MINUS)


def percent(share: Any) -> str:
    """A share in percent, never rounded up to 100.

    Example:
        >>> percent(1.0), percent(0.99999), percent(0.123)
        ('100 %', '99.9 %', '12.3 %')
    """
    number = finite(share)
    if number is None:
        return MISSING
    tenths = math.floor(1000 * number + 1e-9) / 10
    return f"{tenths:.0f} %" if tenths == int(tenths) else f"{tenths:.1f} %"


@final
@dataclass(frozen=True)
class Scale:
    """One power of ten and one number of decimals for numbers that are compared.

    Attributes:
        exponent: of the common factor.
        decimals: behind the point.

    Example:
        >>> scale = scale_of([0.00041, -0.00012])
        >>> scale.signed(0.00041), scale.signed(-0.00012), scale.unit("nats")
        ('+410', '−120', '10⁻⁶ nats')
    """

    exponent: int
    decimals: int

    def signed(self, value: Any) -> str:
        """The number over the common factor, with its sign."""
        return self.plain(value, "+")

    def plain(self, value: Any, sign: str = "-") -> str:
        """The number over the common factor."""
        number = finite(value)
        if number is None:
            return MISSING
        shown = f"{number / 10.0**self.exponent:{sign}.{self.decimals}f}"
        # A sign on a zero would claim a direction that the digits do not show.
        return (shown if float(shown) else shown.lstrip("+-")).replace("-", MINUS)

    def unit(self, unit: str) -> str:
        """The unit with the common factor before it."""
        return f"{power(self.exponent)} {unit}" if self.exponent else unit


def scale_of(values: Iterable[Any]) -> Scale:
    """The scale that gives the largest of some numbers three figures.

    Example:
        >>> scale_of([12.5, -3.0])
        Scale(exponent=0, decimals=1)
    """
    largest = max((abs(v) for v in map(finite, values) if v is not None), default=0.0)
    if not largest:
        return Scale(0, 1)
    size = math.floor(math.log10(largest))
    exponent = 0 if -2 <= size < 5 else 3 * (size // 3)
    return Scale(exponent, max(2 - (size - exponent), 0))
