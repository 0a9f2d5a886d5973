"""What ``Influence.plan`` says of a task against what the harness measured.

    python -m benchmarks.plans [TASK ...]      # after the rows "upweight ekfac" were measured

Each plan is made in a process of its own, and the table is written to results/plans.md.
"""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.datasets import scratch

RESULTS = Path(__file__).parent / "results"
ROWS = {"softmax": "upweight exact"}
TASKS = ("softmax", "mlp", "cnn", "transformer", "resnet9")
MIB = 2**20


def planned(task: str) -> dict[str, float]:
    """Seconds and bytes of a task's plan, in this process."""
    from upweight import Influence, Objective  # noqa: PLC0415

    torch.set_num_threads(1)
    problem = importlib.import_module(f"benchmarks.{task}").load(scratch(task)).to(torch.float32)
    model = problem.model(problem.dtype)
    objective = Objective(model, "cross_entropy", l2=problem.l2, removal="sum")
    method = "exact" if task in ROWS else "ekfac"
    influence = Influence(objective, (problem.inputs, problem.labels), method=method)
    plan = influence.plan((problem.query_inputs, problem.query_labels))
    return {"seconds": plan.seconds, "mib": plan.bytes / MIB}


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description="Plans against measurements.")
    parser.add_argument("task", nargs="*", default=list(TASKS))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(planned(given.task[0])))
        return
    lines = [
        "| task | planned s | measured CPU s | planned MiB | measured MiB | memory off by |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task in given.task:
        runs = json.loads((RESULTS / f"{task}.json").read_text())["contenders"]
        row = runs[ROWS.get(task, "upweight ekfac")]
        command = [sys.executable, "-m", "benchmarks.plans", task, "--inside"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        off = found["mib"] / row["peak_mib"] - 1
        lines.append(
            f"| {task} | {found['seconds']:.2f} | {row['cpu_s']:.2f} | {found['mib']:.0f} | "
            f"{row['peak_mib']:.0f} | {off:+.0%} |"
        )
    text = "\n".join(lines)
    print(text)
    (RESULTS / "plans.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
