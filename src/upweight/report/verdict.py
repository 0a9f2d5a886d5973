"""How far the scores can be trusted, in words, from the evidence alone.

Every row of the evidence is graded by r (does the order hold?) and by the slope (does the size
hold?), and the weakest row decides: examples chosen for their large scores spread the points out
and so flatter r, which is why nothing is called good before random removals have been tried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from upweight.report.numbers import figure, finite, interval, percent

__all__ = ["Verdict", "verdict"]

GOOD_R, GOOD_LOW_R, GOOD_SLOPES = 0.95, 0.9, (0.8, 1.25)
USABLE_R = 0.5
ENOUGH_PAIRS = 10
LARGE_RESIDUAL = 0.01
FULL_COVERAGE = 0.999

NOT, PARTLY, GOOD = range(3)
CONSTANT = "Predicted or actual changes do not vary, so nothing can be said."
UNRELATED = "Do not act on these scores: what happened has little to do with them."
NOISY = "Use the scores to choose what to look at; single ones are noisy"
FEW = "All comparisons agree, but they are too few to rely on."
WORDS = {"good": "Good", "partly": "Partly", "not": "Do not rely on it"}


@final
@dataclass(frozen=True)
class Verdict:
    """What the evidence says about the scores.

    Attributes:
        grade: "good", "partly", "not" or "unchecked".
        word: the grade for a person.
        headline: one sentence of what may be done with the scores.
        basis: what the headline rests on.
        notes: what else limits it.
    """

    grade: str
    word: str
    headline: str
    basis: str
    notes: tuple[str, ...]


@final
@dataclass(frozen=True)
class _Row:
    """One row of the evidence with its grade."""

    row: Mapping[str, Any]
    grade: int
    headline: str

    @property
    def random(self) -> bool:
        return _is_random(self.row)


def _is_random(row: Mapping[str, Any]) -> bool:
    return "random" in str(row["name"]).lower()


def verdict(model: Mapping[str, Any]) -> Verdict:
    """The verdict on one model’s scores.

    Args:
        model: one entry of the summary's "models".

    Example:
        >>> row = {"name": "random", "r": 0.998, "r_interval": [0.99, 1], "slope": 1.01,
        ...        "slope_interval": [0.99, 1.02], "count": 40}
        >>> verdict({"evidence": {"agreements": [row], "points": []}}).headline
        'Predictions can be taken at face value.'
    """
    if model.get("retrained"):
        return _of_retraining(model)
    evidence = model.get("evidence") or {}
    grade_of = _ranked if model.get("per") else _graded
    rows = [grade_of(row) for row in evidence.get("agreements") or ()]
    notes = _solver_notes(model)
    if not rows:
        return Verdict(
            "unchecked",
            "Not checked",
            "Nothing here shows that the scores come true.",
            "No example was really removed and the model fitted again without it.",
            notes,
        )
    weakest = min(rows, key=lambda row: (row.grade, not row.random))
    grade, headline = weakest.grade, weakest.headline
    if not any(row.random for row in rows):
        notes = (
            "Only chosen examples were removed, none at random. Choosing large scores flatters r.",
            *notes,
        )
        if grade == GOOD:
            grade, headline = PARTLY, "Large scores come true; nothing is known of the others."
    name = {GOOD: "good", PARTLY: "partly", NOT: "not"}[grade]
    return Verdict(
        name, WORDS[name], headline, _basis(weakest.row, evidence.get("points") or ()), notes
    )


def _of_retraining(model: Mapping[str, Any]) -> Verdict:
    """What models that were trained again say, which is said with the numbers already."""
    part = model["retrained"]
    said, finding, cost = part["verdict"], part["findings"][0], part["cost"]
    grade = said["grade"] if said["grade"] in WORDS else "unchecked"
    question = str(finding["question"])
    about = question if question.startswith("on ") else f"for {question}"
    basis = (
        f"{cost['trainings']:,} models were trained again without {finding['trials']}; the answer "
        f"is given {about}."
    )
    word = WORDS.get(grade, "Cannot tell")
    return Verdict(grade, word, said["sentence"], basis, _solver_notes(model))


def _orders(row: Mapping[str, Any]) -> tuple[float | None, float]:
    """R, and the least that it may be; without an interval r speaks for itself."""
    r = finite(row.get("r"))
    low = finite((row.get("r_interval") or [None])[0])
    return r, (r or 0.0) if low is None else low


def _ranked(row: Mapping[str, Any]) -> _Row:
    """The grade of scores that are an order and no size."""
    r, low = _orders(row)
    if r is None:
        return _Row(row, NOT, CONSTANT)
    if r < USABLE_R or low <= 0:
        return _Row(row, NOT, UNRELATED)
    if r < GOOD_R or low < GOOD_LOW_R:
        return _Row(row, PARTLY, f"{NOISY}.")
    if row.get("count", 0) < ENOUGH_PAIRS:
        return _Row(row, PARTLY, FEW)
    return _Row(row, GOOD, "The order of the scores can be trusted; they say nothing of sizes.")


def _graded(row: Mapping[str, Any]) -> _Row:
    (r, low), slope = _orders(row), finite(row.get("slope"))
    if r is None or slope is None:
        return _Row(row, NOT, CONSTANT)
    if r < USABLE_R or low <= 0 or slope <= 0:
        return _Row(row, NOT, UNRELATED)
    sized = GOOD_SLOPES[0] <= slope <= GOOD_SLOPES[1]
    if r < GOOD_R or low < GOOD_LOW_R:
        size = "" if sized else f", and real changes are about {figure(slope, 2)} times as large"
        return _Row(row, PARTLY, f"{NOISY}{size}.")
    if not sized:
        return _Row(
            row,
            PARTLY,
            "The order of the scores can be trusted, their size cannot: real changes are about "
            f"{figure(slope, 2)} times as large.",
        )
    if row.get("count", 0) < ENOUGH_PAIRS:
        return _Row(row, PARTLY, FEW)
    return _Row(row, GOOD, "Predictions can be taken at face value.")


def _basis(row: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> str:
    """What was removed, how often, and how it came out."""
    removed = len({str(p.get("removed")) for p in points if p.get("kind") == row["name"]})
    count = row.get("count", 0)
    what = "at random" if _is_random(row) else f"({row['name']})"
    if removed:
        examples = f"{removed} example{'s' * (removed != 1)}"
        tried = f"{examples} removed {what}"
        pairs = f" ({count} pairs with the queries)" if count != removed else ""
    else:
        tried, pairs = f"{count} removals {what}", ""
    found = [f"{_r(row['r'])} {interval(row.get('r_interval'))}"]
    if finite(row.get("slope")) is not None:
        found.append(f"slope {figure(row['slope'])} {interval(row.get('slope_interval'), 2)}")
    # A line may not break inside either.
    numbers = ", ".join(text.replace(" ", "\u00a0") for text in found)
    return f"{tried} and the model fitted again without each{pairs}: {numbers}."


def _r(value: Any) -> str:
    number = finite(value)
    if number is None:
        return f"r = {figure(None)}"
    # Three figures would turn 0.9996 into a perfect 1.
    return "r > 0.999" if 0.9995 <= number < 1 else f"r = {number:.3f}".replace("-", "−")


def _solver_notes(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Limits that the evidence need not show: a rough inverse, parameters left out."""
    notes = []
    residual, coverage = finite(model.get("worst_residual")), finite(model.get("coverage"))
    if residual is not None and residual > LARGE_RESIDUAL:
        notes.append(
            "The inverse is approximated, to a relative residual of "
            f"{figure(residual, 2)} at worst."
        )
    if coverage is not None and coverage < FULL_COVERAGE:
        notes.append(f"The scores see {percent(coverage)} of the model’s parameters.")
    return tuple(notes)
