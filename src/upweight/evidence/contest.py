"""All contenders under one truth: the same trials, the same queries, the same bootstrap samples."""

from dataclasses import dataclass
from itertools import combinations
from typing import final

import numpy as np

from upweight.evaluation import (
    Estimate,
    Resamples,
    Sampled,
    datamodeling_score,
    group_effects,
    outcomes,
    pooled,
)
from upweight.evaluation.ceiling import spearman_brown
from upweight.evidence.contenders import Contender
from upweight.evidence.findings import Finding, Rating

__all__ = ["Contest", "Question"]

MOST_DRAWS, LEAST_DRAWS = 2000, 300
# Ranks of samples that are made for one finding: about a second.
MOST_RANKS = 2**24


@final
@dataclass(frozen=True)
class Question:
    """What is asked of a truth.

    Attributes:
        name: "this model" or "on average over trainings".
        trials: what was removed in each trial, in words.
        ceiling: what the best possible prediction reaches; None where it is unknown.
    """

    name: str
    trials: str
    ceiling: Estimate | None = None


@final
@dataclass(frozen=True)
class Contest:
    """Who predicts, of which queries and examples.

    Attributes:
        contenders: the scores first.
        query_ids: ``[q]``.
        train_ids: ``[N]``.
        shares: of each training example in the mean, ``[N]``.
        helpful: +1 where the loss of a helpful example raises the measure, −1 where it lowers it.

    Example:
        >>> scores = np.random.default_rng(0).normal(size=(2, 12))
        >>> ours = Contender("exact", "these scores", scores, sized=True)
        >>> contest = Contest((ours,), np.arange(2), np.arange(12), np.full(12, 1 / 12), 1)
        >>> found = contest.finding(Question("this model", "each"), np.eye(12, dtype=bool), scores)
        >>> print(found.ours.order)
        1.00 [1.00, 1.00]
    """

    contenders: tuple[Contender, ...]
    query_ids: np.ndarray
    train_ids: np.ndarray
    shares: np.ndarray
    helpful: int

    @property
    def scores(self) -> np.ndarray:
        """The scores, ``[q, N]``."""
        return self.contenders[0].values

    def growth(self, gone: np.ndarray) -> np.ndarray:
        """How much more what stays weighs without some examples, ``[m]``: 2 without a half.

        Scores are summed as if the curvature stayed whole. It loses the group's part too, and where
        a group is like the rest, its effect is this many times the sum of its scores.

        Args:
            gone: ``[m, N]``.
        """
        found: np.ndarray = 1 / (1 - gone @ self.shares)
        return found

    def ceiling(self, changes: np.ndarray) -> Estimate | None:
        """What the best possible prediction of the mean over seeds reaches; None for one seed.

        √(s r / (1 + (s − 1) r)), r the rank correlation of two seeds' changes, the mean over pairs
        of seeds and over queries (Spearman, 1910); its interval is over other trials and queries.

        Args:
            changes: ``[s, u, q]``.
        """
        kept = np.isfinite(changes).all((0, 2))
        seeds, rows = len(changes), changes[:, kept].swapaxes(1, 2)
        if seeds < 2:
            return None
        resamples = Resamples.two_way(rows.shape[2], rows.shape[1], draws=self.draws(rows[0]))
        pairs = [rows[[a, b]] for a, b in combinations(range(seeds), 2)]
        agreed = [datamodeling_score(*pair, resamples=resamples).sampled for pair in pairs]
        value = np.array([np.mean([one.value for one in agreed])])
        draws = np.mean([one.draws for one in agreed], axis=0)
        best, drawn = (np.sqrt(spearman_brown(r, seeds)) for r in (value, draws))
        return Sampled(float(best[0]), drawn).estimate()

    def draws(self, table: np.ndarray) -> int:
        """Bootstrap samples that a table ``[q, m]`` of each contender leaves time for."""
        ranks = max(table.size * len(self.contenders), 1)
        return int(np.clip(MOST_RANKS // ranks, LEAST_DRAWS, MOST_DRAWS))

    def finding(
        self,
        asked: Question,
        gone: np.ndarray,
        measured: np.ndarray,
        *,
        growth: np.ndarray | None = None,
    ) -> Finding:
        """Every contender's predictions of groups held against what happened.

        Args:
            asked: the question that this answers.
            gone: examples left out, ``[m, N]``.
            measured: change of each query's measure, ``[q, m]``; NaN where a trial failed.
            growth: factor on the sum of a group's scores, ``[m]``; 1 by default.

        Raises:
            InputError: too few trials have an outcome for an interval.
        """
        kept = outcomes(measured)
        factor = np.ones(len(gone)) if growth is None else growth
        gone, measured, factor = gone[kept], measured[:, kept], factor[kept]
        resamples = Resamples.two_way(measured.shape[1], len(measured), draws=self.draws(measured))
        ratings: list[Rating] = []
        ours: Sampled | None = None
        constant = 0
        for one in self.contenders:
            predicted = group_effects(one.values, gone) * factor
            order = datamodeling_score(predicted, measured, resamples=resamples)
            r, slope = pooled(predicted, measured, resamples)
            ahead = None if ours is None else ours.minus(order.sampled).estimate()
            if ours is None:
                ours, constant = order.sampled, order.constant
            size = slope.estimate() if one.sized else None
            rating = Rating(one.name, one.words, order.estimate, ahead, r.estimate(), size)
            ratings.append(rating)
        return Finding(
            asked.name,
            asked.trials,
            tuple(ratings),
            asked.ceiling,
            int(kept.sum()),
            int((~kept).sum()),
            constant,
        )
