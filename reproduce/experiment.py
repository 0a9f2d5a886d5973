"""What an experiment is: settings, a run of resumable steps, findings, and claims to check."""

import argparse
import hashlib
import inspect
import io
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure

import upweight as uw
from upweight.tables import atomic_write

__all__ = ["RESULTS", "Claim", "Experiment", "Findings", "Steps", "conduct", "main"]

RESULTS = Path(__file__).parent / "results"
Verdict = Literal["met", "surpassed", "missed"]
TOOK = "seconds of this step"


@dataclass(frozen=True)
class Claim:
    """One line of the table: what the paper found, what was found here.

    Attributes:
        what: the quantity, in words.
        paper: the paper's value or target.
        ours: the measured value.
        verdict: "met", "surpassed" (better than the paper, or beyond it) or "missed".
        note: why, where it was missed.
    """

    what: str
    paper: str
    ours: str
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True)
class Findings:
    """What a run found.

    Attributes:
        values: measured numbers, as JSON takes them (arrays are stored as lists).
        claims: lines of the table.
        notes: paragraphs for the page, with the measured numbers in them.
        figure: like the paper's.
    """

    values: dict[str, Any]
    claims: list[Claim]
    notes: list[str]
    figure: Figure


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    Attributes:
        name: of the module and of its files.
        where: in the paper.
        title: in words.
        settings: a frozen dataclass of everything that can be turned.
        run: (settings, steps) -> findings.
    """

    name: str
    where: str
    title: str
    settings: Any
    run: Callable[[Any, "Steps"], Findings]


@dataclass(frozen=True)
class Clock:
    """Runs from when it is made."""

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)

    def read(self) -> tuple[float, float]:
        """Seconds since then: on the wall, and of all processors."""
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


@dataclass(frozen=True)
class Steps:
    """Results of finished steps on disk, so that a killed run goes on where it was.

    A step is named by the caller; the folder is named by a hash of settings and code, so that
    nothing stale is ever read. Without a folder nothing is kept. The time of steps that an earlier
    run finished is remembered with them.
    """

    folder: Path | None = None
    before: list[tuple[float, float]] = field(default_factory=list)

    def once(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The arrays of a step: read if it was finished, else made and kept."""
        if self.folder is None:
            return {key: np.asarray(value) for key, value in make().items()}
        path, clock = self.folder / f"{name}.npz", Clock()
        if path.exists():
            with np.load(path, allow_pickle=False) as stored:
                arrays = dict(stored)
            wall, cpu = arrays.pop(TOOK)
            self.before.append((float(wall), float(cpu)))
            return arrays
        arrays = {key: np.asarray(value) for key, value in make().items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, **{TOOK: np.array(clock.read())})
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, buffer.getvalue())
        return arrays


def _code() -> str:
    """Hash of the library's and the experiments' source."""
    total = hashlib.sha256()
    for root in (Path(__file__).parent, Path(inspect.getfile(uw)).parent):
        for path in sorted(root.rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()


def _steps(experiment: Experiment, settings: Any) -> Steps:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    key = hashlib.sha256(f"{settings!r} {_code()}".encode()).hexdigest()[:16]
    return Steps(cache / "upweight" / "reproduce" / f"{experiment.name}-{key}")


def _plain(value: Any) -> Any:
    """Arrays as lists, floats to nine digits."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def conduct(experiment: Experiment, out: Path = RESULTS, *, fresh: bool = False) -> dict[str, Any]:
    """Run an experiment, store ``NAME.json`` and ``NAME.png``, and return the record.

    Args:
        experiment: what to run.
        out: folder of the results.
        fresh: forget finished steps of an interrupted run.
    """
    steps, clock = _steps(experiment, experiment.settings), Clock()
    assert steps.folder is not None
    if fresh and steps.folder.exists():
        shutil.rmtree(steps.folder)
    resumed = steps.folder.exists()
    found = experiment.run(experiment.settings, steps)
    wall, cpu = (sum(part) for part in zip(clock.read(), *steps.before, strict=True))
    record = {
        "name": experiment.name,
        "where": experiment.where,
        "title": experiment.title,
        "settings": asdict(experiment.settings),
        "machine": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, no GPU used",
        "versions": {
            "upweight": uw.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "resumed": resumed,
        "claims": [asdict(claim) for claim in found.claims],
        "notes": found.notes,
        "values": found.values,
    }
    out.mkdir(parents=True, exist_ok=True)
    found.figure.savefig(out / f"{experiment.name}.png", dpi=110)
    atomic_write(
        out / f"{experiment.name}.json", (json.dumps(_plain(record), indent=1) + "\n").encode()
    )
    shutil.rmtree(steps.folder, ignore_errors=True)
    return record


def main(experiment: Experiment) -> None:
    """The command of one experiment: ``python -m reproduce.NAME``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m reproduce.{experiment.name}",
        description=f"{experiment.where}: {experiment.title}",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="do not go on with a killed run")
    asked = parser.parse_args()
    print(f"{experiment.where}: {experiment.title}", flush=True)
    record = conduct(experiment, asked.out, fresh=asked.fresh)
    for claim in record["claims"]:
        print(f"  {claim['what']}: paper {claim['paper']}, ours {claim['ours']}: "
              f"{claim['verdict']}")  # fmt: skip
        if claim["note"]:
            print(f"    {claim['note']}")
    name = os.path.relpath(asked.out / experiment.name)
    print(f"{name}.json and .png; {record['wall_seconds']} s, {record['cpu_seconds']} CPU s")
