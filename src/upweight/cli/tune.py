"""``upweight tune``: method and damping chosen by models that are trained again within a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from upweight.cli.show import Clock, say, table
from upweight.cli.validate import question
from upweight.data import Data
from upweight.errors import InputError
from upweight.evidence import MOST_REFIT_PARAMETERS, by_halves, kept_in, seconds_of
from upweight.front import Influence
from upweight.recipe import Recipe, load
from upweight.retraining import How, Own, Refit, Training, Truth
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
    clock = Clock()
    loaded = load(recipe)
    default, *others = settings.methods
    inf, queries = loaded.influence(default, "auto"), Data.of(loaded.queries)
    clock.say(f"loaded {recipe}")
    place = settings.truth or Path(f"upweight-{recipe.stem}-truth") / question(
        loaded, inf.data, queries
    )
    truth = _truth(inf, queries, _how(loaded, inf), (settings.budget, place))
    trained = len(truth.trials) + len(truth.whole)
    clock.say(f"{trained:,} trainings: {truth.how}")
    found = inf.tune(queries, truth, methods=others)
    clock.say(f"tried {len(found.settings)} settings of {len(settings.methods)} methods")
    say()
    _print(found, recipe)
    return 0


def _how(recipe: Recipe, inf: Influence) -> How:
    """How models are trained again, refits by default.

    Raises:
        InputError: the model is too large for refits.
    """
    size = inf.objective.space.size
    if recipe.how is None and size > MOST_REFIT_PARAMETERS:
        raise InputError(
            f"Refits factorise a dense Hessian, and {size:,} parameters are more than "
            f"{MOST_REFIT_PARAMETERS:,}. Define training or retrain in the recipe."
        )
    return Refit() if recipe.how is None else recipe.how


def _truth(inf: Influence, queries: Data, how: How, spent: tuple[str, Path]) -> Truth:
    """Random halves with the model's own seed, as many as the budget pays for."""
    budget, path = spent
    with kept_in(path, seconds_of(budget)) as (place, spending):
        return by_halves(
            lambda trials: inf.retrain(queries, trials, how, place),
            len(inf.data),
            spending,
            seed=how.seed if isinstance(how, (Training, Own)) else 0,
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
