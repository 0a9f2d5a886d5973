"""``upweight demo``: two models of handwritten digits, from wrong labels to proof."""

from pathlib import Path

from upweight import __version__
from upweight.cli.options import Place
from upweight.cli.run import answer
from upweight.cli.show import Clock, say, table
from upweight.demo import MODELS, one_thread, split, study
from upweight.evaluation import Agreement
from upweight.fingerprints import fingerprint
from upweight.store import publish, write_manifest
from upweight.study import Study, summary, versions, write_page

__all__ = ["demo"]

TITLE = "Handwritten digits, 5 % of their labels wrong"


def demo(place: Place, seed: int) -> int:
    """Train, explain, audit, prove, and write the page.

    Raises:
        StoreError: the place belongs to another run or cannot be written.
    """
    clock = Clock()
    out = place.out or Path("upweight-demo")
    identity = fingerprint(("demo", __version__, seed))
    with one_thread(), publish(out, identity, replace=place.replace) as part:
        digits = split(seed)
        clock.say(
            f"{len(digits.train_ids):,} digits to train on, {len(digits.flipped)} of them with a "
            f"wrong label; {len(digits.test_ids)} to test on"
        )
        studies = []
        for model in MODELS:
            one = study(model, digits, seed)
            clock.say(f"{model.name}: trained to a gradient of {one.slope:.0e}")
            answer(one, clock)
            (part / model.folder).mkdir()
            one.write_into(part / model.folder)
            studies.append(one)
        write_page(part, summary(TITLE, studies, identity))
        write_manifest(
            part, {"kind": "demo", "identity": identity, "seed": seed, "versions": versions()}
        )
    say()
    _summarise(studies)
    clock.say(f"done; open {out / 'report.html'}")
    return 0


def _summarise(studies: list[Study]) -> None:
    """What the demo found, one column per model."""
    columns = [_column(one) for one in studies]
    table(
        TITLE,
        ("", *(one.name for one in studies)),
        [(label, *(column[label] for column in columns)) for label in columns[0]],
    )


def _column(one: Study) -> dict[str, str]:
    found = {column: one.found(column) for column in ("self_influence", "loss")}
    cells = dict(one.facts[:1])
    for column, counts in found.items():
        if counts is not None:
            where = f"Wrong labels in the first {counts['checked']} by {column.replace('_', '-')}"
            cells[where] = f"{counts['found']} of {counts['total']}"
    counts = found["loss"]
    if counts is not None:
        chance = counts["total"] * counts["checked"] / len(one.influence.data)
        cells["  ... at random, on average"] = f"{chance:.1f}"
    agreements = {} if one.proof is None else one.proof.agreements
    for name in ("most influential", "random"):
        cells[f"Predicted against refitted, {name}"] = _agreement(agreements.get(name))
    return cells


def _agreement(found: Agreement | None) -> str:
    if found is None:
        return "not proved"
    low, high = found.slope_interval
    return f"r {found.r:.4f}, slope {found.slope:.3f} [{low:.3f}, {high:.3f}]"
