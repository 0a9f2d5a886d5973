"""What really happens when half of the examples go: losses of the queries after training again.

    python -m benchmarks.truths TASK [--subsets 90] [--seeds 2] [--minutes 5]

Every training is the task's own recipe from the beginning: its optimiser, epochs and batches, on a
random half of the examples, and on all of them. Each subset is trained once per seed of weights and
order, so that two seeds of one subset tell what no prediction can know. A query's loss is taken
from the final weights, and as the mean over the steps of the last epoch: training without a
falling step size leaves weights that jump from step to step, and the mean is what they jump about.
``truths/TASK.npz`` holds the outcomes and the subsets, ``truths/TASK.json`` how they came about. An
outcome is stored as soon as it is there: a run that was stopped goes on, and more subsets or seeds
may be asked for later.
"""

import argparse
import importlib
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.datasets import scratch
from benchmarks.harness import machine
from benchmarks.measure import versions
from benchmarks.networks import Problem, Recipe
from upweight.retraining import Trials

__all__ = ["FOLDER", "Outcomes", "go_on", "losses", "read"]

FOLDER = Path(__file__).resolve().parent / "truths"
FRACTION, DRAW = 0.5, 0


@final
@dataclass
class Outcomes:
    """Losses of the queries after training on subsets; NaN where a training is still to come.

    Attributes:
        gone: examples that are left out of each subset, ``[u, N]``.
        measured: after training on each subset with each seed, ``[u, s, 2, q]``, float32; of the
            two, the first is of the final weights, the second the mean over the last epoch.
        whole: the same after training on all examples with each seed, ``[s, 2, q]``.
    """

    gone: np.ndarray
    measured: np.ndarray
    whole: np.ndarray

    @classmethod
    def empty(cls, examples: int, queries: int, subsets: int, seeds: int) -> "Outcomes":
        """The subsets drawn, and nothing trained yet."""
        drawn = Trials.subsets(examples, count=subsets, fraction=FRACTION, seeds=[0], draw=DRAW)
        measured = np.full((subsets, seeds, 2, queries), np.nan, dtype=np.float32)
        return cls(drawn.gone, measured, np.full_like(measured[0], np.nan))

    def keep(self, known: "Outcomes") -> None:
        """Take what was trained before.

        Raises:
            ValueError: it was trained on other subsets, or there is more of it.
        """
        subsets, seeds = known.measured.shape[:2]
        if subsets > len(self.gone) or seeds > len(self.whole):
            raise ValueError(
                f"{subsets} subsets with {seeds} seeds are stored; ask for as many or more."
            )
        if not np.array_equal(known.gone, self.gone[:subsets]):
            raise ValueError("The stored subsets are not what is drawn now: move the file away.")
        self.measured[:subsets, :seeds] = known.measured
        self.whole[:seeds] = known.whole

    def complete(self) -> "Outcomes":
        """The subsets that were trained with every seed."""
        there = np.isfinite(self.measured).all((1, 2, 3))
        return Outcomes(self.gone[there], self.measured[there], self.whole)

    def write(self, path: Path) -> None:
        """Store beside the old file and rename: a killed run leaves one or the other."""
        beside = path.with_suffix(".tmp")
        with beside.open("wb") as file:
            np.savez_compressed(
                file,
                gone=np.packbits(self.gone, axis=1),
                examples=self.gone.shape[1],
                measured=self.measured,
                whole=self.whole,
            )
        beside.replace(path)


def read(task: str, folder: Path | None = None) -> Outcomes:
    """The stored outcomes of a task."""
    with np.load((folder or FOLDER) / f"{task}.npz", allow_pickle=False) as file:
        gone = np.unpackbits(file["gone"], axis=1, count=int(file["examples"])).astype(bool)
        return Outcomes(gone, file["measured"], file["whole"])


def losses(problem: Problem, model: nn.Module) -> Tensor:
    """Of each query ``[q]``."""
    with torch.no_grad():
        return problem.losses(model(problem.query_inputs), problem.query_labels)


def trained(recipe: Recipe, problem: Problem, seed: int) -> np.ndarray:
    """Losses of the queries after a training, and in its last epoch, ``[2, q]``."""
    last: list[Tensor] = []
    recipe.fitted(problem, seed=seed, watch=lambda model: last.append(losses(problem, model)))
    return torch.stack([last[-1], torch.stack(last).mean(0)]).numpy()


def go_on(task: str, subsets: int, seeds: int, minutes: float, folder: Path = FOLDER) -> bool:
    """Train what is not there yet, until the time is over; whether all is there.

    All of the data comes first, then one subset after the other with every seed.
    """
    recipe: Recipe = importlib.import_module(f"benchmarks.{task}").RECIPE
    problem: Problem = recipe.untrained(scratch(task))
    sizes = (len(problem.inputs), len(problem.query_inputs))
    outcomes = Outcomes.empty(*sizes, subsets, seeds)
    path, spent = folder / f"{task}.npz", 0.0
    if path.exists():
        outcomes.keep(read(task, folder))
        spent = json.loads(path.with_suffix(".json").read_text())["cpu_s"]
    every = torch.zeros(1, sizes[0], dtype=torch.bool)
    gone = torch.cat([every, torch.from_numpy(outcomes.gone)])
    rows = [outcomes.whole, *outcomes.measured]
    end = time.monotonic() + 60 * minutes
    for out, found in zip(gone, rows, strict=True):
        for seed in range(seeds):
            if np.isfinite(found[seed]).all():
                continue
            if time.monotonic() > end:
                return False
            began = time.process_time()
            found[seed] = trained(recipe, problem.only(~out), seed)
            spent += time.process_time() - began
            outcomes.write(path)
            path.with_suffix(".json").write_text(_about(task, outcomes, spent))
    return True


def _about(task: str, outcomes: Outcomes, spent: float) -> str:
    """What was trained, how, and where."""
    module, done = importlib.import_module(f"benchmarks.{task}"), outcomes.complete()
    about: dict[str, Any] = {
        "task": task,
        "trained": {key: module.ABOUT[key] for key in ("objective", "network", "examples")},
        "measured": "each query's loss without the L2 term: of the final weights, and the mean "
        "over the steps of the last epoch",
        "subsets": len(done.gone),
        "fraction": FRACTION,
        "draw": f"upweight.retraining.Trials.subsets, draw={DRAW}",
        "seeds": list(range(len(done.whole))),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "cpu_s": round(spent, 1),
        "versions": versions(("torch", "numpy")),
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "again": f"python -m benchmarks.truths {task} --subsets {len(outcomes.gone)} "
        f"--seeds {len(outcomes.whole)}",
    }
    return json.dumps(about, indent=1) + "\n"


def main() -> None:
    """Go on with a task's outcomes."""
    parser = argparse.ArgumentParser(description="Train on halves of a task's examples.")
    parser.add_argument("task")
    parser.add_argument("--subsets", type=int, default=90)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60.0, help="of this run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    module = importlib.import_module(f"benchmarks.{given.task}")
    module.RECIPE.supply(scratch(given.task))
    complete = go_on(given.task, given.subsets, given.seeds, given.minutes)
    stored = json.loads((FOLDER / f"{given.task}.json").read_text())
    left = "" if complete else "; time is over, run it again to go on"
    print(f"{given.task}: {stored['subsets']} subsets, {stored['cpu_s']} CPU s{left}")


if __name__ == "__main__":
    main()
