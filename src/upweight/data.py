"""Examples in a fixed order, each with an id."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import narwhals.stable.v1 as nw
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from upweight.errors import DataError
from upweight.sources import Arrays, Items, Source, leaves, map_leaves, to_tensor

__all__ = ["Batch", "Data"]

LABEL_KEYS = ("labels", "label", "targets", "target", "y")


@final
@dataclass(frozen=True)
class Batch:
    """Some examples, collated.

    Attributes:
        inputs: positional inputs of the model (a tuple), or keyword inputs (a dict).
        targets: what the loss compares with; None when the data has none.
        positions: places ``[b]`` of the rows in the data.
    """

    inputs: tuple[Any, ...] | dict[str, Any]
    targets: Any
    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """The batch on a device, floating inputs and targets in the model's dtype."""

        def move(leaf: Tensor) -> Tensor:
            return leaf.to(device, dtype if leaf.is_floating_point() else None)

        def label(leaf: Tensor) -> Tensor:
            # Labels index, and −100 has no place in a byte; what is true or false stays so.
            whole = not leaf.is_floating_point() and leaf.dtype != torch.bool
            return leaf.to(device, torch.int64) if whole else move(leaf)

        return Batch(map_leaves(move, self.inputs), map_leaves(label, self.targets), self.positions)

    def part(self, rows: slice) -> "Batch":
        """Some of its rows."""
        inputs, targets = (map_leaves(lambda x: x[rows], t) for t in (self.inputs, self.targets))
        return Batch(inputs, targets, self.positions[rows])


def _split(collated: Any) -> tuple[Any, Any]:
    """Inputs and targets of a collated batch: (x, ..., y), a mapping with labels, or x alone."""
    if isinstance(collated, Mapping):
        for key in LABEL_KEYS:
            if key in collated:
                return {k: v for k, v in collated.items() if k != key}, collated[key]
        return dict(collated), dict(collated)
    if isinstance(collated, (tuple, list)):
        if len(collated) == 1:
            return (collated[0],), None
        return tuple(collated[:-1]), collated[-1]
    return (collated,), None


def _from_loader(loader: DataLoader[Any]) -> tuple[Source, int | None]:
    if isinstance(loader.dataset, IterableDataset):
        raise DataError(
            "The loader reads an IterableDataset, whose order cannot be fixed. Pass a map-style "
            "Dataset, or list(dataset) if it fits in memory."
        )
    batches: object = loader.batch_sampler
    if batches is None:
        raise DataError(
            "The loader has batch_size=None, so its dataset may hold whole batches. Pass the "
            "dataset of single examples instead."
        )
    plain = type(batches) is BatchSampler
    if not plain or not isinstance(loader.sampler, (RandomSampler, SequentialSampler)):
        sampler = loader.sampler if plain else batches
        raise DataError(
            f"The loader draws rows with {type(sampler).__name__}, so its mean is not the mean "
            "over its dataset. Pass the dataset itself, a Subset of it, or Data.of(dataset, "
            "weights=...) with the weights it samples by."
        )
    return Items(loader.dataset, loader.collate_fn), loader.batch_size


def _source(source: Any) -> tuple[Source, int | None]:
    """The rows of anything a user may pass, and the batch size it suggests."""
    if isinstance(source, DataLoader):
        return _from_loader(source)
    if type(source) is TensorDataset:
        return Arrays(tuple(source.tensors)), None
    if isinstance(source, (IterableDataset, Iterator)):
        raise DataError(
            f"{type(source).__name__} has no length and no fixed order. Pass a map-style Dataset, "
            "or list(dataset) if it fits in memory."
        )
    if isinstance(source, Dataset):
        return Items(source, default_collate), None
    if isinstance(source, (Tensor, np.ndarray)):
        return Arrays((to_tensor(source),)), None
    if isinstance(source, tuple):
        return Arrays(tuple(to_tensor(part) for part in source)), None
    if nw.dependencies.is_into_dataframe(source):
        raise DataError(
            "A frame alone does not say which column is the target. Use "
            "Data.from_frame(frame, target='...'), or pass (features, targets)."
        )
    if isinstance(source, Mapping):
        return Arrays({key: to_tensor(value) for key, value in source.items()}), None
    if isinstance(source, list) and len(source) == 2 and all(_is_array(part) for part in source):
        raise DataError(
            "A list of two arrays may mean two examples or inputs and targets. Pass a tuple "
            "(inputs, targets), or a list of single examples."
        )
    return Items(source, default_collate), None


