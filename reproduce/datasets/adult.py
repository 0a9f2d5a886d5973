"""UCI Adult (census income, data set 2): who earns more than 50,000 dollars, in its own split."""

import csv
import gzip
import io
from dataclasses import dataclass

import numpy as np

from reproduce.datasets.files import content, folder

__all__ = ["Adult", "adult"]

SOURCE = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/"
FILES = {
    "adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
    "adult.test": "72567b94f5c1a6f8501377dd80f93892c3848ff071cf91ba47e00b0785a28074",
}
GZIP, COMMENT = b"\x1f\x8b", b"|"
COLUMNS = (
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation",
    "relationship", "race", "sex", "capital-gain", "capital-loss", "hours-per-week",
    "native-country", "income",
)  # fmt: skip
NUMBERS = ("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week")
LONG_TAILED = ("capital-gain", "capital-loss")


@dataclass(frozen=True)
class Adult:
    """Features as rows ``[n, 109]`` (float64), labels ``[n]`` (1: more than 50,000), and names.

    Numbers have mean 0 and variance 1 over the training rows, after log(1 + x) where the tail is
    long; every level of a category is a column, "?" included; the last column is 1.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    names: tuple[str, ...]


def _text(packed: bytes) -> bytes:
    """The rows, packed or not; UCI's test file begins with a comment, which copies may lack."""
    raw = gzip.decompress(packed) if packed.startswith(GZIP) else packed
    return raw.split(b"\n", 1)[1] if raw.startswith(COMMENT) else raw


def _columns(raw: bytes) -> dict[str, np.ndarray]:
    rows = [row for row in csv.reader(io.StringIO(raw.decode()), skipinitialspace=True) if row]
    return {
        name: np.array(values)
        for name, values in zip(COLUMNS, zip(*rows, strict=True), strict=True)
    }


def _numbers(name: str, columns: dict[str, np.ndarray]) -> np.ndarray:
    values = columns[name].astype(float)
    return np.log1p(values) if name in LONG_TAILED else values


def adult() -> Adult:
    """32,561 people for training and 16,281 for testing.

    Raises:
        DataError: a file is truncated or has another content.
    """
    place = folder("tabular")
    train, test = (
        _columns(content(place / f"{name}.gz", SOURCE + name, total, _text))
        for name, total in FILES.items()
    )
    names: list[str] = []
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for name in COLUMNS[:-1]:
        if name in NUMBERS:
            names.append(name)
            known = _numbers(name, train)
            for part, columns in zip(parts, (train, test), strict=True):
                part.append((_numbers(name, columns) - known.mean()) / known.std())
            continue
        for level in np.unique(train[name]).tolist():
            names.append(f"{name} = {level}")
            for part, columns in zip(parts, (train, test), strict=True):
                part.append((columns[name] == level).astype(float))
    x = [np.stack([*part, np.ones(len(part[0]))], axis=1) for part in parts]
    y = [np.char.startswith(columns["income"], ">").astype(np.int64) for columns in (train, test)]
    return Adult(x[0], y[0], x[1], y[1], (*names, "constant"))
