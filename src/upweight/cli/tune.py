"""``upweight tune``: method and damping chosen by models that are trained again within a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from upweight.cli.show import Clock, say, table
from upweight.cli.validate import outcomes_of, resumable
from upweight.data import Data
from upweight.evidence import by_halves, kept_in, seconds_of, trained_again
from upweight.front import Influence
from upweight.prepared import Prepared
from upweight.recipe import load
from upweight.retraining import How, Truth, seed_of
from upweight.tuning import LEAST_CHANGES, Tuning

__all__ = ["Settings", "tune"]


@final
@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        budget: seconds, or words.
        methods: rows of ``upweight methods``, the default first.
        truth: a directory of outcomes; None for one beside the recipe's name.
    """

    budget: str
    methods: Sequence[str]
    truth: Path | None


def tune(recipe: Path, settings: Settings) -> int:
    """Load a recipe, train again within the budget, and print what that chooses.

    Raises:
        UpweightError: of the kind that tells what is at fault.
    """
    clock, seconds = Clock(), seconds_of(settings.budget)
    loaded = load(recipe)
    default, *others = settings.methods
    inf, queries = loaded.influence(default, "auto"), Data.of(loaded.queries)
    for method in settings.methods:
        _require_tunable(Prepared(loaded.objective(), inf.data, method, 0.0))
    clock.say(f"loaded {recipe}")
    place = settings.truth or outcomes_of(recipe, loaded, inf.data, queries)
    remedy = "Define training or retrain in the recipe."
    how = trained_again(loaded.how, inf.objective.space.size, remedy)
    with resumable(place):
        truth = _truth(inf, queries, how, (seconds, place))
    trained = len(truth.trials) + len(truth.whole)
    clock.say(f"{trained:,} trainings: {truth.how}")
    found = inf.tune(queries, truth, methods=others)
    clock.say(f"tried {len(found.settings)} settings of {len(settings.methods)} methods")
    say()
    _print(found, recipe)
    return 0


def _require_tunable(made: Prepared) -> None:
    """What cannot be tuned is refused before hours of training, and not after."""
    made.refuse_ablation()
    made.fitted.looks_at(made.whole, made.data)


def _truth(inf: Influence, queries: Data, how: How, spent: tuple[float, Path]) -> Truth:
    """Random halves with the model's own seed, as many as the budget pays for."""
    seconds, path = spent
    with kept_in(path, seconds) as (place, spending):
        return by_halves(
            lambda trials: inf.retrain(queries, trials, how, place),
            len(inf.data),
            spending,
            seed=seed_of(how),
            least=LEAST_CHANGES,
        )


def _print(found: Tuning, recipe: Path) -> None:
    """The outcome, what was tried, and how to use it."""
    say(found.sentence)
    rows = [
        (
            row["method"],
            f"{row['damping']:.3g}",
            f"{row['LDS']:.2f}" if np.isfinite(row["LDS"]) else "no answer",
            f"{row['low']:.2f} to {row['high']:.2f}" if np.isfinite(row["low"]) else "",
            row[""],
        )
        for row in found.table().records()
    ]
    heads = ("method", "damping", "LDS", "95 %", "")
    table(f"On the {found.counts[0]} halves that chose", heads, rows)
    chosen = found.chosen
    say(f"upweight run {recipe} --method {chosen.name} --damping {chosen.damping:.6g}")
