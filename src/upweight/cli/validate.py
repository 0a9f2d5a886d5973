"""``upweight validate``: models trained again within a budget, and what it shows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from upweight.cli.options import Place
from upweight.cli.show import Clock, say, table
from upweight.damping import Damping
from upweight.data import Data
from upweight.evidence import Evidence, seconds_of, spoken
from upweight.fingerprints import fingerprint
from upweight.recipe import Recipe, load
from upweight.report.retrained import retrained_view
from upweight.store import publish
from upweight.study import Study, Wish, summary, write_page

__all__ = ["Settings", "outcomes_of", "resumable", "validate"]


@final
@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        budget: seconds, or words.
        method: a row of ``upweight methods``.
        damping: added to the curvature.
        truth: a directory of outcomes; None for one beside the recipe's name.
    """

    budget: str
    method: str
    damping: Damping
    truth: Path | None


def validate(recipe: Path, place: Place, settings: Settings) -> int:
    """Load a recipe, explain its queries, spend the budget, and write the run directory.

    Raises:
        UpweightError: of the kind that tells what is at fault; no run directory is written then.
    """
    clock = Clock()
    seconds_of(settings.budget)  # a wrong one is refused before anything is computed
    loaded = load(recipe)
    study = Study(loaded, Wish(settings.method, settings.damping, removals=0), name=recipe.stem)
    clock.say(f"loaded {recipe}")
    out = place.out or Path(f"upweight-{recipe.stem}-evidence")
    kept = settings.truth or outcomes_of(recipe, loaded, study.influence.data, study.queries)
    with resumable(kept), publish(out, study.identity, replace=place.replace) as part:
        queries, examples = study.scores.shape
        clock.say(f"explained {queries:,} queries by {examples:,} training examples")
        found = study.influence.evidence(
            study.queries,
            budget=settings.budget,
            how=loaded.how,
            path=kept,
            scores=study.scores,
        )
        cost = found.cost
        clock.say(f"{cost.trainings:,} trainings in {spoken(cost.seconds)}: {found.truth}")
        study.evidence = found
        study.write_into(part)
        content = summary(loaded.title, [study], study.identity)
        write_page(part, content)
    clock.say(f"wrote {out}")
    say()
    _print(found, content["models"][0])
    say(f"Open {out / 'report.html'}")
    return 0


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Whoever interrupts long training is told what is kept of it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not path.exists():
            raise
        raise KeyboardInterrupt(
            f"Outcomes so far are kept in {path}; the same command goes on from them."
        ) from stop


def outcomes_of(path: Path, recipe: Recipe, train: Data, queries: Data) -> Path:
    """Where outcomes are kept: beside the recipe's name, by a hash of what they rest on.

    The method is not among it: all methods share one truth.
    """
    data = (train.fingerprint(), queries.fingerprint())
    objective = (recipe.loss, recipe.l2, recipe.removal, recipe.measure, recipe.parameters)
    known = fingerprint((recipe.model.state_dict(), data, objective, recipe.how))
    return Path(f"upweight-{path.stem}-truth") / known


def _print(found: Evidence, model: Mapping[str, Any]) -> None:
    """The verdict, and a table for each question."""
    view = retrained_view(model)
    assert view is not None
    say(found.verdict.sentence)
    heads = ("method", view.statistic, "95 %", "scores ahead by", "r", "slope", "95 %")
    for one in view.found:
        say()
        table(f"{one.question[:1].upper()}{one.question[1:]}, {one.basis}", heads, one.rows)
    for note in found.notes:
        say(note)
