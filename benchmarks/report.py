"""Errors of scores, the results file, and the table made from it. No torch, no task."""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import FLOOR

__all__ = [
    "JUDGEMENTS",
    "agreement",
    "docs",
    "dump",
    "errors",
    "read",
    "summarise",
    "table",
    "without_paths",
    "write",
]

JUDGEMENTS = ("pearson", "spearman", "relative_error", "worst_query_error")
PAGES = ("lds.md", "iterations.md", "retraining.md")  # made by others, and part of the page of all
USABLE = 0.05  # residual of a reference; one that is further off judges nothing
HEADER = (
    "| contender | CPU s | x floor | wall s | peak MiB | error | worst query | settings |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
)
NETWORK_HEADER = (
    "| contender | CPU s | x floor | wall s | peak MiB | pearson | spearman | error | settings |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
)
LEGEND = (
    "error: ‖scores − exact‖ / ‖exact‖ over the whole matrix, exact in float64; worst query: "
    "the largest of the same over one query's row. x floor: CPU seconds over those of one "
    "forward + backward pass over the training data. peak: resident memory above that before "
    "the call. ~: measured on fewer queries and scaled up. Median of the runs."
)
NETWORK_LEGEND = (
    "pearson, spearman: correlation of a query's scores with the reference, the mean over the "
    "queries that have one. error: ‖scores − reference‖ / ‖reference‖ over all of these. "
    "x floor: CPU seconds over those of one forward + backward pass over training data and "
    "queries. peak: resident memory above that before the call. Median of the runs."
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


def agreement(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Correlations of each row with the truth's, averaged, and the relative error of the whole.

    Example:
        >>> agreement(np.array([[1.0, 4.0, 9.0]]), np.array([[1.0, 2.0, 3.0]]))["spearman"]
        1.0
    """
    given = scores.astype(np.float64)
    whole = np.linalg.norm(given - truth) / np.linalg.norm(truth)
    return {
        "pearson": _rounded(_correlation(given, truth)),
        "spearman": _rounded(_correlation(_ranks(given), _ranks(truth))),
        "relative_error": _rounded(whole),
    }


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's, row by row, averaged; a constant row has none and counts as 0."""
    pair = [rows - rows.mean(1, keepdims=True) for rows in (first, second)]
    size = np.linalg.norm(pair[0], axis=1) * np.linalg.norm(pair[1], axis=1)
    inner = (pair[0] * pair[1]).sum(1)
    return float(np.divide(inner, size, out=np.zeros_like(inner), where=size > 0).mean())


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks within each row; equal values share the mean of theirs."""
    rows = []
    for row in scores:
        _, place, count = np.unique(row, return_inverse=True, return_counts=True)
        last = np.cumsum(count)
        rows.append((last - (count - 1) / 2)[place])
    return np.array(rows)


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


def dump(path: Path, results: Mapping[str, Any]) -> None:
    """The JSON alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def write(path: Path, results: Mapping[str, Any]) -> None:
    """The JSON and, beside it, the table."""
    dump(path, results)
    path.with_suffix(".md").write_text(table(results))


DOCS = """# Benchmarks

What upweight costs and how exact it is, beside other libraries, on the same weights and the same
data. What is measured, and with which settings, is in `benchmarks/README.md`; `make peers` and
`make bench` measure it again.

On networks no method here is exact but for the reference: pearson and spearman say how alike the
order and the pattern of scores are, error how far their values are. A row with a high correlation
and an error near or above 1 ranks examples and does not predict changes.
"""


def docs(folder: Path, tasks: Sequence[str]) -> str:
    """The page of all tasks with results in ``folder``, one level lower than each task's own."""
    parts = [DOCS]
    for task in tasks:
        results = read(folder / f"{task}.json")
        if results:
            parts.append("#" + table(results))
    for page in PAGES:
        if (folder / page).exists():
            parts.append("#" + (folder / page).read_text().replace("\n#", "\n##"))
    return "\n".join(parts)


def table(results: Mapping[str, Any]) -> str:
    """A Markdown page: what the task is, one row per contender, and on what it was measured."""
    contenders, reference = results["contenders"], results.get("reference")
    floor = contenders.get(FLOOR, {}).get("cpu_s")
    about = "\n".join(f"- {key}: {value}" for key, value in results["about"].items())
    if reference:
        about += "\n- " + _reference(reference)
    header, measures = (NETWORK_HEADER, _correlations) if reference else (HEADER, _errors)
    rows = "\n".join(_row(name, record, floor, measures) for name, record in contenders.items())
    parts = [
        f"# {results['title']}",
        about,
        "\n".join((*header, rows)),
        NETWORK_LEGEND if reference else LEGEND,
        _machines(contenders),
        "Made by `python -m benchmarks.harness`; do not edit.",
    ]
    return "\n\n".join(parts) + "\n"


def _reference(found: Mapping[str, Any]) -> str:
    judges = "" if found["residual"] <= USABLE else " (too far off: it judges nothing yet)"
    return (
        f"reference: the first {found['queries']} queries, solved in {found['dtype']} with "
        f"{found['products']} products, relative residual {found['residual']:.1e}"
        f"{judges}"
    )


def _errors(record: Mapping[str, Any]) -> list[str]:
    """The cells of a task with exact scores."""
    keys = ("relative_error", "worst_query_error")
    return [f"{record[key]:.1e}" if key in record else "–" for key in keys]


def _correlations(record: Mapping[str, Any]) -> list[str]:
    """The cells of a network task."""
    cells = [f"{record[key]:.3f}" if key in record else "–" for key in ("pearson", "spearman")]
    return [*cells, f"{record['relative_error']:.1e}" if "relative_error" in record else "–"]


def _row(
    name: str,
    record: Mapping[str, Any],
    floor: float | None,
    measures: Callable[[Mapping[str, Any]], list[str]],
) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in record["settings"].items())
    said = "; ".join(part for part in (record["note"], record["dtype"], settings) if part)
    cells = measures(record)
    if "failed" in record:
        empty = " | ".join(["–"] * (4 + len(cells)))
        return f"| {name} | {empty} | **failed: {record['failed']}**; {said} |"
    about = "~" if record.get("queries") else ""
    multiple = f"{record['cpu_s'] / floor:,.0f}" if floor else "–"
    cost = (f"{record['cpu_s']:,.2f}", multiple, f"{record['wall_s']:,.2f}")
    if record.get("queries"):
        said = f"measured on {record['queries']} queries; {said}"
    row = [name, *(about + value for value in cost), f"{record['peak_mib']:,}", *cells, said]
    return "| " + " | ".join(row) + " |"


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
