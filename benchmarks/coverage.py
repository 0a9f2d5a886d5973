"""How often the 90 % intervals of what-ifs hold what retraining finds.

    python -m benchmarks.coverage [--experiments 24]      # a few minutes

Every experiment draws data, trains a model, retrains it after changes of one kind, calibrates with
some of them and asks ``whatif`` about the others, as a user would. Counted are the pairs of a query
and a new change that have an interval: how many of them hold the change that retraining found.

Changes are drawn at random, as those that calibrate are. Rows "chosen" ask about the examples with
the largest scores instead, which is what the guarantee leaves out.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

import upweight as uw
from upweight.curvature import curvature
from upweight.linalg import Cholesky
from upweight.retraining import SGD, How, Refit, Training, Trials, Truth, fit
from upweight.risk import Risk

__all__ = ["KINDS", "PROBLEMS", "Row", "Tally", "experiment", "run"]

RESULTS = Path(__file__).resolve().parent / "results" / "coverage.json"
EXAMPLES, QUERIES, FEATURES, L2 = 60, 6, 4, 0.05
ASKED = 12
Rows = tuple[Tensor, Tensor]


def _draw(seed: int, outputs: int) -> Rows:
    """Inputs, and a noisy linear answer of as many outputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(EXAMPLES + QUERIES, FEATURES, generator=generator).double()
    weight = torch.randn(FEATURES, outputs, generator=generator).double()
    noise = torch.randn(len(x), outputs, generator=generator).double()
    return x, x @ weight + noise


def _convex(risk: Risk) -> None:
    """Minimise by Newton's method, in place."""
    named = dict(risk.objective.model.named_parameters())
    with torch.no_grad():
        for value in named.values():
            value.zero_()
        for _ in range(30):
            slope = risk.gradient()
            if float(slope.norm()) < 1e-12:
                break
            step = Cholesky().init(curvature("hessian", risk)).apply(slope[None])[0]
            for name, part in risk.objective.space.unflatten(step).items():
                named[name].sub_(part)


@final
@dataclass(frozen=True)
class Problem:
    """A model and how it is trained.

    Attributes:
        model: makes it.
        loss: its name.
        target: from a noisy linear answer ``[n, o]`` to targets.
        outputs: o.
        recipe: how it is trained, from a seed; None for a convex objective, minimised.
        settings: of the Influence.
        others: seeds over which what happens is averaged, if not that of the model itself.
    """

    model: Callable[[], nn.Module]
    loss: str
    target: Callable[[Tensor], Tensor]
    outputs: int
    recipe: Callable[[int], Training] | None
    settings: dict[str, Any]
    others: int = 0

    def made(self, seed: int) -> tuple[uw.Influence, Rows, How]:
        """A trained model of drawn data, queries, and how to train it again."""
        x, answer = _draw(seed, self.outputs)
        y = self.target(answer)
        train, queries = (x[:EXAMPLES], y[:EXAMPLES]), (x[EXAMPLES:], y[EXAMPLES:])
        objective = uw.Objective(self.model(), self.loss, l2=L2)
        risk = Risk(objective, uw.Data.of(train))
        how: How = Refit()
        if self.recipe is None:
            _convex(risk)
        else:
            how = self.recipe(seed)
            objective = objective.of(fit(objective, train, how))
        return uw.Influence(objective, train, **self.settings), queries, how


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def _recipe(seed: int) -> Training:
    return Training(epochs=15, batch_size=12, optimiser=SGD(0.2), seed=seed)


