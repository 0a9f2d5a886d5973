"""Diabetes 130-US hospitals, 1999-2008 (UCI data set 296), in the features and the split of 2017."""

import csv
import io
import zipfile
from dataclasses import dataclass

import numpy as np

from reproduce.datasets.files import content, folder

__all__ = ["CHILD", "Hospital", "hospital"]

SOURCE = (
    "https://archive.ics.uci.edu/static/public/296/"
    "diabetes+130-us+hospitals+for+years+1999-2008.zip"
)
MEMBER = "diabetic_data.csv"
SHA256 = "0689e7ec031237dc63031b938805c48377748761a3b26acab621567afa24df97"
CHILD = "age_[0-10)"
SEED, PER_CLASS = 2, 10_000

NUMBERS = (
    "time_in_hospital", "num_lab_procedures", "num_procedures", "num_medications",
    "number_outpatient", "number_emergency", "number_inpatient", "number_diagnoses",
)  # fmt: skip
DRUGS = (
    "metformin", "repaglinide", "nateglinide", "chlorpropamide", "glimepiride", "acetohexamide",
    "glipizide", "glyburide", "tolbutamide", "pioglitazone", "rosiglitazone", "acarbose",
    "miglitol", "troglitazone", "tolazamide", "examide", "citoglipton", "insulin",
    "glyburide-metformin", "glipizide-metformin", "glimepiride-pioglitazone",
    "metformin-rosiglitazone", "metformin-pioglitazone",
)  # fmt: skip
CATEGORIES = (
    "gender", "race", "age", "discharge_disposition_id", "max_glu_serum", "A1Cresult", *DRUGS,
    "change", "diabetesMed",
)  # fmt: skip


@dataclass(frozen=True)
class Hospital:
    """Unscaled features as rows ``[n, 127]`` (float64), labels ``[n]``, and the features' names.

    A label is 1 for a patient readmitted within 30 days and 0 for all others.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    names: tuple[str, ...]

    @property
    def child(self) -> int:
        """The column that says the patient is younger than ten."""
        return self.names.index(CHILD)


def _table(packed: bytes) -> bytes:
    """The table of an archive, in whatever folder it lies: archives of it differ."""
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        for name in archive.namelist():
            if name.rsplit("/", 1)[-1] == MEMBER:
                return archive.read(name)
    raise zipfile.BadZipFile(f"it holds no {MEMBER}")


def _levels(values: list[str]) -> list[str]:
    """The distinct values, numbers in the order of numbers."""
    found = set(values)
    return sorted(found, key=int) if all(v.isdigit() for v in found) else sorted(found)


def _features(columns: dict[str, list[str]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers as they are, then one column per level; two levels need only the second."""
    names = list(NUMBERS)
    parts = [np.array(columns[name], dtype=float) for name in NUMBERS]
    for name in CATEGORIES:
        values, levels = np.array(columns[name]), _levels(columns[name])
        for level in levels[1:] if len(levels) == 2 else levels:
            names.append(f"{name}_{level}")
            parts.append((values == level).astype(float))
    return np.stack(parts, axis=1), tuple(names)


def _split(readmitted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows for training, 10,000 of each class, and all others, as the code of 2017 drew them."""
    draw = np.random.RandomState(SEED)
    classes = [np.flatnonzero(readmitted), np.flatnonzero(~readmitted)]
    for rows in classes:
        draw.shuffle(rows)
    train, test = (np.concatenate([rows[cut] for rows in classes])
                   for cut in (slice(PER_CLASS), slice(PER_CLASS, None)))  # fmt: skip
    draw.shuffle(train)
    draw.shuffle(test)
    return train, test


def hospital() -> Hospital:
    """20,000 patients for training, half of them readmitted, and 81,766 for testing.

    "None" is a value of this table, not a missing one: read as missing, two features would be
    lost.

    Raises:
        DataError: the file is truncated or has another content.
    """
    place = folder("diabetes") / "dataset_diabetes.zip"
    raw = content(place, SOURCE, SHA256, _table)
    head, *rows = csv.reader(io.StringIO(raw.decode(), newline=""))
    columns = {name: [row[i] for row in rows] for i, name in enumerate(head)}
    x, names = _features(columns)
    readmitted = np.array(columns["readmitted"]) == "<30"
    train, test = _split(readmitted)
    y = readmitted.astype(np.int64)
    return Hospital(x[train], y[train], x[test], y[test], names)
