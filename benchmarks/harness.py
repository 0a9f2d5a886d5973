"""Run the contenders of a task, each in a process of its own, and keep what they cost.

    python -m benchmarks.harness TASK [--only NAME ...] [--threads 1] [--memory-gib 12]

Results of contenders that are not run again stay in the file; their scores, where they are still in
scratch, are compared anew with the truth. ``--only`` without a name does nothing but that.
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
    truth, scores = module.truth(scratch(task)), np.load(scratch(task) / f"{name}.npy")
    both = min(len(scores), len(truth))
    judge = report.agreement if hasattr(module, "convergence") else report.errors
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
    known = report.read(path).get("contenders", {})
    for row, record in known.items():
        if "failed" not in record and (scratch(name) / f"{row}.npy").exists():
            record |= judged(name, row)  # the reference may have converged further since
    for contender in wanted:
        print(f"{contender.name}: ", end="", flush=True)
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


def main() -> None:
    """Prepare the task, run, and print the table."""
    parser = argparse.ArgumentParser(description="Run the contenders of a benchmark task.")
    parser.add_argument("task", choices=CONTENDERS)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these contenders (or none)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-gib", type=float, default=12.0, help="limit of each process")
    given = parser.parse_args()
    task = importlib.import_module(f"benchmarks.{given.task}")
    asked = [row.name for row in CONTENDERS[given.task]] if given.only is None else given.only
    wanted = [find(given.task, name) for name in asked]
    task.prepare(scratch(given.task))
    update(task, given.task, wanted, (given.threads, given.memory_gib))
    print((RESULTS / f"{given.task}.md").read_text())


if __name__ == "__main__":
    main()
