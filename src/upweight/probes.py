"""What a piece of work takes on this machine: seconds, and bytes of tensors at its peak."""

import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from upweight.sources import leaves

__all__ = ["Tally", "elapsed", "peak_bytes", "seconds"]

Result = TypeVar("Result")
clock = time.perf_counter


@final
class Tally(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make inside the context, on any device.

    Attributes:
        now: bytes that are alive.
        peak: the most there were at a time.

    Example:
        >>> import torch
        >>> with Tally() as tally:
        ...     x = torch.ones(4, dtype=torch.float64)
        ...     y = (x * 2).view(2, 2)
        >>> tally.peak
        64
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what is new in its outputs."""
        given = {part.untyped_storage()._cdata for part in _stored((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for part in _stored(out):
            self._count(part, given)
        return out

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _stored(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree that have memory of their own: of sparse ones, places and values."""
    for leaf in leaves(tree):
        if leaf.layout is torch.strided:
            yield leaf
        elif leaf.layout is torch.sparse_coo:
            yield from (leaf._indices(), leaf._values())


def peak_bytes(work: Callable[[], Result]) -> tuple[int, Result]:
    """The most bytes of tensors that some work made at a time, and its result."""
    with Tally() as tally:
        result = work()
    return tally.peak, result


def elapsed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Wall time of some work done once, and its result."""
    start = clock()
    result = work()
    return clock() - start, result


def seconds(work: Callable[[], object], *, repeats: int = 3) -> float:
    """Wall time of some work, the least of some after a first."""
    work()
    return min(elapsed(work)[0] for _ in range(repeats))
