"""``upweight run``: a user's own recipe, explained, audited and proved."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from upweight.cli.options import Asked, Place
from upweight.cli.show import Clock, say, table
from upweight.recipe import load
from upweight.report.verdict import verdict
from upweight.report.views import differing, sides
from upweight.store import publish
from upweight.study import Study, Wish, summary, write_page

__all__ = ["answer", "run"]

SHOWN = 6


def run(recipe: Path, place: Place, asked: Asked, *, dry_run: bool) -> int:
    """Load a recipe, study it, and write the run directory.

    Raises:
        UpweightError: of the kind that tells what is at fault; nothing is written then.
    """
    clock = Clock()
    wish = Wish(asked.method, asked.damping, asked.top, asked.removals, asked.seed)
    loaded = load(recipe)
    study = Study(loaded, wish, name=recipe.stem)
    clock.say(f"loaded {recipe}")
    if dry_run:
        say(repr(study.influence.plan(study.queries)))
    for line in _besides(study):
        say(f"            {line}")
    if dry_run:
        return 0
    out = place.out or Path(f"upweight-{recipe.stem}")
    with publish(out, study.identity, replace=place.replace) as part:
        answer(study, clock)
        study.write_into(part)
        content = summary(loaded.title, [study], study.identity)
        write_page(part, content)
    clock.say(f"wrote {out}")
    say()
    says = content["models"][0]
    trust = verdict(says)
    say(f"{trust.word}: {trust.headline}")
    for note in trust.notes:
        say(note)
    say()
    _queries(says)
    if says["suspects"]:
        _suspects(says["suspects"])
    say(f"Open {out / 'report.html'}")
    return 0


def answer(study: Study, clock: Clock) -> None:
    """Compute the parts of a study, saying what came out of each."""
    queries, examples = study.scores.shape
    clock.say(
        f"{study.name}: explained {queries:,} queries by {examples:,} training examples "
        f"({study.scores.provenance.method})"
    )
    if study.audit is not None:
        clock.say(f"{study.name}: ranked labels by self-influence")
    if study.proof is not None:
        clock.say(f"{study.name}: removed {len(study.proof.removed)} examples and refitted")
        for line in study.proof.lines():
            say(f"            {line}")
    for note in study.notes:
        say(f"            {note}")


def _besides(study: Study) -> Iterator[str]:
    """What a run does besides the scores, which are all that a plan estimates."""
    if study.audited:
        yield f"audit (self-influence of {len(study.influence.data):,} examples): not estimated"
    if study.refits:
        refits = f"{study.refits:,} refits of {study.influence.objective.space.size:,} parameters"
        yield f"removals ({refits}): not estimated; --removals 0 leaves them out"


def _queries(says: Mapping[str, Any]) -> None:
    """The first example on either side of the first queries."""
    helpful, harmful = sides(says).values()
    rows = []
    for query in says["queries"][:SHOWN]:
        firsts = [
            f"{side[0]['id']}  {side[0]['label']}  {side[0]['score']:+.2g}" if side else "none"
            for side in (query["helpful"], query["harmful"])
        ]
        rows.append((str(query["id"]), query["title"], *firsts))
    heads = ("query", "", f"{helpful.lower()} (id, label, score)", harmful.lower())
    table(says["sentence"], heads, rows)


def _suspects(suspects: Mapping[str, Any]) -> None:
    """The first rows of the audit."""
    rows = [
        (
            str(row["id"]),
            row["given"] or "",
            row["predicted"] or "",
            "yes" if row["issue"] else "",
            f"{row['self_influence']:+.2g}",
            f"{row['loss']:.2g}",
        )
        for row in suspects["rows"][:SHOWN]
    ]
    heads = ("id", "given", "predicted", "differs", "self-influence", "loss")
    table(suspects["caption"], heads, rows)
    if suspects["differing"]:
        say(differing(suspects))
