"""How well scores predict what retraining finds: the linear datamodeling score of every contender.

    python -m benchmarks.lds [TASK ...] [--only NAME ...]      # make lds

Predicted for a subset is the sum of the scores of the examples that it leaves out; found is the
change of a query's loss by training on what is left (``truths/``). A contender's score is
Spearman's correlation of the two over the subsets, the mean over queries (Park et al., 2023),
beside what it costs and how near it is to the solved Gauss-Newton system. Contenders without
scores in scratch are run first, each in a process of its own; nothing is trained again. ``--only``
runs these and no others; without a name it runs nothing.
"""

import argparse
import importlib
import itertools
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from benchmarks import harness, lds_page, report, truths
from benchmarks.contenders import CONTENDERS, FLOOR, RANKED, Contender, find
from benchmarks.datasets import scratch
from benchmarks.truths import Outcomes
from upweight.evaluation import (
    DatamodelingScore,
    Estimate,
    Resamples,
    Sampled,
    datamodeling_score,
    group_effects,
    rank_correlations,
)
from upweight.evaluation.resampling import LEAST

__all__ = ["TASKS", "Judge", "final", "missing", "rows", "update"]

TASKS = ("mlp", "cnn", "transformer", "resnet9")
SOLVED = "upweight ggn cg tight"
AGAIN = "upweight ekfac fitted"  # the scores of "upweight ekfac" once more
KINDS = ("final", "last_epoch")
JUDGEMENTS = (*report.JUDGEMENTS, "lds", "lds_final")


def rows(task: str) -> tuple[Contender, ...]:
    """The contenders of a task with scores of their own, and the floor."""
    every = (*CONTENDERS[task], *RANKED.get(task, ()))
    return tuple(row for row in every if row.name != AGAIN)


@final
@dataclass(frozen=True)
class Judge:
    """Measured changes, and the same bootstrap samples for every contender.

    Attributes:
        gone: examples that are left out, ``[u, N]``.
        changes: of each query's loss, against all of the data with the same seed,
            ``[2, s, q, u]``: of the final weights, and over the last epoch.
        resamples: of subsets and queries.
    """

    gone: np.ndarray
    changes: np.ndarray
    resamples: Resamples

    @classmethod
    def of(cls, outcomes: Outcomes) -> "Judge":
        """By subsets that were trained with every seed."""
        changes = outcomes.measured.astype(np.float64) - outcomes.whole
        subsets, _, _, queries = changes.shape
        resamples = Resamples.two_way(subsets, queries)
        return cls(outcomes.gone, changes.transpose(2, 1, 3, 0), resamples)

    def scored(self, scores: np.ndarray) -> tuple[DatamodelingScore, DatamodelingScore]:
        """Against the mean over seeds: of the final weights, and over the last epoch."""
        predicted = group_effects(scores, self.gone)
        final, last = (
            datamodeling_score(predicted, found.mean(0), resamples=self.resamples)
            for found in self.changes
        )
        return final, last

    def about(self) -> dict[str, Any]:
        """What was trained, and how much of it no prediction can know.

        r is Spearman's correlation of two seeds, the mean over queries and pairs of seeds. What
        knew the mean over all seeds would reach √(s r / (1 + (s − 1) r)) against the mean of s
        (Spearman, 1910; Brown, 1910).
        """
        _, seeds, queries, subsets = self.changes.shape
        agreed = {}
        for name, changes in zip(KINDS, self.changes, strict=True):
            pairs = itertools.combinations(changes, 2)
            r = float(np.mean([np.nanmean(rank_correlations(*pair)) for pair in pairs]))
            ceiling = max(0.0, seeds * r / (1 + (seeds - 1) * r)) ** 0.5
            agreed[name] = {"seed_to_seed": _rounded(r), "ceiling": _rounded(ceiling)}
        return {"subsets": subsets, "seeds": seeds, "queries": queries, **agreed}


def _rounded(value: float) -> float:
    return round(value, 4)


def _plain(estimate: Estimate) -> list[float]:
    """Value and interval."""
    return [_rounded(x) for x in (estimate.value, estimate.low, estimate.high)]


def _scores(task: str, name: str) -> np.ndarray | None:
    """A contender's scores, if they are in scratch and of all queries."""
    path = scratch(task) / f"{name}.npy"
    if not path.exists():
        return None
    found: np.ndarray = np.load(path)
    asked = importlib.import_module(f"benchmarks.{task}").ABOUT["queries"]
    return found if len(found) == asked else None


