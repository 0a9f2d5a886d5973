"""Where blocks of scores go: into memory, into the extremes of each query, or onto disk."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from upweight.errors import InputError
from upweight.store import open_array

__all__ = ["ExtremesSink", "MatrixSink", "Sink", "StoredSink", "widened"]


class Sink(ABC):
    """Where blocks of scores go."""

    @abstractmethod
    def write(self, start: int, block: Tensor) -> None:
        """Take the scores ``[q, b]`` of training rows start to start + b."""


def widened(values: Tensor) -> np.ndarray:
    """Values as an array; half precision, of which NumPy lacks bfloat16, in single."""
    known = values.dtype in (torch.float32, torch.float64)
    array: np.ndarray = (values if known else values.float()).cpu().numpy()
    return array


def _array_dtype(dtype: torch.dtype) -> np.dtype:
    return widened(torch.empty(0, dtype=dtype)).dtype


@final
class MatrixSink(Sink):
    """Keeps all scores in memory.

    Args:
        queries: q.
        examples: N.
        dtype: of the scores.
    """

    def __init__(self, queries: int, examples: int, dtype: torch.dtype) -> None:
        self.matrix = np.empty((queries, examples), _array_dtype(dtype))

    def write(self, start: int, block: Tensor) -> None:
        """Copy the block into its columns."""
        self.matrix[:, start : start + block.shape[1]] = widened(block)


@final
class ExtremesSink(Sink):
    """Keeps the k largest and the k smallest scores of every query: memory q·k, not q·N.

    Among equal scores the first examples stay, as in a stable sort of the whole matrix.

    Args:
        queries: q.
        k: kept on either side.

    Raises:
        InputError: k is less than 1.

    Example:
        >>> sink = ExtremesSink(1, 2)
        >>> sink.write(0, torch.tensor([[3.0, 1.0, 2.0]]))
        >>> sink.write(3, torch.tensor([[5.0, 0.0]]))
        >>> sink.largest
        (tensor([[5., 3.]]), tensor([[3, 0]]))
        >>> sink.smallest
        (tensor([[0., 1.]]), tensor([[4, 1]]))
    """

    def __init__(self, queries: int, k: int) -> None:
        if k < 1:
            raise InputError(f"k is at least 1, got {k}.")
        self.k = k
        nothing = torch.empty(queries, 0), torch.empty(queries, 0, dtype=torch.long)
        self.largest: tuple[Tensor, Tensor] = nothing
        self.smallest: tuple[Tensor, Tensor] = nothing

    def write(self, start: int, block: Tensor) -> None:
        """Merge the block with what was kept."""
        places = torch.arange(start, start + block.shape[1], device=block.device)
        self.largest = self._merged(self.largest, block, places, descending=True)
        self.smallest = self._merged(self.smallest, block, places, descending=False)

    def _merged(
        self, kept: tuple[Tensor, Tensor], block: Tensor, places: Tensor, *, descending: bool
    ) -> tuple[Tensor, Tensor]:
        values = torch.cat([kept[0].to(block), block], dim=1)
        where = torch.cat([kept[1].to(places), places.expand(len(block), -1)], dim=1)
        values, order = torch.sort(values, dim=1, descending=descending, stable=True)
        return values[:, : self.k], where.gather(1, order[:, : self.k])


@final
class StoredSink(Sink):
    """Writes scores into a memory-mapped file, and which rows are there into a mask.

    A mask that says a row is written never comes before the row itself, so a killed pass goes on
    at ``first``.

    Args:
        directory: holds ``scores.npy`` and ``written.npy``, or will.
        queries: q.
        examples: N.
        dtype: of the scores.
    """

    def __init__(
        self, directory: str | os.PathLike[str], queries: int, examples: int, dtype: torch.dtype
    ) -> None:
        place = Path(directory)
        self.matrix = open_array(place / "scores.npy", (queries, examples), _array_dtype(dtype))
        self.written = open_array(place / "written.npy", (examples,), np.dtype(bool))

    @property
    def first(self) -> int:
        """The first example without scores; N if there is none."""
        missing = np.flatnonzero(~self.written)
        return int(missing[0]) if len(missing) else len(self.written)

    def write(self, start: int, block: Tensor) -> None:
        """Write the block's columns, then say so."""
        rows = slice(start, start + block.shape[1])
        self.matrix[:, rows] = widened(block)
        self.matrix.flush()
        self.written[rows] = True
        self.written.flush()
