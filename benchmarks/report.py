"""Errors of scores, the results file, and the table made from it. No torch, no task."""

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import FLOOR

__all__ = ["errors", "read", "summarise", "table", "without_paths", "write"]

HEADER = (
    "| contender | CPU s | x floor | wall s | peak MiB | error | worst query | settings |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
)


def errors(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Relative errors: Frobenius over the matrix, and the worst row's.

    Example:
        >>> errors(np.array([[1.0, 0.0], [0.0, 1.5]]), np.eye(2))["worst_query_error"]
        0.5
    """
    gap = scores.astype(np.float64) - truth
    rows = np.linalg.norm(gap, axis=1) / np.linalg.norm(truth, axis=1)
    whole = np.linalg.norm(gap) / np.linalg.norm(truth)
    return {"relative_error": _rounded(whole), "worst_query_error": _rounded(rows.max())}


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def summarise(runs: list[dict[str, Any]], scale: float = 1.0) -> dict[str, Any]:
    """Median over runs of each cost, times ``scale`` where only some queries were asked."""
    times = {
        key: round(scale * statistics.median(run[key] for run in runs), 3)
        for key in ("wall_s", "cpu_s")
    }
    peak = round(statistics.median(run["peak_mib"] for run in runs))
    return {**times, "peak_mib": peak, "runs": runs}


def without_paths(text: str) -> str:
    """A message with the folders of its paths taken out.

    Example:
        >>> without_paths("no file /data/me/x/data.npy here")
        'no file data.npy here'
    """
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)*([^\s/:'\"]+)", r"\1", text)


def read(path: Path) -> dict[str, Any]:
    """Stored results, or none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write(path: Path, results: Mapping[str, Any]) -> None:
    """The JSON and, beside it, the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(table(results))


def table(results: Mapping[str, Any]) -> str:
    """A Markdown page: what the task is, one row per contender, and on what it was measured."""
    contenders = results["contenders"]
    floor = contenders.get(FLOOR, {}).get("cpu_s")
    about = "\n".join(f"- {key}: {value}" for key, value in results["about"].items())
    rows = "\n".join(_row(name, record, floor) for name, record in contenders.items())
    parts = [
        f"# {results['title']}",
        about,
        "\n".join((*HEADER, rows)),
        "error: ‖scores − exact‖ / ‖exact‖ over the whole matrix, exact in float64; worst query: "
        "the largest of the same over one query's row. x floor: CPU seconds over those of one "
        "forward + backward pass over the training data. peak: resident memory above that before "
        "the call. ~: measured on fewer queries and scaled up. Median of the runs.",
        _machines(contenders),
        "Made by `python -m benchmarks.harness`; do not edit.",
    ]
    return "\n\n".join(parts) + "\n"


def _row(name: str, record: Mapping[str, Any], floor: float | None) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in record["settings"].items())
    said = "; ".join(part for part in (record["note"], record["dtype"], settings) if part)
    if "failed" in record:
        return f"| {name} | – | – | – | – | – | – | **failed: {record['failed']}**; {said} |"
    about = "~" if record.get("queries") else ""
    multiple = f"{record['cpu_s'] / floor:,.0f}" if floor else "–"
    cost = (f"{record['cpu_s']:,.2f}", multiple, f"{record['wall_s']:,.2f}")
    error = [
        f"{record[key]:.1e}" if key in record else "–"
        for key in ("relative_error", "worst_query_error")
    ]
    if record.get("queries"):
        said = f"measured on {record['queries']} queries; {said}"
    cells = [name, *(about + value for value in cost), f"{record['peak_mib']:,}", *error, said]
    return "| " + " | ".join(cells) + " |"


def _machines(contenders: Mapping[str, Any]) -> str:
    """Contenders with their versions, grouped by where and when they were measured."""
    groups: dict[str, list[str]] = {}
    for name, record in contenders.items():
        place = (
            f"{record['machine']['cpu']}, {record['machine']['cores']} cores, "
            f"{record['threads']} thread(s), {record['date']}, commit {record['commit']}"
        )
        groups.setdefault(place, []).append(f"{name} ({_packages(record)})")
    lines = [f"- {place}: {'; '.join(names)}" for place, names in groups.items()]
    return "Measured on\n\n" + "\n".join(lines)


def _packages(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
