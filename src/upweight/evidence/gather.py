"""From a budget to evidence: time one training, choose the trials it affords, spend it on them."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from upweight.data import Data
from upweight.errors import InputError
from upweight.evaluation.resampling import LEAST
from upweight.evidence.contenders import contenders
from upweight.evidence.contest import Contest
from upweight.evidence.designs import Design, Halves, OneByOne, TopGroups
from upweight.evidence.result import Evidence
from upweight.evidence.spending import Spending, spoken
from upweight.evidence.verdict import Cost
from upweight.prepared import Prepared
from upweight.retraining import How, Refit, Trials, Truth, retrain, seed_of
from upweight.risk import Risk
from upweight.scores import Scores

__all__ = [
    "MOST_REFIT_PARAMETERS",
    "Ask",
    "by_halves",
    "by_refits",
    "by_retraining",
    "evidence",
    "gather",
    "joined",
    "spend",
    "too_large_for_refits",
    "trained_again",
]

# Halves that are worth more than a few top groups, and as many as make intervals narrow.
GOOD_HALVES, MOST_HALVES, MOST_SINGLES = 20, 500, 1000
# A refit factorises the dense Hessian in float64: 0.8 GB here, three times that at its peak.
MOST_REFIT_PARAMETERS = 10_000
# A block of trials is at most so many times the one before, while the pace is still found out.
GROWTH = 4

Ask = Callable[[Trials], Truth]
"""Trains what the trials say and measures the queries; what is stored is not trained again."""


def joined(parts: list[Truth]) -> Truth:
    """One truth of several with the same seeds."""
    first = parts[0]
    trials, failures, start = first.trials, {}, 0
    for part in parts:
        failures.update({start + place: why for place, why in part.failures.items()})
        start += len(part.trials)
    for part in parts[1:]:
        trials = trials.then(part.trials)
    return replace(
        first,
        trials=trials,
        measured=np.concatenate([part.measured for part in parts]),
        failures=failures,
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def spend(design: Design, ask: Ask, spending: Spending, *, first: int) -> Truth:
    """Ask for the design's trials from the first on, as many as the budget pays for.

    Blocks grow, as the first ones take longer per trial than later ones, and take at most half of
    what is left, so that a wrong guess of the pace is found out before the budget is gone. The
    least that makes an interval is finished in any case.

    Args:
        design: with its trials in order.
        ask: for their truth.
        spending: what is left of the budget.
        first: units of the first block.
    """
    parts: list[Truth] = []
    done, size = 0, first
    while done < len(design.trials):
        units = spending.affords() // design.unit
        if parts and units < 1 and done >= design.least:
            break
        size = first if not parts else max(min(GROWTH * size, -(-units // 2)), 1)
        stop = min(done + design.unit * size, len(design.trials))
        parts.append(_timed(ask, design.trials.take(np.arange(done, stop)), spending))
        done = stop
    return joined(parts)


def _timed(ask: Ask, trials: Trials, spending: Spending) -> Truth:
    start = spending.spent
    truth = ask(trials)
    spending.observe(len(trials), spending.spent - start)
    return truth


def by_refits(contest: Contest, ask: Ask, spending: Spending) -> tuple[Design, Truth]:
    """Leave single examples out: random and influential ones in turn.

    Raises:
        InputError: too few examples for an interval.
    """
    design = OneByOne(contest.scores, count=MOST_SINGLES)
    return design, spend(design, ask, spending, first=design.least)


def by_retraining(
    contest: Contest, ask: Ask, spending: Spending, *, seed: int
) -> tuple[Design, Truth]:
    """Time a training or two, choose what the budget affords, and spend it.

    Many halves with two seeds each, which say how well scores predict and what the best prediction
    reaches; where only few trainings are affordable, the examples that matter most to each query.

    Args:
        contest: who is judged.
        ask: for the truth of trials.
        spending: the budget.
        seed: with which the model at hand was made; the other is the next.

    Raises:
        InputError: the budget pays for neither, with what it would take.
    """
    queries, examples = contest.scores.shape
    both = (seed, seed + 1)
    _probe(ask, spending, Trials.subsets(examples, count=1, fraction=0.5, seeds=[seed]))
    if LEAST <= _halves(spending) < GOOD_HALVES:
        # What only the first call takes, as to start processes, must not decide.
        _probe(ask, spending, Trials.subsets(examples, count=2, fraction=0.5, seeds=both))
    halves = _halves(spending)
    enough = queries >= LEAST and spending.affords() >= 2 * LEAST
    design: Design
    if halves >= GOOD_HALVES or (halves >= LEAST and not enough):
        count = min(MOST_HALVES, max(GOOD_HALVES, 8 * halves))
        design = Halves(examples, count=count, seeds=both)
    elif enough:
        design = TopGroups(contest, queries=queries, seed=seed)
    else:
        raise _too_little(spending, 2 * LEAST + (1 if queries >= LEAST else 2))
    return design, spend(design, ask, spending, first=1)


def _halves(spending: Spending) -> int:
    """Halves with two seeds each that are affordable, beside a second training of all data."""
    return (spending.affords() - 1) // 2


def _probe(ask: Ask, spending: Spending, trials: Trials) -> None:
    """Time some trials, each of which trains a model, and so does all of the data."""
    start = spending.spent
    ask(trials)
    spending.observe(2 * len(set(trials.seeds.tolist())), spending.spent - start)


def by_halves(ask: Ask, examples: int, spending: Spending, *, seed: int, least: int) -> Truth:
    """As many random halves as a budget pays for, trained with the model's own seed.

    Args:
        ask: for the truth of trials.
        examples: N.
        spending: the budget.
        seed: with which the model at hand was made.
        least: halves without which the truth is of no use.

    Raises:
        InputError: the budget pays for fewer, with what it would take.
    """
    _probe(ask, spending, Trials.subsets(examples, count=1, fraction=0.5, seeds=[seed]))
    affordable = spending.affords()
    if affordable < least:
        raise _too_little(spending, least + 1)
    design = Halves(examples, count=min(MOST_HALVES, 8 * affordable), seeds=(seed,))
    return spend(design, ask, spending, first=least)


def _too_little(spending: Spending, least: int) -> InputError:
    """What the smallest evidence would take."""
    pace = spending.pace or 0.0
    return InputError(
        f"A budget of {spoken(spending.budget)} is too small: one training takes {spoken(pace)}, "
        f"and the smallest evidence takes {least} of them. Pass budget="
        f"'{spoken(1.2 * least * pace)}' or more, or fewer examples."
    )


def too_large_for_refits(size: int, remedy: str) -> str | None:
    """Why a model of so many parameters is not refitted, and what to do; None where it is.

    Example:
        >>> too_large_for_refits(100, "") is None
        True
    """
    if size <= MOST_REFIT_PARAMETERS:
        return None
    return (
        f"refits factorise a dense Hessian, and {size:,} parameters are more than "
        f"{MOST_REFIT_PARAMETERS:,}. {remedy}"
    )


def trained_again(how: How | None, size: int, remedy: str) -> How:
    """How models are trained again: as is said, or by refits.

    Args:
        how: what is said.
        size: parameters of the model.
        remedy: what to do where refits are too large.

    Raises:
        InputError: the model is too large for refits, and nothing else is said.

    Example:
        >>> trained_again(None, 100, "") == Refit()
        True
    """
    if how is not None:
        return how
    reason = too_large_for_refits(size, remedy)
    if reason is not None:
        raise InputError(f"{reason[:1].upper()}{reason[1:]}")
    return Refit()


def gather(
    made: Prepared,
    queries: Data,
    scores: Scores,
    *,
    how: How | None,
    spending: Spending,
    path: Path,
) -> Evidence:
    """Spend a budget on the most telling truth that it affords, and judge the scores by it.

    Args:
        made: the model, its data and a method.
        queries: that were explained.
        scores: of them.
        how: models are trained again; refits by default.
        spending: the budget.
        path: a directory that keeps every outcome.

    Raises:
        InputError: the budget is too small, or the model is too large for refits.
    """
    found, absent = contenders(made, queries, scores)
    sign = scores.meaning.helpful or 1
    contest = Contest(tuple(found), queries.ids, made.data.ids, made.shares, sign)
    risk = Risk(made.whole, made.data)
    remedy = (
        "Say how the model was trained: how=uw.Training(...), or a function (positions, seed) -> "
        "model."
    )
    way = trained_again(how, made.whole.space.size, remedy)

    def ask(trials: Trials) -> Truth:
        return retrain(risk, queries, trials, way, path=path)

    if isinstance(way, Refit):
        design, truth = by_refits(contest, ask, spending)
    else:
        design, truth = by_retraining(contest, ask, spending, seed=seed_of(way))
    return evidence(contest, design, truth, spending=spending, absent=absent)


def evidence(
    contest: Contest, design: Design, truth: Truth, *, spending: Spending, absent: Iterable[str]
) -> Evidence:
    """Judge all contenders by a truth.

    Args:
        contest: who is judged.
        design: how the truth is read.
        truth: of the design's trials.
        spending: what it cost.
        absent: baselines that these data do not have.

    Raises:
        InputError: too few trials have an outcome for an interval.
    """
    notes = (
        [f"Not compared, as these data do not have them: {', '.join(absent)}."] if absent else []
    )
    if not truth.reproduced:
        notes.append(
            f"All of the data trained again (seed {truth.own}) gave another model than the one "
            "that was explained, so that the truth is of other trainings of the same kind."
        )
    if truth.failures:
        place, why = next(iter(truth.failures.items()))
        notes.append(f"{len(truth.failures)} trials failed and are left out; trial {place}: {why}")
    return Evidence(
        design.findings(truth, contest),
        design.statistic(truth.meaning),
        design.points(truth, contest),
        truth.meaning,
        truth.how,
        Cost(len(truth.trials) + len(truth.whole), spending.spent, spending.pace or 0.0),
        tuple(notes),
    )
