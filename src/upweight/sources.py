"""Where rows come from: arrays in memory, or a map-style dataset read item by item."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from upweight.errors import DataError

__all__ = ["Arrays", "Items", "Source", "checksum", "leaves", "map_leaves"]

Rows = slice | Tensor


def leaves(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from leaves(value)


def map_leaves(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same nesting with a function applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_leaves(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(map_leaves(function, value) for value in tree)
    return tree


def checksum(tree: Any) -> int:
    """A number that tells the bytes of nested tensors from others."""
    value = 0
    for leaf in leaves(tree):
        flat = leaf.detach().cpu().contiguous().view(-1)
        value = zlib.crc32(flat.view(torch.uint8).numpy().data, value)
    return value


class Source(ABC):
    """Rows in a fixed order."""

    length: int

    @abstractmethod
    def fetch(self, rows: Rows) -> Any:
        """A collated batch (nested tensors) of a slice or of positions ``[b]``."""


@final
class Arrays(Source):
    """Nested tensors that share their first axis; a slice is a view, not a copy."""

    def __init__(self, tree: Any) -> None:
        sizes = [leaf.shape[0] if leaf.dim() else None for leaf in leaves(tree)]
        if not sizes or None in sizes or len(set(sizes)) > 1:
            raise DataError(
                f"Inputs and targets must have one number of rows, got {sizes}. "
                "Pass arrays whose first axis is the example."
            )
        self.tree = tree
        self.length = int(sizes[0] or 0)

    def fetch(self, rows: Rows) -> Any:
        """Rows by slicing."""
        return map_leaves(lambda leaf: leaf[rows], self.tree)


def _listed(rows: Rows, length: int) -> Sequence[int]:
    if isinstance(rows, slice):
        return range(*rows.indices(length))
    listed: list[int] = rows.tolist()
    return listed


@final
class Items(Source):
    """A map-style dataset with a collate function, checked to be the same on every reading.

    The first reading of a run of rows stores a checksum; a later one that differs is refused,
    because scores of rows that change (random augmentation, a shuffling dataset) mean nothing.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        try:
            self.length = len(dataset)
        except TypeError as error:
            raise DataError(
                f"{type(dataset).__name__} has no length. Influence needs a finite dataset in a "
                "fixed order: pass a map-style Dataset, or list(dataset) if it fits in memory."
            ) from error
        if not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"{type(dataset).__name__} cannot be read by position. Pass a map-style Dataset."
            )
        self.dataset = dataset
        self.collate = collate
        self._seen: dict[tuple[int, int], int] = {}
        for position in sorted({0, self.length // 2, self.length - 1} if self.length else ()):
            self.fetch(slice(position, position + 1))
            self.fetch(slice(position, position + 1))

    def fetch(self, rows: Rows) -> Any:
        """Rows read one by one, collated, and compared with their first reading."""
        positions = _listed(rows, self.length)
        batch = self.collate([self.dataset[i] for i in positions])
        if not isinstance(rows, slice):
            return batch
        value = checksum(batch)
        if self._seen.setdefault((positions[0], positions[-1]), value) != value:
            raise DataError(
                f"The dataset gives other values each time it is read (rows {positions[0]} to "
                f"{positions[-1]}). Switch random augmentation off and fix the order."
            )
        return batch


def to_tensor(value: Any) -> Any:
    """Arrays, series and frames as tensors; nested tuples and mappings leaf by leaf."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise DataError("Sparse tensors have no rows to slice. Pass value.to_dense().")
        return value.detach()
    if isinstance(value, Mapping):
        return {key: to_tensor(item) for key, item in value.items()}
    if isinstance(value, np.ma.MaskedArray):
        raise DataError("A masked array hides some of its values. Fill it first: array.filled().")
    if isinstance(value, np.ndarray):
        return _from_numpy(value)
    if hasattr(value, "to_numpy"):
        return _from_numpy(_plain_numbers(np.asarray(value.to_numpy())))
    if isinstance(value, (list, tuple)):
        return _from_numpy(np.asarray(value))
    raise DataError(f"Cannot read rows from {type(value).__name__}. Pass tensors or arrays.")


def _plain_numbers(array: np.ndarray) -> np.ndarray:
    """A frame's columns of mixed number types, which it hands over as objects."""
    if array.dtype != object or not all(
        isinstance(item, (bool, int, float, np.number, np.bool_)) for item in array.flat
    ):
        return array
    return array.astype(np.float64)


def _from_numpy(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"Cannot compute with values of dtype {array.dtype}. Encode text and categories as "
            "numbers first (for example one-hot columns)."
        )
    if array.dtype.kind in "iu" and array.dtype != np.uint8:
        array = array.astype(np.int64, copy=False)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)
