"""Method and damping chosen by what retraining found, and what the choice is worth elsewhere.

The best of many candidates looks better than it is on the changes by which it was chosen. So the
truth's changes are halved at random: one half chooses, and the other, which the choice has not
seen, says what is gained over the default.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from upweight.bars import track
from upweight.engine import located
from upweight.errors import InputError, NumericalError
from upweight.evaluation import Estimate, Resamples, Sampled, datamodeling_score, group_effects
from upweight.evaluation.resampling import LEAST
from upweight.explanation import Question, explain, sweep, usual_dampings
from upweight.outcomes import Outcomes
from upweight.prepared import Prepared
from upweight.tables import Table

__all__ = ["LEAST_CHANGES", "Candidate", "Setting", "Tuning", "candidates", "tuned"]

LEAST_CHANGES = 2 * LEAST
# Samples for the interval of each candidate, and for what is said of the one that was chosen.
FEW_DRAWS, DRAWS = 300, 2000


@final
@dataclass(frozen=True)
class Setting:
    """A method with a damping.

    Attributes:
        method: as it was asked for.
        name: its row of the method table.
        damping: added to its curvature; 0 where it has none.
    """

    method: object
    name: str
    damping: float

    def __str__(self) -> str:
        return f"{self.name} with damping {self.damping:.3g}"


@final
@dataclass(frozen=True)
class Candidate:
    """A setting and what it predicts.

    Attributes:
        setting: method and damping.
        predicted: change of each query's measure after each change of the data, ``[q, u]``; NaN
            where there is no answer.
    """

    setting: Setting
    predicted: np.ndarray


@final
@dataclass(frozen=True)
class Tuning:
    """Which method and damping predict best what retraining found.

    Attributes:
        settings: all that were tried, the default first.
        scores: linear datamodeling score of each on the changes that chose.
        best: which of them did best there.
        held_out: scores of the default and of the best on the other changes.
        gain: how far the best is ahead there.
        counts: changes that chose, and others.
        words: whose changes they were.
        how: what was trained and how.
        refused: settings that give no answer, with the reason.
    """

    settings: tuple[Setting, ...]
    scores: tuple[Estimate, ...]
    best: int
    held_out: tuple[Estimate, Estimate]
    gain: Estimate
    counts: tuple[int, int]
    words: str
    how: str
    refused: tuple[tuple[Setting, str], ...]

    @property
    def gained(self) -> bool:
        """Whether the best is ahead of the default beyond doubt, or the default has no answer."""
        return self.best > 0 and not self.gain.low <= 0

    @property
    def chosen(self) -> Setting:
        """The best setting if it gained, otherwise the default."""
        return self.settings[self.best if self.gained else 0]

    @property
    def sentence(self) -> str:
        """The outcome, for a person."""
        default, best = self.settings[0], self.settings[self.best]
        if not self.best:
            return f"Nothing that was tried is better than the default, {default}."
        before, after = self.held_out
        if any(setting == default for setting, _ in self.refused):
            return (
                f"{best} reaches {after} on the changes that did not choose it; the default, "
                f"{default}, gives no answer."
            )
        versus = (
            f"{best} reaches {after} on the changes that did not choose it, {default} (the "
            f"default) {before}: ahead by {self.gain}"
        )
        return f"{versus}." if self.gained else f"No gain is shown, keep the default: {versus}."

    def table(self) -> Table:
        """One row per setting: its score with interval on the changes that chose."""
        roles = ["default", *[""] * (len(self.settings) - 1)]
        roles[self.best] = "default, best" if not self.best else "best"
        columns = {
            "method": [one.name for one in self.settings],
            "damping": [one.damping for one in self.settings],
            "LDS": [one.value for one in self.scores],
            "low": [one.low for one in self.scores],
            "high": [one.high for one in self.scores],
            "": roles,
        }
        caption = f"LDS with 95 % intervals, of the {self.counts[0]} changes that chose."
        return Table(columns, caption)

    def _lines(self) -> list[str]:
        return [
            f"truth: {sum(self.counts)} changes, {self.counts[1]} of them held out; {self.words}; "
            f"{self.how}",
            *(f"refused: {setting}: {reason}" for setting, reason in self.refused),
        ]

    def __repr__(self) -> str:
        return "\n".join([self.sentence, "", repr(self.table()), *self._lines()])

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in self._lines())
        return f"<p><b>{html.escape(self.sentence)}</b></p>{self.table()._repr_html_()}{lines}"


def candidates(
    asked: Question, gone: np.ndarray, dampings: Sequence[float] | None
) -> tuple[list[Candidate], dict[float, str]]:
    """What a method predicts at its own damping and at others, from one fit and one pass.

    Args:
        asked: queries, and a method with a damping.
        gone: examples that each change leaves out, ``[u, N]``.
        dampings: others to try; by default around the curvature's mean eigenvalue.

    Returns:
        Candidates, the method's own damping first, and dampings that give no answer.

    Raises:
        InputError: the method predicts no change.
        NumericalError: no damping gives an answer.
    """
    made = asked.made
    made.refuse_ablation()
    name, method = made.fitted.name, made.asked
    with located(made.risk):
        if not made.fitted.fits:
            found, refused = {0.0: explain(asked)}, {}
        else:
            more = usual_dampings(made.curvature) if dampings is None else list(dampings)
            swept = sweep(asked, list(dict.fromkeys([made.shift, *more])))
            found, refused = dict(swept.scores), dict(swept.refused)
    return [
        Candidate(Setting(method, name, damping), group_effects(np.asarray(scores.values), gone))
        for damping, scores in found.items()
    ], refused


def tuned(
    methods: Sequence[Prepared],
    question: Callable[[Prepared], Question],
    outcomes: Outcomes,
    *,
    dampings: Sequence[float] | None,
    seed: int,
) -> Tuning:
    """Try methods with dampings, choose on half of the changes, and judge on the others.

    Args:
        methods: the default first, each with its own damping.
        question: queries, asked of a method.
        outcomes: what happened to these queries.
        dampings: to try beside each method's own.
        seed: of the halves.

    Raises:
        InputError: too few changes to choose by and to judge by, or a method predicts no change.
        NumericalError: no method with any damping gives an answer.
    """
    _require_removals(outcomes)
    found: list[Candidate] = []
    refused: list[tuple[Setting, str]] = []
    for made in track(methods, "methods", len(methods)):
        try:
            some, without = candidates(question(made), outcomes.trials.gone, dampings)
        except NumericalError as error:
            refused.append((Setting(made.asked, made.method.name, made.shift), str(error)))
            continue
        found += some
        pairs = without.items()
        refused += [(Setting(made.asked, made.method.name, at), why) for at, why in pairs]
    if not found:
        raise NumericalError(f"No method gives an answer. {refused[0][1]}")
    default = Setting(methods[0].asked, methods[0].method.name, methods[0].shift)
    if found[0].setting != default:
        found.insert(0, Candidate(default, np.full(outcomes.actual.shape, np.nan)))
    return _judged(found, outcomes, refused, seed)


def _require_removals(outcomes: Outcomes) -> None:
    if outcomes.trials.relabels is not None or not outcomes.trials.gone.any(1).all():
        raise InputError(
            "Methods are compared by removals. Leave new labels and unchanged data out of the "
            "truth's trials: Trials.subsets(...) makes random halves."
        )
    if len(outcomes) < LEAST_CHANGES:
        failed = f" ({outcomes.failed} failed)" if outcomes.failed else ""
        raise InputError(
            f"To choose by {LEAST} changes of the data and to judge by {LEAST} others takes "
            f"{LEAST_CHANGES} with an outcome, got {len(outcomes)}{failed}. Retrain "
            f"{LEAST_CHANGES - len(outcomes)} more."
        )


def _judged(
    found: Sequence[Candidate],
    outcomes: Outcomes,
    refused: Sequence[tuple[Setting, str]],
    seed: int,
) -> Tuning:
    """The best candidate of one half of the changes, judged by the other."""
    order = np.random.default_rng(seed).permutation(len(outcomes))
    chose, rest = np.array_split(order, 2)
    scores = _scores(found, outcomes, chose, FEW_DRAWS)
    values = np.array([one.value for one in scores])
    if not np.isfinite(values).any():
        raise InputError("No prediction varies among the changes, so that none can be chosen.")
    best = int(np.nanargmax(values))
    default, ahead = _scores([found[0], found[best]], outcomes, rest, DRAWS)
    return Tuning(
        settings=tuple(one.setting for one in found),
        scores=tuple(one.estimate() for one in scores),
        best=best,
        held_out=(default.estimate(), ahead.estimate()),
        gain=ahead.minus(default).estimate(),
        counts=(len(chose), len(rest)),
        words=outcomes.words,
        how=outcomes.how,
        refused=tuple(refused),
    )


def _scores(
    found: Sequence[Candidate], outcomes: Outcomes, changes: np.ndarray, draws: int
) -> list[Sampled]:
    """The datamodeling score of each candidate on some changes, by the same samples."""
    actual = outcomes.actual[:, changes]
    resamples = Resamples.two_way(len(changes), len(actual), draws=draws)
    nothing = Sampled(np.nan, np.full(draws, np.nan))
    return [
        datamodeling_score(one.predicted[:, changes], actual, resamples=resamples).sampled
        if np.isfinite(one.predicted).all()
        else nothing
        for one in found
    ]
