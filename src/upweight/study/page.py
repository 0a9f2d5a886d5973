"""What a study leaves for the page: versions, the file itself, and evidence as plain values."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upweight import __version__
from upweight.answers import Validation
from upweight.evidence import Evidence
from upweight.report import render
from upweight.tables import atomic_write

__all__ = ["removals", "retrained", "versions", "write_page"]

MOST_POINTS = 3000


def write_page(directory: Path, content: Mapping[str, Any]) -> Path:
    """Write ``report.html`` of a summary."""
    return atomic_write(directory / "report.html", render(content).encode())


def versions() -> dict[str, str]:
    """What made the numbers."""
    return {
        "upweight": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def removals(proof: Validation) -> dict[str, Any]:
    """Agreement and points of a validation, one point per query and removal."""
    kinds = {"x": "predicted", "y": "actual", "kind": "chosen", "query": "query"}
    table = proof.table()
    columns = [table[column].tolist() for column in (*kinds.values(), "removed")]
    return {
        "agreements": [{"name": n, **found.as_dict()} for n, found in proof.agreements.items()],
        "points": [
            dict(zip((*kinds, "removed"), row, strict=True)) for row in zip(*columns, strict=True)
        ],
        "truth": proof.truth,
    }


def retrained(found: Evidence) -> dict[str, Any]:
    """Evidence from a budget, with its points in the same form, of very many every k-th."""
    says, points = found.as_dict(), found.points
    known = np.argwhere(np.isfinite(points.predicted) & np.isfinite(points.actual))
    shown = known[:: max(-(-len(known) // MOST_POINTS), 1)]
    query, trial = shown[:, 0], shown[:, 1]
    columns = {
        "x": points.predicted[query, trial],
        "y": points.actual[query, trial],
        "kind": points.kinds[trial],
        "query": points.query_ids[query],
        "removed": points.removed[trial],
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    kept = ("verdict", "statistic", "findings", "truth", "cost", "notes")
    return {
        **{name: says[name] for name in kept},
        "unit": found.meaning.unit,
        "points": [dict(zip(columns, row, strict=True)) for row in rows],
        "pairs": len(known),
    }