def _ids(ids: list[Any]) -> np.ndarray:
    """Ids ``[N]``, all whole numbers or all text; never one turned into the other."""
    kinds = {"text" if isinstance(key, str) else type(key).__name__ for key in ids}
    names = np.asarray(ids)
    if names.ndim != 1 or names.dtype.kind not in "iuUS" or ("text" in kinds and len(kinds) > 1):
        raise DataError(
            f"Ids must be whole numbers or text, one per row; got {', '.join(sorted(kinds))}."
        )
    return names


def _index_ids(source: Any) -> np.ndarray | None:
    """Ids ``[N]`` from the index of pandas parts; None where there is none that names rows.

    Whole numbers or text, each once, and the same for all parts: what ``frame.drop(index=ids)``
    and ``frame.loc[ids]`` take.
    """
    parts = source.values() if isinstance(source, Mapping) else source
    indexes = [_index_of(part) for part in parts if _is_frame(part)]
    keys = [index.tolist() for index in indexes if index is not None]
    if not keys or any(other != keys[0] for other in keys[1:]) or len(set(keys[0])) < len(keys[0]):
        return None
    kinds = {type(key) for key in keys[0]}
    names = np.asarray(keys[0])
    return names if kinds in ({int}, {str}) and names.dtype.kind in "iuU" else None


def _is_frame(part: Any) -> bool:
    return nw.dependencies.is_into_dataframe(part) or nw.dependencies.is_into_series(part)


def _index_of(part: Any) -> Any:
    return nw.maybe_get_index(nw.from_native(part, eager_only=True, allow_series=True))


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0


