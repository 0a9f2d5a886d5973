"""What choosing the damping by retraining is worth: ``Influence.tune`` on the stored truths.

    python -m benchmarks.tuning [TASK ...]      # needs the tasks' data and ``truths/``

The default is damping "auto": the L2 that the model was trained with, and nothing beside it. Half
of the stored subsets choose among dampings and methods; what is gained is judged by the others.
"""

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import upweight as uw
from benchmarks import truths
from benchmarks.datasets import scratch
from benchmarks.networks import Problem
from upweight.meaning import Meaning
from upweight.retraining import Trials, Truth
from upweight.tuning import Tuning

__all__ = ["METHODS", "row", "tuned"]

RESULTS = Path(__file__).resolve().parent / "results" / "tuning.json"
METHODS, TASKS = ("ekfac", "kfac", "diagonal"), ("mlp", "cnn")
MEANING = Meaning("loss", "nats", 1)


def _truth(task: str) -> Truth:
    """Losses under the final weights, of all subsets with all seeds."""
    stored = truths.read(task).complete()
    subsets, seeds, _, queries = stored.measured.shape
    trials = Trials(
        "random subsets of 50%", stored.gone.repeat(seeds, 0), np.tile(np.arange(seeds), subsets)
    )
    return Truth(
        trials=trials,
        query_ids=np.arange(queries),
        measured=stored.measured[:, :, 0].reshape(-1, queries).astype(np.float64),
        whole=stored.whole[:, 0].astype(np.float64),
        seeds=np.arange(seeds),
        meaning=MEANING,
        how=f"the recipe of {task}",
        failures={},
    )


def tuned(problem: Problem, truth: Truth, methods: tuple[str, ...] = METHODS) -> Tuning:
    """Method and damping by the truth."""
    inf = uw.Influence(
        problem.model(),
        (problem.inputs, problem.labels),
        loss="cross_entropy",
        l2=problem.l2,
        method=methods[0],
        damping="auto",
    )
    queries = uw.Data.of((problem.query_inputs, problem.query_labels))
    return inf.tune(queries, truth, methods=methods[1:])


def row(task: str, found: Tuning, seconds: float) -> dict[str, Any]:
    """What is stored of a task."""
    default, best = found.settings[0], found.settings[found.best]
    return {
        "task": task,
        "default": str(default),
        "best": str(best),
        "held_out": {
            "default": found.held_out[0].as_dict(),
            "best": found.held_out[1].as_dict(),
            "gain": found.gain.as_dict(),
        },
        "subsets": list(found.counts),
        "of": found.words,
        "chose": [
            {"setting": str(setting), **score.as_dict()}
            for setting, score in zip(found.settings, found.scores, strict=True)
        ],
        "cpu_s": round(seconds, 1),
    }


def main() -> None:
    """Tune the tasks, and store what that is worth."""
    parser = argparse.ArgumentParser(description="What tuning by retraining is worth.")
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    torch.set_num_threads(1)
    rows = []
    for task in parser.parse_args().tasks:
        recipe = importlib.import_module(f"benchmarks.{task}").RECIPE
        recipe.supply(scratch(task))
        problem = recipe.load(scratch(task))
        began = time.process_time()
        found = tuned(problem, _truth(task))
        rows.append(row(task, found, time.process_time() - began))
        print(found, flush=True)
    RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
