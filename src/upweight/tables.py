"""A table of named columns that prints, and turns into any frame or file."""

import csv
import html
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np

from upweight.errors import StoreError
from upweight.packages import require

__all__ = ["Table", "atomic_write"]

PRINTED_ROWS = 20


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A file beside its place that is renamed when it is whole, and removed when it is not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise StoreError(
            f"Cannot write {path}: {error.strerror}. Choose another place or free some space."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file beside its place and rename it: complete or absent.

    Raises:
        StoreError: it cannot be written; nothing is left behind.
    """
    path = Path(path)
    with _beside(path) as part:
        part.write_bytes(data)
    return path


def _show(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return f"{value:+.4g}" if value else "0"
    return str(value)


@final
class Table:
    """Columns of one length, in order, with a caption that says what they mean.

    Args:
        columns: names to values ``[rows]``.
        caption: meaning, sign and unit.

    Example:
        >>> print(Table({"train": np.array([7, 2]), "score": np.array([0.5, -0.25])}, "nats"))
        nats
        train  score
            7   +0.5
            2  -0.25
    """

    def __init__(self, columns: Mapping[str, Any], caption: str = "") -> None:
        self.columns = {name: np.asarray(values) for name, values in columns.items()}
        self.caption = caption

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), np.empty(0)))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def head(self, rows: int) -> "Table":
        """The first rows."""
        return Table({name: values[:rows] for name, values in self.columns.items()}, self.caption)

    def records(self) -> list[dict[str, Any]]:
        """Rows as dicts of plain Python values."""
        values = [column.tolist() for column in self.columns.values()]
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*values, strict=True)]

    def _cells(self) -> list[list[str]]:
        shown = self.head(PRINTED_ROWS)
        return [list(map(_show, row.values())) for row in shown.records()]

    def __repr__(self) -> str:
        cells = [list(self.columns), *self._cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in cells
        ]
        more = [f"... {len(self) - PRINTED_ROWS} more"] if len(self) > PRINTED_ROWS else []
        return "\n".join(([self.caption] if self.caption else []) + lines + more)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._cells()
        )
        caption = f"<caption>{html.escape(self.caption)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def to_pandas(self) -> Any:
        """A pandas DataFrame."""
        return require("pandas", "to_pandas()").DataFrame(self.columns)

    def to_polars(self) -> Any:
        """A polars DataFrame."""
        return require("polars", "to_polars()").DataFrame(self.columns)

    def to_arrow(self) -> Any:
        """A pyarrow Table."""
        return require("pyarrow", "to_arrow()").table(self.columns)

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write a CSV file; the score's column name says what it means."""
        path = Path(path)
        with _beside(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            values = (column.tolist() for column in self.columns.values())
            writer.writerows(zip(*values, strict=True))
        return path

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Write a parquet file with the caption in its metadata."""
        table = self.to_arrow().replace_schema_metadata({"upweight": self.caption})
        parquet = require("pyarrow.parquet", "to_parquet()")
        buffer = require("pyarrow", "to_parquet()").BufferOutputStream()
        parquet.write_table(table, buffer)
        return atomic_write(path, buffer.getvalue().to_pybytes())