@final
class Data:
    """Examples in a fixed order, with ids and optional weights.

    Args:
        source: rows that can be fetched by position.
        ids: one unique id per row.
        weights: weight ``[N]`` of each row in the training mean, or None.
        batch_size: rows per batch, or None for the library's choice.

    Use ``Data.of`` to build one.
    """

    def __init__(
        self,
        source: Source,
        ids: np.ndarray,
        weights: Tensor | None = None,
        *,
        batch_size: int | None = None,
    ) -> None:
        if source.length == 0:
            raise DataError("The data is empty. Pass at least one example.")
        if len(ids) != source.length:
            raise DataError(f"{len(ids)} ids for {source.length} rows. Pass one id per row.")
        self._places = {key: place for place, key in enumerate(ids.tolist())}
        if len(self._places) != len(ids):
            raise DataError("The ids repeat. Pass ids that are unique.")
        if weights is not None:
            if weights.shape != (source.length,):
                raise DataError(
                    f"Weights of shape {tuple(weights.shape)} for {source.length} rows. "
                    "Pass one weight per row."
                )
            if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
                raise DataError("Weights must be finite and not negative.")
        self.source = source
        self.ids = ids
        self.weights = weights
        self.batch_size = batch_size

    @classmethod
    def of(
        cls,
        source: Any,
        *,
        ids: Sequence[Any] | None = None,
        weights: Any = None,
        batch_size: int | None = None,
    ) -> "Data":
        """Data from a Dataset, DataLoader, tensors, arrays, or (features frame, targets).

        A DataLoader contributes its dataset, collate function and batch size; rows are read in the
        dataset's order, whatever the loader shuffles. Batches may be tuples ``(x, ..., y)`` or
        mappings with a ``labels`` entry. Ids are positions where none are given, and of pandas
        frames and series their index, if it is whole numbers or text that name each row once.

        Raises:
            DataError: empty, unsized, changing, or with ids or weights that do not match.

        Example:
            >>> data = Data.of((np.eye(3), np.array([0, 1, 2])), ids=["a", "b", "c"])
            >>> len(data), data.ids.tolist()
            (3, ['a', 'b', 'c'])
        """
        if isinstance(source, Data):
            if ids is not None or weights is not None:
                raise DataError("Data already has ids and weights. Pass the original source.")
            return source
        rows, suggested = _source(source)
        if ids is not None:
            names = _ids(list(ids))
        else:
            indexed = _index_ids(source) if isinstance(source, (tuple, Mapping)) else None
            names = np.arange(rows.length) if indexed is None else indexed
        tensor = None if weights is None else to_tensor(weights).double().cpu()
        return cls(rows, names, tensor, batch_size=batch_size or suggested)

    @classmethod
    def from_frame(cls, frame: Any, *, target: str, id: str | None = None) -> "Data":
        """Data from a pandas, polars or pyarrow frame; columns other than these two are features.

        Without an id column ids are the index of a pandas frame, as for ``of``, else positions.

        Raises:
            DataError: a column is missing or not numeric.

        Example:
            >>> import pandas as pd
            >>> frame = pd.DataFrame({"x": [0.5, 1.0], "y": [0, 1], "key": ["a", "b"]})
            >>> Data.from_frame(frame, target="y", id="key").ids.tolist()
            ['a', 'b']
        """
        table = nw.from_native(frame, eager_only=True)
        absent = [c for c in (target, id) if c is not None and c not in table.columns]
        if absent:
            raise DataError(f"The frame has no column {absent[0]!r}; it has {table.columns}.")
        features = table.drop([c for c in (target, id) if c is not None])
        text = [c for c, t in features.schema.items() if not (t.is_numeric() or t == nw.Boolean)]
        if text:
            raise DataError(f"The columns {text} are not numeric. Encode them first.")
        x = np.asarray(features.to_numpy(), dtype=np.float64)
        ids = _index_ids((frame,)) if id is None else table[id].to_numpy()
        return cls.of((x, table[target].to_numpy()), ids=None if ids is None else ids.tolist())

    def __len__(self) -> int:
        return self.source.length

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches in order."""
        for start in range(0, len(self), size):
            yield self.rows(start, min(start + size, len(self)))

    def rows(self, start: int = 0, stop: int | None = None) -> Batch:
        """The rows from start to stop (all by default) as one batch."""
        stop = len(self) if stop is None else stop
        inputs, targets = _split(self.source.fetch(slice(start, stop)))
        return Batch(inputs, targets, torch.arange(start, stop, device="cpu"))

    def at(self, positions: Tensor) -> Batch:
        """The rows at positions ``[b]``, which may repeat."""
        inputs, targets = _split(self.source.fetch(positions))
        return Batch(inputs, targets, positions)

    def positions(self, ids: Sequence[Any] | np.ndarray) -> Tensor:
        """Places of ids in the order.

        Raises:
            DataError: an id is not in the data.
        """
        keys = np.asarray(ids).reshape(-1).tolist()
        unknown = [key for key in keys if key not in self._places]
        if unknown:
            first, last = self.ids[[0, -1]].tolist()
            raise DataError(
                f"The id {unknown[0]!r} is not in the data, whose ids run from {first!r} to "
                f"{last!r}."
            )
        return torch.tensor([self._places[key] for key in keys], dtype=torch.long, device="cpu")

    def take(self, positions: Tensor) -> "Data":
        """Some rows, read into memory, with their ids and weights."""
        collated = self.source.fetch(positions)
        weights = None if self.weights is None else self.weights[positions]
        ids = self.ids[positions.numpy()]
        return Data(Arrays(collated), ids, weights, batch_size=self.batch_size)

    def relabelled(self, targets: Tensor) -> "Data":
        """The same rows in memory with other targets ``[N, ...]``.

        Raises:
            DataError: the data has no targets, or they have another shape.
        """
        inputs, old = _split(self.source.fetch(slice(0, len(self))))
        if not isinstance(old, Tensor) or old.shape != targets.shape:
            shape = tuple(old.shape) if isinstance(old, Tensor) else type(old).__name__
            raise DataError(f"New labels of shape {tuple(targets.shape)} cannot replace {shape}.")
        tree = {**inputs, "labels": targets} if isinstance(inputs, dict) else (*inputs, targets)
        return Data(Arrays(tree), self.ids, self.weights, batch_size=self.batch_size)

    def fingerprint(self) -> str:
        """Hash of all rows, ids and weights (one pass over the data)."""
        digest = hashlib.sha256()
        digest.update(repr(self.ids.tolist()).encode())
        for batch in self.batches(4096):
            for leaf in leaves((batch.inputs, batch.targets)):
                digest.update(f"{leaf.dtype}{tuple(leaf.shape[1:])}".encode())
                flat = leaf.detach().cpu().contiguous().view(-1)
                digest.update(flat.view(torch.uint8).numpy().data)
        if self.weights is not None:
            digest.update(self.weights.numpy().tobytes())
        return digest.hexdigest()[:16]