def _linear(outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(FEATURES, outputs).double()


def _class(answer: Tensor) -> Tensor:
    return answer.argmax(1)


def _side(answer: Tensor) -> Tensor:
    return (answer[:, 0] > 0).long()


_EKFAC = {"method": "ekfac", "damping": 0.02}
PROBLEMS = {
    # To second order ridge is exact, and there is nothing to cover.
    "ridge, first order": Problem(
        _linear(1), "mean_squared_error", lambda y: y, 1, None, {"method": "cg"}
    ),
    "logistic": Problem(_linear(1), "binary_cross_entropy", _side, 1, None, {}),
    "softmax": Problem(_linear(3), "cross_entropy", _class, 3, None, {}),
    "softmax, first order": Problem(_linear(3), "cross_entropy", _class, 3, None, {"method": "cg"}),
    "network": Problem(_network, "cross_entropy", _class, 3, _recipe, _EKFAC),
    "network, second order": Problem(
        _network, "cross_entropy", _class, 3, _recipe, {"method": "ggn", "damping": 0.02}
    ),
    "network, mean of 2 trainings": Problem(
        _network, "cross_entropy", _class, 3, _recipe, _EKFAC, others=2
    ),
}
ALL_KINDS = ("ridge, first order", "logistic", "softmax", "softmax, first order", "network")


def _singles(draw: np.random.Generator, count: int) -> list[np.ndarray]:
    return list(draw.permutation(EXAMPLES)[:count, None])


def _groups(draw: np.random.Generator, count: int) -> list[np.ndarray]:
    sizes = draw.integers(2, EXAMPLES // 4, count)
    return [draw.choice(EXAMPLES, size, replace=False) for size in sizes]


def _halves(draw: np.random.Generator, count: int) -> list[np.ndarray]:
    return [draw.choice(EXAMPLES, EXAMPLES // 2, replace=False) for _ in range(count)]


KINDS = {"one example": _singles, "groups of 2 to 14": _groups, "halves": _halves}


@final
@dataclass
class Tally:
    """What intervals held.

    Attributes:
        held: pairs whose interval holds what happened.
        asked: pairs with an interval.
        widths: of each interval, over the mean size of the changes that were asked about.
    """

    held: int
    asked: int
    widths: list[float]

    def add(self, found: uw.WhatIf, actual: np.ndarray, size: float) -> None:
        """Count one what-if against what happened, ``[q]``."""
        known = np.isfinite(found.low)
        inside = (found.low <= actual) & (actual <= found.high)
        self.held += int(inside[known].sum())
        self.asked += int(known.sum())
        self.widths += ((found.high - found.low)[known] / size).tolist()


def _part(truth: Truth, rows: slice) -> Truth:
    """Some of the trials."""
    numbers = np.arange(len(truth.trials))[rows]
    return replace(
        truth, trials=truth.trials.take(numbers), measured=truth.measured[rows], failures={}
    )


def experiment(
    problem: str, kind: str, *, seed: int, changes: int, chosen: bool = False
) -> Iterator[tuple[uw.WhatIf, np.ndarray]]:
    """Calibrate once and ask about changes that did not calibrate.

    Args:
        problem: one of ``PROBLEMS``.
        kind: one of ``KINDS``.
        seed: of data, model and changes.
        changes: how many calibrate.
        chosen: ask about the examples with the largest scores, not about random ones.

    Yields:
        what was said of a change, and what happened, ``[q]``.
    """
    asked = PROBLEMS[problem]
    inf, queries, how = asked.made(seed)
    groups = KINDS[kind](np.random.default_rng(seed), changes + ASKED)
    if chosen:
        groups[changes:] = _largest(inf.explain(queries).values, groups, changes)
    seeds = [seed + 1000 * other for other in range(1, asked.others + 1)] or [seed]
    truth = inf.retrain(queries, Trials.without(groups, EXAMPLES, seeds), how)
    rows = changes * len(seeds)
    inf.calibrate(queries, _part(truth, slice(None, rows)))
    rest = _part(truth, slice(rows, None))
    # The same example may be chosen for two queries, which is one change and not two.
    actual = rest.changes() if len(seeds) == 1 else rest.on_average()
    for number, (group, happened) in enumerate(zip(groups[changes:], actual, strict=True)):
        found = inf.whatif(on=queries, remove=group.tolist())
        if not chosen:
            yield found, happened
            continue
        # Chosen for one query, it says nothing of the others.
        own = np.arange(QUERIES) == number
        yield replace(found, low=np.where(own, found.low, np.nan)), happened


def _largest(scores: np.ndarray, groups: list[np.ndarray], changes: int) -> list[np.ndarray]:
    """For each query the examples that help it most, in groups as large as those that were drawn.

    Single examples that calibrate are left out: what happens without them is known.
    """
    sizes = [len(group) for group in groups[changes : changes + QUERIES]]
    known = np.concatenate(groups[:changes]) if max(sizes) == 1 else []
    open_ = np.setdiff1d(np.arange(EXAMPLES), known)
    pairs = zip(scores, sizes, strict=True)
    return [open_[np.argsort(-score[open_])[:size]] for score, size in pairs]


@final
@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        problem: model and method.
        kind: of change.
        changes: that calibrate.
        chosen: whether those asked about were chosen by their scores.
    """

    problem: str
    kind: str
    changes: int
    chosen: bool = False

    def measured(self, experiments: int) -> dict[str, Any]:
        """Coverage over independent experiments, with its standard error over them."""
        total, shares = Tally(0, 0, []), []
        for seed in range(experiments):
            pairs = list(
                experiment(
                    self.problem, self.kind, seed=seed, changes=self.changes, chosen=self.chosen
                )
            )
            size = float(np.abs([actual for _, actual in pairs]).mean())
            before = total.held, total.asked
            for found, actual in pairs:
                total.add(found, actual, size)
            if total.asked > before[1]:
                shares.append((total.held - before[0]) / (total.asked - before[1]))
        pairs_asked = experiments * QUERIES * (1 if self.chosen else ASKED)
        error = np.std(shares, ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else None
        return {
            "model": self.problem,
            "changes": f"chosen: {self.kind}" if self.chosen else self.kind,
            "calibrated_with": self.changes,
            "coverage": total.held / total.asked if total.asked else None,
            "standard_error": None if error is None else float(error),
            "with_interval": total.asked / pairs_asked,
            "median_width": float(np.median(total.widths)) if total.widths else None,
            "experiments": experiments,
        }


GROUPS = "groups of 2 to 14"
ROWS = (
    *(Row(problem, kind, 24) for problem in ALL_KINDS for kind in KINDS),
    *(Row(problem, GROUPS, 24) for problem in PROBLEMS if problem not in ALL_KINDS),
    *(Row(problem, GROUPS, 9) for problem in ("softmax", "network")),
    *(Row("softmax", kind, 24, chosen=True) for kind in ("one example", GROUPS)),
)


def run(experiments: int, path: Path = RESULTS) -> list[dict[str, Any]]:
    """Measure every row, and store each as soon as it is there."""
    found: list[dict[str, Any]] = []
    for row in ROWS:
        found.append(row.measured(experiments))
        print(json.dumps(found[-1]), flush=True)
        about = {
            "about": "share of 90 % intervals of what-ifs that hold what retraining found",
            "examples": EXAMPLES,
            "queries": QUERIES,
            "asked_per_experiment": ASKED,
            "rows": found,
        }
        path.write_text(json.dumps(about, indent=1) + "\n")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", type=int, default=24)
    run(parser.parse_args().experiments)
