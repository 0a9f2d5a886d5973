"""What commands print: lines with the elapsed time, tables, and one red line for an error."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import final

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Clock", "complain", "say", "table"]


def complain(message: str) -> None:
    """One red line on standard error."""
    line = " ".join(message.split())
    Console(stderr=True).print(
        f"upweight: {line}", style="red", markup=False, highlight=False, soft_wrap=True
    )


def say(message: str = "") -> None:
    """One line on standard output, as it is."""
    Console().print(message, markup=False, highlight=False, soft_wrap=True)
    sys.stdout.flush()


def table(
    title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, ruled: bool = False
) -> None:
    """A title and a table whose cells wrap; brackets in cells are text, not rich's markup.

    Args:
        title: above it.
        heads: of the columns.
        rows: their cells.
        ruled: whether lines part the rows, where cells are long.
    """
    say(title)
    shown = Table(show_lines=ruled)
    for head in heads:
        shown.add_column(head, overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    Console().print(shown)


@final
class Clock:
    """Prints what begins, after the seconds since the clock was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Elapsed seconds."""
        return time.perf_counter() - self.start

    def say(self, message: str) -> None:
        """A line with the elapsed time before it."""
        say(f"{self.seconds:6.1f} s  {message}")
