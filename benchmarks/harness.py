"""Run the contenders of tasks, each in a process of its own, and keep what they cost.

    python -m benchmarks.harness [TASK ...] [--resume] [--only NAME ...] [--threads 1]

All tasks by default. Every result is stored as soon as it is there, so that a run may be stopped;
``--resume`` then leaves out what the same commit has measured. Results of contenders that are not
run again stay in the file; their scores, where they are still in scratch, are compared anew with
the truth. ``--only`` without a name does nothing but that. Contenders without their environment are
named and left as they are.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.contenders import CONTENDERS, Contender, find
from benchmarks.datasets import scratch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
DOCS = ROOT / "docs" / "benchmarks.md"


def interpreter(contender: Contender) -> str:
    """Python of the contender's environment.

    Raises:
        FileNotFoundError: the environment is not there.
    """
    if not contender.environment:
        return sys.executable
    python = ROOT / ".venv-peers" / contender.environment / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(
            f"environment missing: run benchmarks/setup_peers.sh {contender.environment}"
        )
    return str(python)


def run_once(task: str, contender: Contender, threads: int, gib: float) -> dict[str, Any]:
    """One measured process; what it cost, or ``{"failed": reason}``."""
    folder = scratch(task)
    for ending in ("json", "npy"):
        (folder / f"{contender.name}.{ending}").unlink(missing_ok=True)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **{name: str(threads) for name in names}}
    environment["UPWEIGHT_PROGRESS"] = "0"
    try:
        command = [interpreter(contender), "-m", "benchmarks.measure", task, contender.name]
        done = subprocess.run(
            [*command, str(folder), str(threads), str(gib)],
            cwd=ROOT,
            env=environment,
            timeout=contender.limit_s,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {contender.limit_s:,.0f} s"}
    except FileNotFoundError as error:
        return {"failed": str(error)}
    written = folder / f"{contender.name}.json"
    if done.returncode == 0 and written.exists():
        cost: dict[str, Any] = json.loads(written.read_text())
        return cost
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return {"failed": report.without_paths(said[-1])[:300]}


def run_contender(task: str, contender: Contender, threads: int, gib: float) -> dict[str, Any]:
    """All its runs, its errors, and where and when."""
    record: dict[str, Any] = {
        "note": contender.note,
        "settings": dict(contender.settings),
        "dtype": contender.dtype,
        "threads": threads,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "machine": machine(),
        "load": [round(x, 2) for x in os.getloadavg()],
    }
    runs = []
    for _ in range(contender.repeats):
        cost = run_once(task, contender, threads, gib)
        if "failed" in cost:
            return record | cost
        record["versions"] = cost.pop("versions")
        runs.append(cost)
    return record | _outcome(task, contender, runs)


def _outcome(task: str, contender: Contender, runs: list[dict[str, Any]]) -> dict[str, Any]:
    written = scratch(task) / f"{contender.name}.npy"
    if not written.exists():
        return report.summarise(runs)
    module, scores = importlib.import_module(f"benchmarks.{task}"), np.load(written)
    outcome = report.summarise(runs, scale=module.ABOUT["queries"] / len(scores))
    if contender.queries:
        outcome["queries"] = len(scores)
    return outcome | judged(task, contender.name)


def judged(task: str, name: str) -> dict[str, float]:
    """A contender's scores in scratch against the truth; a network's is of its first queries."""
    module = importlib.import_module(f"benchmarks.{task}")
    reference = module.convergence(scratch(task)) if hasattr(module, "convergence") else None
    if reference is not None and reference.get("residual", np.inf) > report.USABLE:
        return {}
    truth, scores = module.truth(scratch(task)), np.load(scratch(task) / f"{name}.npy")
    both = min(len(scores), len(truth))
    judge = report.agreement if reference else report.errors
    return judge(scores[:both], truth[:both])


def _commit() -> str:
    """The commit, marked dirty by changes of anything but the results that are being written."""
    wanted = (["describe", "--always"], ["status", "--porcelain", "--", ":!benchmarks/results"])
    try:
        head, changed = (
            subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in wanted
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def machine() -> dict[str, Any]:
    """Processor, cores and system, without names or paths."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = lines[0].split(":")[1].strip() if lines else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system()}


def update(task: ModuleType, name: str, wanted: list[Contender], limits: tuple[int, float]) -> None:
    """Run the wanted contenders and store each as soon as it is done; judge the others again."""
    path = RESULTS / f"{name}.json"
    stored = report.read(path)
    known = stored.get("contenders", {})
    now = task.convergence(scratch(name)) if hasattr(task, "convergence") else None
    for row, record in known.items():
        scored = "failed" not in record and (scratch(name) / f"{row}.npy").exists()
        if scored or now != stored.get("reference"):  # judged by another, as far as it was
            for key in report.JUDGEMENTS:
                record.pop(key, None)
        if scored:
            record |= judged(name, row)
    for contender in wanted:
        print(f"{contender.name}: ", end="", flush=True)
        try:
            interpreter(contender)
        except FileNotFoundError as error:
            print(f"left out, {error}", flush=True)
            continue
        record = run_contender(name, contender, *limits)
        print(record.get("failed") or f"{record['cpu_s']} CPU s", flush=True)
        known[contender.name] = record
        _store(task, name, known)
    _store(task, name, known)


def _store(task: ModuleType, name: str, known: dict[str, Any]) -> None:
    """The results in the order of the contenders' list, and the table."""
    kept = {row.name: known[row.name] for row in CONTENDERS[name] if row.name in known}
    about: dict[str, Any] = {"task": name, "title": task.TITLE, "about": task.ABOUT}
    if hasattr(task, "convergence"):
        about["reference"] = task.convergence(scratch(name))
    report.write(RESULTS / f"{name}.json", {**about, "contenders": kept})


def done(record: dict[str, Any]) -> bool:
    """Whether a stored result is of the present commit, without changes, and no failure."""
    commit = _commit()
    return (
        commit != "unknown"
        and not commit.endswith("-dirty")
        and ("failed" not in record and record["commit"] == commit)
    )


def write_docs() -> None:
    """The page of all results, in the documentation."""
    DOCS.write_text(report.docs(RESULTS, tuple(CONTENDERS)))


def main() -> None:
    """Prepare every task, run, and print the table."""
    parser = argparse.ArgumentParser(description="Run the contenders of benchmark tasks.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these contenders (or none)")
    parser.add_argument("--resume", action="store_true", help="not what this commit has measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-gib", type=float, default=12.0, help="limit of each process")
    given = parser.parse_args()
    unknown = set(given.tasks) - set(CONTENDERS)
    if unknown:
        parser.error(f"no task {', '.join(sorted(unknown))}; known: {', '.join(CONTENDERS)}")
    for name in given.tasks or CONTENDERS:
        asked = [row.name for row in CONTENDERS[name]] if given.only is None else given.only
        if given.resume:
            known = report.read(RESULTS / f"{name}.json").get("contenders", {})
            asked = [row for row in asked if row not in known or not done(known[row])]
        wanted = [find(name, row) for row in asked]
        task = importlib.import_module(f"benchmarks.{name}")
        print(f"== {name}", flush=True)
        task.prepare(scratch(name))
        update(task, name, wanted, (given.threads, given.memory_gib))
        print((RESULTS / f"{name}.md").read_text())
    write_docs()


if __name__ == "__main__":
    main()
