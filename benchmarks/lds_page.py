"""The page of what retraining says of scores, made from the stored results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.contenders import FLOOR

__all__ = ["page"]

HEAD = """# Judged by retraining

Half of the training examples are left out at random and the task's own recipe runs again, from its
first weights, with several seeds. Predicted for such a subset is the sum of the scores of what was
left out. LDS is Spearman's correlation of prediction and outcome over the subsets, the mean over
queries, with a 95 % bootstrap interval over other subsets and other queries. The outcome is the
change of a query's loss, the mean over the seeds and over the steps of the last epoch; under
"final" it is that of the final weights alone, which jump from step to step as the recipes' step
sizes do not fall. The ceiling is what a perfect prediction of the mean over all seeds would have:
the rest is the luck of first weights and order.

Rows without "epoch" or "x 5" look at the final weights alone, those that are explained. "epoch 2"
looks at a checkpoint of the same run instead, "epochs 1 2 3 4" at the mean over four, "x 5" at the
runs of five seeds. Of the peers, some were asked at the checkpoint too, and none at several: none
averages scores, though a loop around it would.

At the final weights the Hessian bends down: `cg` refused λ = 0.05 on the perceptron and 0.1 on the
convolutional network, and on parts of the data the least eigenvalue is below -5.4 on the ResNet-9
and -1.3 on the transformer. So `cg` and `lissa` are shown with more, which leaves little of the
curvature. Rows measured on four queries are too dear for a hundred: their costs are scaled up, and
retraining does not judge them. `arnoldi` takes 40 products on the transformer in
place of 100, and `astra` was stopped there after 57 minutes of CPU time for four queries.

pearson, spearman, error: of all queries' scores against the Gauss-Newton system solved by conjugate
gradients to a residual of 0.001, with the λ of the task's score; for the transformer and the
ResNet-9, of the first queries' against the reference of the tables of costs. CPU seconds and memory
as in the tables of costs; measured on a shared machine, they are provisional.
"""
HEADER = (
    "| scores | LDS | final | pearson | spearman | error | CPU s | x floor | peak MiB | what |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
)


def page(folder: Path, tasks: Sequence[str]) -> str:
    """All tasks with results in ``folder``."""
    found = [report.read(folder / f"lds_{task}.json") for task in tasks]
    parts = [HEAD, *(_task(results) for results in found if results.get("retraining"))]
    return "\n".join([*parts, "Made by `python -m benchmarks.lds`; do not edit.\n"])


def _task(results: Mapping[str, Any]) -> str:
    """One task: what was trained, and its rows, best first."""
    done, known = results["retraining"], results["contenders"]
    floor = known.get(FLOOR, {}).get("cpu_s")
    shown = {name: record for name, record in known.items() if {"lds", "queries"} & record.keys()}
    order = sorted(shown, key=lambda name: -shown[name].get("lds", [-1.0])[0])
    rows = [_row(name, shown[name], floor) for name in order]
    rows += [_failed(name, record) for name, record in known.items() if "failed" in record]
    trained = (
        f"{done['subsets']} subsets x {done['seeds']} seeds, {done['queries']} queries. Ceiling "
        f"**{done['last_epoch']['ceiling']:.2f}**, of the final weights "
        f"{done['final']['ceiling']:.2f}; two single seeds agree to "
        f"{done['last_epoch']['seed_to_seed']:.2f} and {done['final']['seed_to_seed']:.2f}."
    )
    lines = [f"## {results['task']}: {results['title']}", "", trained, *_leads(results), ""]
    return "\n".join([*lines, *HEADER, *rows, ""])


def _leads(results: Mapping[str, Any]) -> list[str]:
    """The best row of this library beside the best of all others."""
    lines = []
    for weights, best in results.get("best", {}).items():
        if best:
            value, low, high = best["lead"]
            lines += [
                "",
                f"From {weights}: best of ours is {best['ours']}, best of the peers "
                f"{best['peer']}; difference {value:+.3f} [{low:+.3f}, {high:+.3f}] on the same "
                "bootstrap samples.",
            ]
    return lines


def _row(name: str, record: Mapping[str, Any], floor: float | None) -> str:
    some = record.get("queries")  # cost scaled up, and nothing to judge by retraining
    about, said = ("~", f"measured on {some} queries; ") if some else ("", "")
    judged = ["–", "–"]
    if "lds" in record:
        value, low, high = record["lds"]
        judged = [f"{value:.3f} [{low:.2f}, {high:.2f}]", f"{record['lds_final'][0]:.3f}"]
    multiple = f"{record['cpu_s'] / floor:,.0f}" if floor else "–"
    cells = [
        *judged,
        *(f"{record[key]:.3f}" if key in record else "–" for key in ("pearson", "spearman")),
        f"{record['relative_error']:.1e}" if "relative_error" in record else "–",
        f"{about}{record['cpu_s']:,.2f}",
        f"{about}{multiple}",
        f"{record['peak_mib']:,}",
        f"{said}{record['note']}",
    ]
    return "| " + " | ".join([name, *cells]) + " |"


def _failed(name: str, record: Mapping[str, Any]) -> str:
    empty = " | ".join(["–"] * 8)
    return f"| {name} | {empty} | **failed: {record['failed']}**; {record['note']} |"
