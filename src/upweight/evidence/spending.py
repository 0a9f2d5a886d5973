"""A budget of time: read from words, spent, and what is left of it."""

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

from upweight.errors import InputError
from upweight.tables import atomic_write

__all__ = ["Spending", "kept_in", "seconds_of", "spoken"]

UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
PACE = "pace.json"
# A clock may stand still over what is very fast.
SHORTEST = 1e-6
Clock = Callable[[], float]


def seconds_of(budget: float | str) -> float:
    """Seconds of a number, or of words like "10 min".

    Args:
        budget: seconds, or a number with s, min, h or d.

    Raises:
        InputError: it is neither, or not positive.

    Example:
        >>> seconds_of("10 min"), seconds_of(90), seconds_of("1.5h")
        (600.0, 90.0, 5400.0)
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*(s|min|h|d)?\s*", str(budget))
    try:
        number = float(found[1]) * UNITS[found[2] or "s"] if found else 0.0
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise InputError(
            f"A budget is a number of seconds, or a text like '90 s', '10 min' or '2 h'; got "
            f"{budget!r}."
        )
    return number


def spoken(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> spoken(0.04), spoken(75), spoken(600), spoken(10_000), spoken(400_000)
        ('0.04 s', '75 s', '10 min', '2.8 h', '4.6 d')
    """
    name = next((name for name in ("d", "h", "min") if seconds >= 2 * UNITS[name]), "s")
    number = seconds / UNITS[name]
    return f"{number:.2g} {name}" if number < 10 else f"{number:.0f} {name}"


@final
class Spending:
    """How much of a budget is gone, and what another trial costs.

    A trial counts as what those of the last block took each, and at least as what was known before:
    trials that come out of a store take next to nothing.

    Args:
        budget: seconds.
        clock: seconds since some moment.
        pace: seconds that one trial took before, if that is known.

    Attributes:
        pace: seconds of one trial, None while that is unknown.

    Example:
        >>> moments = iter([0.0, 5.0])
        >>> spending = Spending(20.0, clock=lambda: next(moments))
        >>> spending.observe(2, seconds=4.0)
        >>> spending.affords()
        7
    """

    def __init__(
        self, budget: float, *, clock: Clock = time.perf_counter, pace: float | None = None
    ) -> None:
        self.budget, self.pace, self._known = budget, pace, pace or 0.0
        self._clock, self._start = clock, clock()

    @property
    def spent(self) -> float:
        """Seconds since this was made."""
        return self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds of the budget that are not gone."""
        return self.budget - self.spent

    def observe(self, trials: int, seconds: float) -> None:
        """Learn what some trials took."""
        self.pace = max(self._known, seconds / trials)

    def affords(self) -> int:
        """Trials that what is left pays for."""
        return 0 if self.pace is None else max(int(self.left / max(self.pace, SHORTEST)), 0)


@contextmanager
def kept_in(
    path: str | os.PathLike[str] | None, budget: float, clock: Clock = time.perf_counter
) -> Iterator[tuple[Path, Spending]]:
    """A directory for outcomes, and a budget that knows what a trial took there before.

    Without a path the directory is a temporary one.

    Args:
        path: a directory of earlier outcomes, or a new one.
        budget: seconds.
        clock: seconds since some moment.
    """
    if path is None:
        with tempfile.TemporaryDirectory(prefix="upweight-") as folder:
            yield Path(folder) / "truth", Spending(budget, clock=clock)
        return
    place = Path(path)
    spending = Spending(budget, clock=clock, pace=_remembered(place / PACE))
    yield place, spending
    if spending.pace is not None and place.is_dir():
        atomic_write(place / PACE, json.dumps({"seconds": spending.pace}).encode())


def _remembered(file: Path) -> float | None:
    try:
        found = float(json.loads(file.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if math.isfinite(found) and found > 0 else None
