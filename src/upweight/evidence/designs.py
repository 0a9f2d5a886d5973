"""Which trials are worth their time, and what follows from what they find."""

import math
from abc import ABC, abstractmethod
from typing import final

import numpy as np

from upweight.errors import InputError
from upweight.evaluation import (
    Resamples,
    group_effects,
    own_changes,
    pooled,
    removal_curve,
    top_groups,
)
from upweight.evaluation.resampling import LEAST, Estimate
from upweight.evidence.contest import Contest, Question
from upweight.evidence.findings import AVERAGE, ONE, THIS, Finding, Points, Rating
from upweight.evidence.statistics import Ranking, Rise, Statistic
from upweight.meaning import Meaning
from upweight.retraining import Trials, Truth

__all__ = ["Design", "Halves", "OneByOne", "TopGroups"]

MOST, DRAWN, HALVES = "most influential", "random", "random halves of the data"
MOST_CHOSEN, TOP_SHARE = 20, 0.05
OTHERS = "other examples"
# A refit has no noise.
EXACT = Estimate(1.0, 1.0, 1.0)
UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))


class Design(ABC):
    """Trials in the order of their worth, and how their truth is read.

    Attributes:
        unit: trials that say something only together.
        least: trials without which there is no interval.
        trials: in order; any number of units from the start is a design too.
    """

    unit: int = 1
    least: int = LEAST
    trials: Trials

    @abstractmethod
    def statistic(self, meaning: Meaning) -> Statistic:
        """What methods are compared by."""

    @abstractmethod
    def findings(self, truth: Truth, contest: Contest) -> tuple[Finding, ...]:
        """What the trials found, the most telling first."""

    @abstractmethod
    def points(self, truth: Truth, contest: Contest) -> Points:
        """Predicted and actual changes, pair by pair."""


