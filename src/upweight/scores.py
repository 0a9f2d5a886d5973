"""Scores: queries x training examples, with everything needed to read them."""

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from upweight.errors import DataError, InputError, StoreError
from upweight.meaning import Meaning, from_removal
from upweight.sinks import ExtremesSink
from upweight.store import publish, read_array, read_manifest, write_array, write_manifest
from upweight.tables import Table

__all__ = ["Extremes", "Provenance", "Scores"]


@final
@dataclass(frozen=True)
class Provenance:
    """How scores came about.

    Attributes:
        method: row of the method table.
        damping: λ added to the curvature.
        removal: convention for L2 on removal.
        coverage: share of the model's parameters that the scores see.
        identity: hash of model, data and settings.
        residual: relative residual of each query's solve, ``[q]``; NaN where there is none.
        caveats: what a reader must know, such as solves accepted although they failed.
    """

    method: str
    damping: float
    removal: str
    coverage: float
    identity: str
    residual: np.ndarray
    caveats: tuple[str, ...] = ()


def _effects(values: np.ndarray, meaning: Meaning) -> dict[str, np.ndarray]:
    """The column that says what removal does; none of a baseline, which predicts no effect."""
    if not meaning.change:
        return {}
    positive, negative = {
        1: ("helpful", "harmful"),
        -1: ("harmful", "helpful"),
        0: ("raises", "lowers"),
    }[meaning.helpful]
    return {"effect": np.where(values > 0, positive, np.where(values < 0, negative, "none"))}


def ranked(query: Any, ids: np.ndarray, values: np.ndarray, meaning: Meaning) -> Table:
    """Training examples of one query, in the order given."""
    columns = {"train": ids, meaning.column: values, **_effects(values, meaning)}
    return Table(columns, f"Query {query}: {meaning.sentence()}")


def _place(known: Mapping[Any, int], key: Any, what: str) -> int:
    """Where one id is, given as a plain value or as an element of an array or a tensor."""
    several = getattr(key, "ndim", 0) > 0 or not isinstance(key, Hashable | np.ndarray)
    if several:
        raise DataError(
            f"One {what} at a time is asked for, got {type(key).__name__}. Pass an id, and loop "
            "over several."
        )
    plain = key.item() if hasattr(key, "item") else key
    if plain not in known:
        ids = list(known)
        raise DataError(f"The {what} {plain!r} is unknown; ids run from {ids[0]!r} to {ids[-1]!r}.")
    return known[plain]


