"""How many products a Gauss-Newton solve takes: without a preconditioner, with EK-FAC, with ours.

``python -m benchmarks.iterations [TASK ...]`` writes ``results/iterations.json`` and ``.md``; what
is there already is kept. Products of the transformer and the ResNet-9 are of a part of their
examples, which is stated: the matrix is that of those examples.
"""

import argparse
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.datasets import scratch
from benchmarks.harness import RESULTS, write_docs
from upweight import CG, Data, Kronecker, Objective, memory
from upweight.bars import progress
from upweight.curvature import GaussNewton, Leading
from upweight.engine import query_rows
from upweight.linalg import Operator
from upweight.risk import Risk
from upweight.solvers import Progress, Rule

RESIDUAL, MOST = 1e-3, 60
# Task: examples, queries, and the memory budget, which decides how many directions ours has.
TASKS = {
    "mlp": (6000, 10, "1 GiB"),
    "cnn": (5000, 4, "1 GiB"),
    "transformer": (100, 2, "4 GiB"),
    "resnet9": (200, 2, "1 GiB"),
}
WAYS: dict[str, Any] = {"ours": Leading(), "ekfac": Kronecker(), "none": None}


@final
@dataclass(frozen=True)
class Watched(Rule):
    """Writes the residuals down after every product, and ends after so many."""

    most: int
    seen: list[float] = field(default_factory=list, hash=False, compare=False)

    def begin(self, operator: Operator) -> Callable[[Progress], bool]:
        """For rows that are solved together."""
        del operator

        def watch(now: Progress) -> bool:
            self.seen.append(float(now.residual.max()))
            return len(self.seen) >= self.most

        return watch


def solve(operator: Operator, rows: Tensor, preconditioner: Any, most: int) -> dict[str, Any]:
    """The largest residual after every product, and what it took."""
    rule, start = Watched(most), time.process_time()
    CG(rtol=RESIDUAL, preconditioner=preconditioner, stop=(rule,)).init(operator).solve(rows)
    return {"residuals": rule.seen, "cpu_s": round(time.process_time() - start, 2)}


def measure(task: str) -> dict[str, Any]:
    """All ways on one task; the others get three times the products of ours, and one more."""
    examples, queries, room = TASKS[task]
    problem = importlib.import_module(f"benchmarks.{task}").load(scratch(task)).first(queries)
    objective = Objective(problem.model(), "cross_entropy", l2=problem.l2, removal="sum")
    data = Data.of((problem.inputs[:examples], problem.labels[:examples]))
    asked = Data.of((problem.query_inputs, problem.query_labels))
    operator = GaussNewton(Risk(objective, data)) + max(problem.damping - problem.l2, 0.0)
    rows, found, most = query_rows(objective, asked, "loss"), {}, MOST
    for name, preconditioner in WAYS.items():
        made = preconditioner and preconditioner(operator, len(rows))
        if preconditioner is not None and made is None:
            continue
        found[name] = solve(operator, rows, preconditioner, most)
        print(task, name, [f"{r:.1e}" for r in found[name]["residuals"]], flush=True)
        if most == MOST:
            most = 3 * len(found[name]["residuals"]) + 1
    about = {"examples": examples, "queries": queries, "memory": room}
    return {**about, "damping": problem.damping, "ways": found}


def table(measured: dict[str, Any]) -> str:
    """One line a task and way, under what they mean."""
    lines = [
        "# Products of a Gauss-Newton solve",
        "",
        f"Until the largest relative residual of all queries is {RESIDUAL:g}, with the λ of the "
        "task's score: preconditioned by this library's default, by EK-FAC, and by nothing. The "
        "others get three times the products of ours, and one more. On the transformer and the "
        "ResNet-9 the matrix is that of the examples named.",
        "",
        "| task | examples | queries | memory | preconditioner | products to 1e-3 "
        "| last residual | CPU s |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for task, one in measured.items():
        for way, found in one["ways"].items():
            last, count = found["residuals"][-1], len(found["residuals"])
            products = f"{count}" if last <= RESIDUAL else f"more than {count}"
            lines.append(
                f"| {task} | {one['examples']:,} | {one['queries']} | {one['memory']} | {way} "
                f"| {products} | {last:.1e} | {found['cpu_s']} |"
            )
    return "\n".join([*lines, "", "Made by `python -m benchmarks.iterations`; do not edit.", ""])


def main() -> None:
    """Measure what is missing, and write both files after every task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    path = RESULTS / "iterations.json"
    measured = report.read(path)
    torch.set_num_threads(1)
    for task in parser.parse_args().tasks:
        if task not in measured:
            with progress(False), memory(TASKS[task][2]):
                measured[task] = measure(task)
            report.dump(path, measured)
            path.with_suffix(".md").write_text(table(measured))
            write_docs()


if __name__ == "__main__":
    main()