def update(task: str, wanted: list[Contender], limits: tuple[int, float]) -> None:
    """Run the wanted contenders, store each as soon as it is done, and judge all by retraining."""
    path, module = (
        harness.RESULTS / f"lds_{task}.json",
        importlib.import_module(f"benchmarks.{task}"),
    )
    stored = {"task": task, "contenders": {}, **report.read(path)}
    stored |= {"title": module.TITLE, "about": module.ABOUT}
    for contender in wanted:
        print(f"{contender.name}: ", end="", flush=True)
        try:
            harness.interpreter(contender)
        except FileNotFoundError as error:
            print(f"left out, {error}", flush=True)
            continue
        record = harness.run_contender(task, contender, *limits)
        print(record.get("failed") or f"{record['cpu_s']} CPU s", flush=True)
        # Another process may have written rows of this task meanwhile.
        stored["contenders"] = report.read(path).get("contenders", {}) | {contender.name: record}
        report.dump(path, stored)
    known = report.read(path).get("contenders", {})
    stored["contenders"] = {
        row.name: known[row.name] | {"note": row.note} for row in rows(task) if row.name in known
    }
    outcomes = truths.read(task).complete()
    if len(outcomes.gone) < LEAST:
        print(f"{task}: {len(outcomes.gone)} subsets are trained, judged from {LEAST} on")
    else:
        _judge(task, stored, Judge.of(outcomes))
    report.dump(path, stored)


def _judge(task: str, stored: dict[str, Any], judge: Judge) -> None:
    """Every record anew: by what is trained now, and by the solved system."""
    solved, about, sampled = _scores(task, SOLVED), judge.about(), {}
    for name, record in stored["contenders"].items():
        if "queries" in record:  # too few for retraining; the reference may be another by now
            if (scratch(task) / f"{name}.npy").exists():
                record |= harness.judged(task, name)
            continue
        scores = None if "failed" in record else _scores(task, name)
        if scores is None and about == stored.get("retraining"):
            continue  # not in scratch any more, and judged by the same trainings
        for key in JUDGEMENTS:
            record.pop(key, None)
        if scores is None:
            continue
        at_end, last = judge.scored(scores)
        record |= {"lds": _plain(last.estimate), "lds_final": _plain(at_end.estimate)}
        sampled[name] = last.sampled
        if name != SOLVED and final(task, name):
            if solved is None:
                record |= harness.judged(task, name)
            else:
                record |= report.agreement(scores, solved)
    stored["retraining"] = about
    alone = {name: one for name, one in sampled.items() if final(task, name)}
    stored["best"] = {"any weights": _best(sampled), "final weights": _best(alone)}


def _best(sampled: dict[str, Sampled]) -> dict[str, Any]:
    """The best row of this library and of the peers, and how far they are apart."""
    ours = {name: one for name, one in sampled.items() if name.startswith("upweight")}
    peers = {name: one for name, one in sampled.items() if name not in ours}
    if not ours or not peers:
        return {}
    mine, theirs = (max(part, key=lambda name: part[name].value) for part in (ours, peers))
    lead = ours[mine].minus(peers[theirs]).estimate()
    return {"ours": mine, "peer": theirs, "lead": _plain(lead)}


def final(task: str, name: str) -> bool:
    """Whether a row looks at the weights that are explained, and at no others."""
    row = find(task, name)
    return row.epoch is None and not row.settings.keys() & {"epochs", "models"}


def missing(task: str) -> list[Contender]:
    """Contenders without scores in scratch; the floor has none and is measured once."""
    known = report.read(harness.RESULTS / f"lds_{task}.json").get("contenders", {})
    there = [row.name for row in rows(task) if (scratch(task) / f"{row.name}.npy").exists()]
    if FLOOR in known:
        there.append(FLOOR)
    return [row for row in rows(task) if row.name not in there]


def main() -> None:
    """Run what has no scores, judge, and write the page."""
    parser = argparse.ArgumentParser(description="Judge contenders by stored retrainings.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="run these (or none)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-gib", type=float, default=12.0, help="limit of each process")
    given = parser.parse_args()
    for task in given.tasks or TASKS:
        if not (truths.FOLDER / f"{task}.npz").exists():
            print(f"{task}: nothing trained; python -m benchmarks.truths {task}")
            continue
        wanted = missing(task) if given.only is None else [find(task, x) for x in given.only]
        if wanted:
            importlib.import_module(f"benchmarks.{task}").RECIPE.supply(scratch(task))
        update(task, wanted, (given.threads, given.memory_gib))
    page = harness.RESULTS / "lds.md"
    page.write_text(lds_page.page(harness.RESULTS, TASKS))
    harness.write_docs()


if __name__ == "__main__":
    main()
