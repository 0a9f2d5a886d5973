"""Run one contender once, in this process, and write what it cost and what it answered.

    python -m benchmarks.measure TASK CONTENDER SCRATCH

Started by the harness, with the interpreter of the contender's own environment. Imports, reading
the data and converting it to the contender's dtype are not timed; everything from the given tensors
to the scores is.
"""

import contextlib
import importlib
import importlib.metadata
import inspect
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contenders import Contender, find

MIB, GIB = 2**20, 2**30


def _memory(field: str) -> int | None:
    """A field of this process's status in bytes, where the system has one (Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = [line for line in status.read_text().splitlines() if line.startswith(field)]
    return int(lines[0].split()[1]) * 1024 if lines else None


def _reset_peak() -> int:
    """Forget the peak so far, and say what is resident now.

    getrusage's peak alone would hide anything below the peak of the imports, and begins with the
    size of the parent process.
    """
    resident = _memory("VmRSS")
    if resident is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident


def _peak() -> int:
    peak = _memory("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions, Python's first."""
    known = {"python": sys.version.split()[0]}
    return known | {name: importlib.metadata.version(name) for name in packages}


class Clock:
    """Wall and CPU seconds, and memory, since a contender's call began or since it said so."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """What was done until now is not counted."""
        self._resident = _reset_peak()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """The costs so far."""
        return {
            "wall_s": round(time.perf_counter() - self._wall, 4),
            "cpu_s": round(time.process_time() - self._cpu, 4),
            "peak_mib": round((_peak() - self._resident) / MIB, 1),
        }


def measure(contender: Contender, problem: Any) -> tuple[dict[str, Any], np.ndarray | None]:
    """Cost of one run, and its scores."""
    module = importlib.import_module(f"benchmarks.contenders.{contender.module}")
    asked = problem if contender.queries is None else problem.first(contender.queries)
    asked = asked if contender.epoch is None else asked.at(contender.epoch)
    asked = asked.to(getattr(torch, contender.dtype))
    # A contender that measures a part of what it does takes the clock.
    takes = "clock" in inspect.signature(module.run).parameters
    clock = Clock()
    scores = module.run(asked, **contender.settings, **({"clock": clock} if takes else {}))
    cost = clock.read()
    return cost, None if scores is None else np.asarray(scores)


def main(task: str, name: str, scratch: str, threads: str, gib: str) -> None:
    """Measure and write ``NAME.json`` and ``NAME.npy`` into scratch."""
    torch.set_num_threads(int(threads))
    limit = int(float(gib) * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    contender, folder = find(task, name), Path(scratch)
    problem = importlib.import_module(f"benchmarks.{task}").load(folder)
    cost, scores = measure(contender, problem)
    cost["versions"] = versions(contender.packages)
    if scores is not None:
        np.save(folder / f"{name}.npy", scores)
    (folder / f"{name}.json").write_text(json.dumps(cost))


if __name__ == "__main__":
    main(*sys.argv[1:])