def _count(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InputError(f"k is a whole number of at least 1, got {k!r}.")
    return int(k)


@final
class Scores:
    """Predicted change of each query's measure if each training example is removed.

    For a loss, positive = helpful and negative = harmful; ``meaning.sentence()`` says it for any
    measure. Values have the measure's own unit.

    Args:
        values: ``[q, N]``.
        query_ids: ``[q]``.
        train_ids: ``[N]``.
        shares: w_i / Σ w of each training example, ``[N]``.
        meaning: measure, unit and sign.
        provenance: method, damping, coverage, residuals.

    Example:
        >>> from torch import nn
        >>> import torch, upweight as uw
        >>> model = nn.Linear(2, 2)
        >>> train = (torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1]))
        >>> scores = uw.Influence(model, train, loss="cross_entropy", l2=0.1).explain(train)
        >>> scores.shape, scores.meaning.helpful
        ((6, 6), 1)
    """

    def __init__(
        self,
        values: np.ndarray,
        query_ids: np.ndarray,
        train_ids: np.ndarray,
        *,
        shares: np.ndarray,
        meaning: Meaning,
        provenance: Provenance,
    ) -> None:
        self.values = values
        self.query_ids, self.train_ids = query_ids, train_ids
        self.shares = shares
        self.meaning, self.provenance = meaning, provenance
        self._queries = {key: place for place, key in enumerate(query_ids.tolist())}
        self._train = {key: place for place, key in enumerate(train_ids.tolist())}

    @property
    def shape(self) -> tuple[int, int]:
        """(queries, training examples)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def upweight(self) -> np.ndarray:
        """I_up,loss of Koh & Liang (2017), −score / share: derivative in the example's weight."""
        return from_removal(self.values, self.shares)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values ``[q, N]``."""
        if copy is False and dtype not in (None, self.values.dtype):
            raise ValueError("A copy is needed for another dtype.")
        array: np.ndarray = np.asarray(self.values, dtype=dtype)
        return array.copy() if copy else array

    def _row(self, query: Any) -> np.ndarray:
        row: np.ndarray = self.values[_place(self._queries, query, "query")]
        return row

    def _ranked(self, query: Any, order: np.ndarray) -> Table:
        return ranked(query, self.train_ids[order], self._row(query)[order], self.meaning)

    def top(self, query: Any, k: int = 10) -> Table:
        """The k most helpful training examples of a query (the largest, if help is undefined).

        Raises:
            DataError: the query is unknown.
            InputError: k is no whole number of at least 1.
        """
        sign = self.meaning.helpful or 1
        order = np.argsort(-sign * self._row(query), kind="stable")[: _count(k)]
        return self._ranked(query, order)

    def bottom(self, query: Any, k: int = 10) -> Table:
        """The k most harmful training examples of a query (the smallest, if harm is undefined).

        Raises:
            DataError: the query is unknown.
            InputError: k is no whole number of at least 1.
        """
        sign = self.meaning.helpful or 1
        order = np.argsort(sign * self._row(query), kind="stable")[: _count(k)]
        return self._ranked(query, order)

    def for_train(self, example: Any) -> Table:
        """What removing one training example does to every query, largest first.

        Raises:
            DataError: the example is unknown.
        """
        column = self.values[:, _place(self._train, example, "training example")]
        order = np.argsort(-np.abs(column), kind="stable")
        columns = {
            "query": self.query_ids[order],
            self.meaning.column: column[order],
            **_effects(column[order], self.meaning),
        }
        return Table(columns, f"Training example {example}: {self.meaning.sentence()}")

    def group(self, examples: Sequence[Any]) -> np.ndarray:
        """Predicted change ``[q]`` if all these examples are removed: the sum of their scores.

        First order: examples that stand in for each other make the true change larger;
        ``Influence.group_effects`` has the second order.

        Raises:
            DataError: an example is unknown, or named twice.
        """
        chosen = [_place(self._train, key, "training example") for key in examples]
        if len(set(chosen)) < len(chosen):
            raise DataError("An example is named twice in the group. Name each once.")
        total: np.ndarray = self.values[:, chosen].sum(1)
        return total

    def table(self) -> Table:
        """All scores in long form: query, train, score."""
        q, n = self.shape
        columns = {
            "query": np.repeat(self.query_ids, n),
            "train": np.tile(self.train_ids, q),
            self.meaning.column: self.values.ravel(),
        }
        return Table(columns, self.meaning.sentence())

    def to_pandas(self) -> Any:
        """A pandas DataFrame in long form."""
        return self.table().to_pandas()

    def to_polars(self) -> Any:
        """A polars DataFrame in long form."""
        return self.table().to_polars()

    def to_arrow(self) -> Any:
        """A pyarrow Table in long form."""
        return self.table().to_arrow()

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """A CSV file in long form."""
        return self.table().to_csv(path)

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """A parquet file in long form."""
        return self.table().to_parquet(path)

    def summary(self) -> dict[str, Any]:
        """What the manifest, the page and the repr say of these scores."""
        made = self.provenance
        known = np.isfinite(made.residual)
        worst = float(made.residual[known].max()) if known.any() else None
        return {
            "method": made.method,
            "damping": made.damping,
            "removal": made.removal,
            "coverage": made.coverage,
            "identity": made.identity,
            "caveats": list(made.caveats),
            "meaning": asdict(self.meaning),
            "sentence": self.meaning.sentence(),
            "queries": self.shape[0],
            "examples": self.shape[1],
            "worst_residual": worst,
        }

    def save(self, path: str | os.PathLike[str], *, replace: bool = False) -> Path:
        """Write a run directory: manifest.json and .npy arrays, complete or absent.

        Raises:
            StoreError: the place belongs to another run or cannot be written.
        """
        with publish(path, self.provenance.identity, replace=replace) as part:
            self.write_into(part)
            write_manifest(part, {"kind": "scores", **self.summary()})
        return Path(path)

    def write_into(self, directory: Path) -> None:
        """Write the arrays of a run directory."""
        write_array(directory / "scores.npy", self.values)
        self.write_beside(directory)

    def write_beside(self, directory: Path) -> None:
        """Write what belongs to the scores, which are there already."""
        write_array(directory / "query_ids.npy", self.query_ids)
        write_array(directory / "train_ids.npy", self.train_ids)
        write_array(directory / "shares.npy", self.shares)
        write_array(directory / "residual.npy", self.provenance.residual)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Read a run directory; the values are memory-mapped.

        Raises:
            StoreError: absent, damaged, or of another schema.
        """
        place, manifest = Path(path), read_manifest(path)
        try:
            return cls._of(place, manifest)
        except (KeyError, TypeError) as error:
            raise StoreError(f"{place} lacks {error} in its manifest. Run again.") from error

    @classmethod
    def _of(cls, place: Path, manifest: dict[str, Any]) -> "Scores":
        provenance = Provenance(
            manifest["method"],
            manifest["damping"],
            manifest["removal"],
            manifest["coverage"],
            manifest["identity"],
            read_array(place / "residual.npy", mapped=False),
            tuple(manifest["caveats"]),
        )
        return cls(
            read_array(place / "scores.npy"),
            read_array(place / "query_ids.npy", mapped=False),
            read_array(place / "train_ids.npy", mapped=False),
            shares=read_array(place / "shares.npy", mapped=False),
            meaning=Meaning(**manifest["meaning"]),
            provenance=provenance,
        )

    def __repr__(self) -> str:
        says = self.summary()
        residual = says["worst_residual"]
        solved = "no solve" if residual is None else f"residual ≤ {residual:.1e}"
        lines = [
            f"Scores: {self.shape[0]} queries x {self.shape[1]} training examples",
            f"  {self.meaning.sentence()}",
            f"  method {says['method']}, damping {says['damping']:g}, {solved}, "
            f"coverage {says['coverage']:.1%} of parameters, L2 by the {says['removal']}",
        ]
        return "\n".join(lines + [f"  caveat: {text}" for text in says["caveats"]])

    def _repr_html_(self) -> str:
        shown = "".join(
            self.top(query, 5)._repr_html_() + self.bottom(query, 5)._repr_html_()
            for query in self.query_ids[:3].tolist()
        )
        return f"<pre>{self!r}</pre>{shown}"


@final
@dataclass(frozen=True)
class Extremes:
    """The scores of each query that are farthest from 0 on either side.

    Attributes:
        query_ids: ``[q]``.
        largest: the k largest scores, descending, ``[q, k]``.
        largest_ids: of their training examples, ``[q, k]``.
        smallest: the k smallest, ascending, ``[q, k]``.
        smallest_ids: of their training examples, ``[q, k]``.
        meaning: measure, unit and sign.
        provenance: method, damping, coverage, residuals.
    """

    query_ids: np.ndarray
    largest: np.ndarray
    largest_ids: np.ndarray
    smallest: np.ndarray
    smallest_ids: np.ndarray
    meaning: Meaning
    provenance: Provenance

    @classmethod
    def of(
        cls,
        sink: ExtremesSink,
        ids: tuple[np.ndarray, np.ndarray],
        *,
        meaning: Meaning,
        provenance: Provenance,
    ) -> "Extremes":
        """What a sink kept.

        Args:
            sink: through which all scores went.
            ids: of queries ``[q]`` and training examples ``[N]``.
            meaning: measure, unit and sign.
            provenance: how the scores came about.
        """
        (largest, first), (smallest, last) = sink.largest, sink.smallest
        return cls(
            query_ids=ids[0],
            largest=largest.cpu().double().numpy(),
            largest_ids=ids[1][first.cpu().numpy()],
            smallest=smallest.cpu().double().numpy(),
            smallest_ids=ids[1][last.cpu().numpy()],
            meaning=meaning,
            provenance=provenance,
        )

    def _side(self, query: Any, *, large: bool) -> Table:
        known = {key: place for place, key in enumerate(self.query_ids.tolist())}
        place = _place(known, query, "query")
        values, ids = (
            (self.largest, self.largest_ids) if large else (self.smallest, self.smallest_ids)
        )
        return ranked(query, ids[place], values[place], self.meaning)

    def top(self, query: Any) -> Table:
        """The most helpful training examples of a query (the largest, if help is undefined).

        Raises:
            DataError: the query is unknown.
        """
        return self._side(query, large=(self.meaning.helpful or 1) > 0)

    def bottom(self, query: Any) -> Table:
        """The most harmful training examples of a query (the smallest, if harm is undefined).

        Raises:
            DataError: the query is unknown.
        """
        return self._side(query, large=(self.meaning.helpful or 1) < 0)
