"""Progress bars with an estimate of the time left, on standard error of a terminal."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm.auto import tqdm

__all__ = ["progress", "track"]

Item = TypeVar("Item")
_state: dict[str, bool | None] = {"shown": None}


def _shown() -> bool:
    if _state["shown"] is not None:
        return bool(_state["shown"])
    wish = os.environ.get("UPWEIGHT_PROGRESS")
    return sys.stderr.isatty() if wish is None else wish not in ("0", "false", "no")


@contextmanager
def progress(shown: bool) -> Iterator[None]:
    """Show or hide progress inside a ``with`` block.

    The default is to show it when standard error is a terminal; ``UPWEIGHT_PROGRESS=0`` or ``1``
    decides for a whole process.

    Example:
        >>> import upweight as uw
        >>> with uw.progress(False):
        ...     pass
    """
    before = _state["shown"]
    _state["shown"] = shown
    try:
        yield
    finally:
        _state["shown"] = before


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with a progress bar that appears when the work lasts longer than a second."""
    yield from tqdm(
        items, desc=label, total=total, disable=not _shown(), delay=1.0, leave=False, unit="batch"
    )