@final
class Halves(Design):
    """Random halves of the data, each trained with every seed (Park et al., 2023).

    Args:
        examples: N.
        count: halves at most; small data have fewer.
        seeds: of training, at least two for the noise of training to be known.

    Example:
        >>> Halves(100, count=9, seeds=(0, 1)).trials.seeds[:4]
        array([0, 1, 0, 1])
    """

    def __init__(self, examples: int, *, count: int, seeds: tuple[int, ...]) -> None:
        self.unit, self.least = len(seeds), LEAST * len(seeds)
        most = math.comb(examples, examples // 2)
        self.trials = Trials.subsets(examples, count=min(count, most), fraction=0.5, seeds=seeds)

    def statistic(self, meaning: Meaning) -> Statistic:
        """The linear datamodeling score."""
        del meaning
        return Ranking("LDS")

    def findings(self, truth: Truth, contest: Contest) -> tuple[Finding, ...]:
        """On average over the seeds, and for the seed that gave the model at hand."""
        gone, changes = truth.by_seed()
        average = Question(AVERAGE, HALVES, contest.ceiling(changes))
        asked = [(average, truth.on_average())]
        if truth.reproduced:
            asked.append((Question(THIS, HALVES), truth.this_model()))
        growth = contest.growth(gone)
        return tuple(
            contest.finding(question, gone, found.T, growth=growth) for question, found in asked
        )

    def points(self, truth: Truth, contest: Contest) -> Points:
        """One per query and half, the mean over seeds."""
        gone, _ = truth.by_seed()
        names = np.array([f"half {place}" for place in range(len(gone))])
        kinds = np.full(len(gone), HALVES)
        predicted = group_effects(contest.scores, gone) * contest.growth(gone)
        return Points(contest.query_ids, names, kinds, predicted, truth.on_average().T)


@final
class OneByOne(Design):
    """Single examples: random ones, by which methods are judged, and the most influential ones.

    Examples chosen for their large scores spread the changes out, which flatters correlations, so
    that both kinds are shown and the random ones come first.

    Args:
        scores: ``[q, N]``.
        count: removals at most.

    Raises:
        InputError: too few examples for an interval.

    Example:
        >>> OneByOne(np.eye(3, 40), count=30).kinds[:2].tolist()
        ['random', 'most influential']
    """

    least = 2 * LEAST

    def __init__(self, scores: np.ndarray, *, count: int) -> None:
        examples = scores.shape[1]
        if examples < self.least:
            raise InputError(
                f"At least {self.least} training examples are needed to remove {LEAST} at random "
                f"and {LEAST} that matter, got {examples}."
            )
        count = min(max(count, self.least), examples)
        chosen = _most_influential(scores, min(MOST_CHOSEN, count // 2))
        rest = np.setdiff1d(np.arange(examples), chosen)
        drawn = np.random.default_rng(0).permutation(rest)[: count - len(chosen)]
        # In turn, so that however few are tried, there are as many of each.
        pairs = list(zip(drawn, chosen, strict=False))
        order = [place for pair in pairs for place in pair] + drawn[len(pairs) :].tolist()
        self.positions = np.array(order, dtype=np.int64)
        self.kinds = np.where(np.isin(self.positions, chosen), MOST, DRAWN)
        self.trials = Trials.without([[place] for place in order], examples, [0])

    def statistic(self, meaning: Meaning) -> Statistic:
        """The datamodeling score of groups of one."""
        del meaning
        return Ranking("rank r")

    def findings(self, truth: Truth, contest: Contest) -> tuple[Finding, ...]:
        """Of the random examples, and of the most influential ones."""
        changes, kinds = truth.changes(), self.kinds[: len(truth.trials)]
        return tuple(
            contest.finding(
                Question(THIS, f"{kind} examples, one at a time", EXACT),
                truth.trials.gone[kinds == kind],
                changes[kinds == kind].T,
            )
            for kind in (DRAWN, MOST)
        )

    def points(self, truth: Truth, contest: Contest) -> Points:
        """One per query and removed example."""
        count = len(truth.trials)
        places = self.positions[:count]
        return Points(
            contest.query_ids,
            contest.train_ids[places],
            self.kinds[:count],
            contest.scores[:, places],
            truth.changes().T,
        )


def _most_influential(scores: np.ndarray, count: int) -> np.ndarray:
    """The largest scores of the queries in turn, each example once, ``[count]``."""
    ranked = np.argsort(-np.abs(scores), axis=1, kind="stable").T.ravel()
    _, first = np.unique(ranked, return_index=True)
    found: np.ndarray = ranked[np.sort(first)][:count]
    return found


@final
class TopGroups(Design):
    """For each query the examples that matter most to it, by the scores and by one baseline.

    What a query's own examples do is held against what the baseline's do, and against what those of
    other queries do to it: every retraining treats one query and is a control for the others.

    Args:
        contest: the scores, and the baselines to choose a rival from.
        queries: how many of the queries, from the first.
        seed: of training.
    """

    unit, least = 2, 2 * LEAST

    def __init__(self, contest: Contest, *, queries: int, seed: int) -> None:
        examples = contest.scores.shape[1]
        self.size, self.queries = max(1, round(TOP_SHARE * examples)), queries
        self.ours, self.rival = contest.contenders[0], contest.contenders[1]
        groups = [
            group.tolist()
            for pair in zip(
                top_groups(contest.helpful * self.ours.values[:queries], [self.size]),
                top_groups(contest.helpful * self.rival.values[:queries], [self.size]),
                strict=True,
            )
            for group in pair
        ]
        self.trials = Trials.without(groups, examples, [seed])

    def statistic(self, meaning: Meaning) -> Statistic:
        """How far a query moves without its own examples."""
        moves = "fall" if meaning.helpful < 0 else "rise"
        return Rise(f"{moves} of {meaning.measure.replace('_', ' ')}", meaning.unit)

    def findings(self, truth: Truth, contest: Contest) -> tuple[Finding, ...]:
        """The mean over queries of how far their own examples move them, the way that help does."""
        ours, rival = self._moves(truth, contest)
        count = len(ours)
        apart = ~np.eye(count, dtype=bool)
        others = np.nanmean(np.where(apart, ours, np.nan), axis=0)
        own, theirs = own_changes(ours, count)[0], own_changes(rival, count)[0]
        known = np.isfinite(own) & np.isfinite(theirs) & np.isfinite(others)
        first, *rest = (
            removal_curve([self.size], moves[None, known]).points[0]
            for moves in (own, theirs, others)
        )
        predicted = contest.helpful * self._predicted(contest, count)[known]
        r, slope = pooled(predicted[None], own[None, known], Resamples.two_way(known.sum(), 1))
        size = slope.estimate() if self.ours.sized else None
        names = ((self.rival.name, self.rival.words), ("others", OTHERS))
        ratings = [
            Rating(self.ours.name, self.ours.words, first.estimate(), None, r.estimate(), size)
        ]
        for (name, words), moves in zip(names, rest, strict=True):
            ahead = first.minus(moves).estimate()
            ratings.append(Rating(name, words, moves.estimate(), ahead, UNKNOWN, None))
        question = THIS if truth.reproduced else ONE
        trials = f"the {self.size:,} examples that matter most to a query"
        failed = int((~known).sum())
        return (Finding(question, trials, tuple(ratings), None, int(known.sum()), failed, 0),)

    def _moves(self, truth: Truth, contest: Contest) -> tuple[np.ndarray, np.ndarray]:
        """Changes the way that help does, after our groups and after the rival's, ``[n, n]``."""
        moves = contest.helpful * truth.changes()
        count = len(moves) // 2
        return moves[0::2, :count], moves[1::2, :count]

    def _predicted(self, contest: Contest, count: int) -> np.ndarray:
        """What the scores predict for each query without its own examples, ``[n]``."""
        predicted = group_effects(contest.scores[:count], self.trials.gone[: 2 * count : 2])
        return np.diagonal(predicted)

    def points(self, truth: Truth, contest: Contest) -> Points:
        """One per query and its own examples, NaN for those of others."""
        count = len(truth.trials) // 2
        ids = contest.query_ids[:count]
        own = np.eye(count, dtype=bool)
        predicted = group_effects(contest.scores[:count], self.trials.gone[: 2 * count : 2])
        actual = np.where(own, truth.changes()[0::2, :count].T, np.nan)
        names = np.array([f"the top {self.size} of {name}" for name in ids.tolist()])
        return Points(ids, names, np.full(count, "top examples"), predicted, actual)
