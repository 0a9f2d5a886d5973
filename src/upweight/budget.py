"""How much memory work may take, and smaller steps where there is less than that."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from upweight.errors import InputError, ResourceError

__all__ = ["budget", "in_steps", "memory"]

Result = TypeVar("Result")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
DEFAULT = 2**30
_state = {"bytes": DEFAULT}


def budget() -> int:
    """Bytes that work may take beside the model and the data."""
    return _state["bytes"]


def _bytes(amount: int | str) -> int:
    """An amount such as 2**30 or "1.5 GiB" in bytes."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)i?B?\s*", str(amount), re.IGNORECASE)
    try:
        size = float(found[1]) * UNITS[found[2].upper()] if found else 0.0
    except ValueError:
        size = 0.0
    if not size >= 2**20:
        raise InputError(
            f"memory takes at least 1 MiB, as bytes or as text like '2 GiB', got {amount!r}."
        )
    return int(size)


@contextmanager
def memory(amount: int | str) -> Iterator[None]:
    """Bound the memory of batches and of what is kept, inside a ``with`` block (1 GiB before).

    Batches, kept gradients and pieces of products are chosen to stay within it; the model, the
    data, the result and the curvature itself come on top.

    Raises:
        InputError: not an amount.

    Example:
        >>> import upweight as uw
        >>> with uw.memory("512 MiB"):
        ...     pass
    """
    before = _state["bytes"]
    _state["bytes"] = _bytes(amount)
    try:
        yield
    finally:
        _state["bytes"] = before


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def in_steps(count: int, size: int, work: Callable[[int, int], Result]) -> Iterator[Result]:
    """Results of work on rows start to stop, in order; where memory runs out, in halves from there.

    Work that fails must have changed nothing: it is asked again for fewer rows.

    Args:
        count: rows in all.
        size: of a step.
        work: (start, stop) -> result.

    Raises:
        ResourceError: a single row does not fit.

    Example:
        >>> list(in_steps(5, 2, lambda start, stop: stop - start))
        [2, 2, 1]
    """
    start = 0
    while start < count:
        stop = min(start + size, count)
        try:
            result = work(start, stop)
        except (MemoryError, RuntimeError) as error:
            if not exhausted(error):
                raise
            if stop - start == 1:
                raise ResourceError(
                    f"Memory ran out on a single example (row {start}): {error} Choose fewer "
                    "parameters (parameters=...), fewer queries at a time, or a larger machine."
                ) from error
            size = (stop - start) // 2
            _release()
            continue
        yield result
        start = stop


def _release() -> None:
    """Give cached blocks back, so that halves find room."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
