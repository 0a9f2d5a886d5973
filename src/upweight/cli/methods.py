"""``upweight methods``: the table of methods, and what each would cost with a recipe."""

import re
import sys
from pathlib import Path

from upweight.bars import track
from upweight.cli.show import say, table
from upweight.damping import Damping
from upweight.data import Data
from upweight.errors import UpweightError
from upweight.methods import METHODS, Baseline, Method
from upweight.recipe import Recipe, load

__all__ = ["markdown", "methods", "update"]

BEGIN, END = "<!-- table of methods -->\n", "<!-- end -->\n"
MIB = 2**20


def methods(recipe: Path | None, damping: Damping) -> int:
    """Print every method, or what each would take with a recipe and why it would be refused.

    Raises:
        RecipeError: the recipe cannot be loaded.
    """
    if recipe is not None:
        _costs(load(recipe), damping)
        return 0
    rows = [(f"{r.name}\n({_kind(r)})", r.summary, r.assumes, r.when) for r in METHODS.values()]
    heads = ("method\n(curvature)", "what it is", "assumes", "when")
    table("upweight run RECIPE.py --method ...", heads, rows, ruled=True)
    say("What each would cost with your model: upweight methods RECIPE.py")
    return 0


def _kind(row: Method | Baseline) -> str:
    """The curvature of a row, if it has one."""
    if isinstance(row, Baseline):
        return "baseline"
    if row.solver is None:
        return "none"
    return row.curvature if isinstance(row.curvature, str) else type(row.curvature).__name__


def _costs(recipe: Recipe, damping: Damping) -> None:
    """A row for each method: passes, seconds and memory, or the reason why not."""
    queries, examples = Data.of(recipe.queries), Data.of(recipe.train)
    title = (
        f"{len(queries):,} queries, {len(examples):,} training examples; a pass is one forward and "
        "backward pass over these. Estimates for this machine:"
    )
    found = {name: _plan(recipe, name, queries, damping) for name in track(list(METHODS), "plans")}
    rows = [(name, *cells) for name, cells in found.items()]
    wide = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [(row[0], *(row[k].rjust(wide[k]) for k in (1, 2, 3)), row[4]) for row in rows]
    table(title, ("method", "passes", "seconds", "MiB", ""), lines)


def _plan(recipe: Recipe, name: str, queries: Data, damping: Damping) -> tuple[str, str, str, str]:
    """Passes, seconds, MiB and a note."""
    try:
        plan = recipe.influence(name, damping).plan(queries)
    except UpweightError as error:
        return "", "", "", f"refused: {_first_sentence(str(error))}"
    except RuntimeError as error:  # what torch cannot do with this model
        return "", "", "", f"fails: {_first_sentence(str(error))}"
    least = "" if plan.known else "≥ "
    unknown = [f"not counted: {stage.name}" for stage in plan.stages if not stage.known]
    return (
        f"{least}{plan.passes:,.{1 if plan.passes < 100 else 0}f}",
        f"{least}{plan.seconds:,.{2 if plan.seconds < 10 else 0}f}",
        f"{least}{plan.bytes / MIB:,.0f}",
        "; ".join((*unknown, *map(_first_sentence, plan.notes))),
    )


def _first_sentence(text: str) -> str:
    """What is at fault, without what to do about it."""
    return re.split(r"(?<=[.:])\s+(?=[A-Z])", " ".join(text.split()), maxsplit=1)[0]


def markdown() -> str:
    """The table of ``docs/methods.md``, one line for each method.

    Example:
        >>> markdown().splitlines()[0]
        '| method | curvature | what it is | assumes | when | cost before the scores |'
    """
    heads = ("method", "curvature", "what it is", "assumes", "when", "cost before the scores")
    rows = [
        (f"`{r.name}`", _kind(r), r.summary, r.assumes, r.when, r.cost or "ask `inf.plan`")
        for r in METHODS.values()
    ]
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines
    )


def update(page: Path) -> bool:
    """Bring the table of a page up to date; whether that changed anything."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    fresh = f"{before}{BEGIN}\n{markdown()}\n{END}{after}"
    page.write_text(fresh, encoding="utf-8")
    return fresh != text


if __name__ == "__main__":
    update(Path(sys.argv[1]))
