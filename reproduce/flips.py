"""Flipped labels in mail: bags of words, scores that should find the flips, refits that pay.

The parts of Figure 6; ``fig6_mail`` puts them together.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.special import expit, log_expit
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer
from sklearn.model_selection import StratifiedKFold

import upweight as uw
from reproduce.datasets import mail
from reproduce.minima import linear
from reproduce.sparse_logistic import LeaveOneOut, leave_one_out, minimum
from upweight.bars import track

__all__ = [
    "BEST", "CLEANLAB", "CLEANLAB_BEST", "CORRECTED", "INFLUENCE", "LOSS", "OUTSIDE", "PUBLISHED",
    "RANDOM", "REFITTED", "TOKENS", "WITH_L2", "Bag", "Settings", "bag_of_words", "choose",
    "flipped", "library_check", "one_repeat", "tolerance_check",
]  # fmt: skip

INFLUENCE, LOSS, RANDOM = "influence", "train loss", "random"
PUBLISHED, WITH_L2 = "influence, code of 2017", "influence with the L2 part"
CORRECTED, OUTSIDE, CLEANLAB = "influence / (1 − h)", "leave-one-out loss", "cleanlab's score"
BEST, CLEANLAB_BEST = "best", "cleanlab's score, best L2"
REFITTED = (INFLUENCE, PUBLISHED, LOSS, RANDOM, CLEANLAB, BEST)
WORD = re.compile(r"(?u)\b[^\W\d_]{2,}\b")
ENDING = re.compile(r"(?<=\w{4})(ing|ed|es|s|ly)$")


@dataclass(frozen=True)
class Settings:
    """Repeats of the figure, of other tokens and of the choice; ``mails`` thins for a quick run."""

    repeats: int = 40
    other_repeats: int = 5
    choice_repeats: int = 4
    mails: int | None = None
    tokens: str = "words without stop words"
    l2: float = 1e-4
    choice_l2: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 1e-1)
    budgets: int = 6
    flip_level: int = 2
    refit_tolerance: float = 1e-4


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _content_words(text: str) -> list[str]:
    return [word for word in _words(text) if word not in ENGLISH_STOP_WORDS]


def _stems(text: str) -> list[str]:
    return [ENDING.sub("", word) for word in _content_words(text)]


TOKENS: dict[str, Callable[[str], list[str]]] = {
    "words without stop words": _content_words, "all words": _words,
    "stems without stop words": _stems,
}  # fmt: skip


@dataclass(frozen=True)
class Bag:
    """Counts of words, labels ±1, and K = X Xᵀ of the training mails."""

    x: sparse.csr_array
    signs: np.ndarray
    test_x: sparse.csr_array
    test_signs: np.ndarray
    kernel: np.ndarray = field(repr=False)

    def accuracy(self, row: np.ndarray) -> float:
        """Share of test mails on the right side."""
        return float(((self.test_x @ row > 0) == (self.test_signs > 0)).mean())


def bag_of_words(settings: Settings, tokens: str) -> Bag:
    """The vocabulary is what at least five training mails have."""
    data, cut = mail(), slice(settings.mails)
    counter = CountVectorizer(analyzer=TOKENS[tokens], min_df=5)
    x = counter.fit_transform(data.train[cut]).astype(float).tocsr()
    test = counter.transform(data.test[cut]).astype(float).tocsr()
    return Bag(x, 2.0 * data.train_y[cut] - 1, test, 2.0 * data.test_y[cut] - 1,
               (x @ x.T).toarray())  # fmt: skip


def flipped(bag: Bag, settings: Settings, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions that are flipped, and the labels after it; level 2 is a tenth."""
    n = len(bag.signs)
    wrong = np.random.RandomState(seed).choice(n, settings.flip_level * (n // 20), replace=False)
    signs = bag.signs.copy()
    signs[wrong] *= -1
    return wrong, signs


def _scores(found: LeaveOneOut, signs: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of one fitted model that need no second one; large is suspicious."""
    outside = -log_expit(found.outside_margin)
    # How much relabelling an example lowers the mean leave-one-out loss of all.
    pull = found.carried(signs * expit(-found.outside_margin))
    # At the minimum λθ is Xᵀ of this over n, so H⁻¹ of the L2 part is carried over too.
    slope = signs * expit(-found.margin) / len(signs)
    return {
        INFLUENCE: found.self_influence,
        WITH_L2: found.self_influence - slope * found.carried(slope),
        PUBLISHED: found.fall,
        LOSS: found.loss,
        CORRECTED: found.self_influence / (1 - found.leverage),
        OUTSIDE: outside,
        "leave-one-out − train loss": outside - found.loss,
        "relabelling, on leave-one-out risk": -signs * pull,
    }


def _out_of_sample(bag: Bag, signs: np.ndarray, l2: float, seed: int) -> np.ndarray:
    """Margins under models of five folds: minus this ranks like cleanlab's self-confidence.

    Self-confidence is the out-of-sample probability of the given label (Northcutt et al., 2021);
    with two classes it orders as its normalised margin does.
    """
    margins = np.empty(len(signs))
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    for kept, held in folds.split(np.zeros(len(signs)), signs):
        row = minimum(bag.x[kept], signs[kept], l2, tolerance=1e-5)
        margins[held] = signs[held] * (bag.x[held] @ row)
    return margins


def _found(score: np.ndarray, wrong: np.ndarray, budgets: int) -> np.ndarray:
    """Share of the flips among the highest 5, 10, ... % of a score."""
    first = np.argsort(-score, kind="stable")
    hits = np.isin(first, wrong).cumsum() / len(wrong)
    return hits[[(len(score) // 20) * (k + 1) - 1 for k in range(budgets)]]


def choose(bag: Bag, settings: Settings) -> dict[str, Any]:
    """Share found by every candidate at every L2, on draws that the figure does not use."""
    names, table = [], []
    for draw in track(range(settings.choice_repeats), "choosing", settings.choice_repeats):
        wrong, signs = flipped(bag, settings, 10_000 + 2 * draw)
        lines = {}
        for l2 in (settings.l2, *settings.choice_l2):
            margin = signs * (bag.x @ minimum(bag.x, signs, l2))
            for name, score in _scores(leave_one_out(bag.kernel, margin, l2), signs).items():
                lines[f"{name}|{l2:g}"] = _found(score, wrong, settings.budgets)
        names, table = list(lines), [*table, list(lines.values())]
    return {"names": names, "found": np.mean(table, axis=0)}


def _refits(
    bag: Bag, signs: np.ndarray, order: np.ndarray, settings: Settings, start: np.ndarray
) -> list[float]:
    """Test accuracy after checking more and more of an order, each refit from the one before."""
    row, fixed, found = start, signs.copy(), []
    for k in range(settings.budgets):
        checked = order[: (len(signs) // 20) * (k + 1)]
        fixed[checked] = bag.signs[checked]
        row = minimum(bag.x, fixed, settings.l2, start=row, tolerance=settings.refit_tolerance)
        found.append(bag.accuracy(row))
    return found


def one_repeat(
    bag: Bag, settings: Settings, repeat: int, best: tuple[str, float] | None
) -> dict[str, Any]:
    """One draw of flips: what every score finds and what the refits reach. Seeds as in 2017."""
    seed = 120 * (settings.flip_level - 1) + 2 * repeat
    wrong, signs = flipped(bag, settings, seed)
    row = minimum(bag.x, signs, settings.l2)
    margin = signs * (bag.x @ row)
    scores = _scores(leave_one_out(bag.kernel, margin, settings.l2), signs)
    scores[RANDOM] = -np.argsort(np.random.RandomState(seed + 1).permutation(len(signs)))
    if best is not None:
        name, l2 = best
        other = signs * (bag.x @ minimum(bag.x, signs, l2))
        scores[BEST] = _scores(leave_one_out(bag.kernel, other, l2), signs)[name]
        scores[CLEANLAB] = -_out_of_sample(bag, signs, settings.l2, repeat)
        scores[CLEANLAB_BEST] = -_out_of_sample(bag, signs, l2, repeat)
    names = [name for name in REFITTED if name in scores]
    accuracy = [
        _refits(bag, signs, np.argsort(-scores[n], kind="stable"), settings, row) for n in names
    ]
    return {
        "names": list(scores), "found": [_found(s, wrong, settings.budgets) for s in scores.values()],
        "refitted": names, "accuracy": accuracy, "flipped": bag.accuracy(row),
    }  # fmt: skip


def library_check(bag: Bag, settings: Settings) -> dict[str, Any]:
    """The first repeat through the library: its audit against the n x n form used for all."""
    _, signs = flipped(bag, settings, 120 * (settings.flip_level - 1))
    row = minimum(bag.x, signs, settings.l2, tolerance=1e-11)
    found = leave_one_out(bag.kernel, signs * (bag.x @ row), settings.l2)
    scores = _scores(found, signs)
    model = linear(bag.x.shape[1])
    model.weight.data = torch.from_numpy(row)[None]
    data = (torch.from_numpy(bag.x.toarray()), torch.from_numpy((signs > 0).astype(float)))
    differ, seconds, first = {}, {}, len(signs) // 10
    for removal, name in (("sum", INFLUENCE), ("mean", WITH_L2)):
        objective = uw.Objective(model, "binary_cross_entropy", l2=settings.l2, removal=removal)
        start = time.process_time()
        table = uw.Influence(objective, data).audit()
        seconds[removal] = time.process_time() - start
        mine = scores[name][table["id"]]
        differ[removal] = np.abs(table["self_influence"] - mine).max() / mine.max()
        same = np.isin(table["id"][:first], np.argsort(-scores[INFLUENCE], kind="stable")[:first])
        print(f"audit, removal={removal!r}: {seconds[removal]:.0f} CPU s, off by "
              f"{differ[removal]:.1e}, {same.mean():.1%} of the first tenth", flush=True)  # fmt: skip
    return {"differ": list(differ.values()), "seconds": list(seconds.values()), "same": same.mean()}


def tolerance_check(bag: Bag, settings: Settings) -> dict[str, Any]:
    """What the tolerance of the refits does to test accuracy: one repeat, refitted to 1e-9."""
    _, signs = flipped(bag, settings, 120 * (settings.flip_level - 1))
    row = minimum(bag.x, signs, settings.l2)
    order = np.argsort(signs * (bag.x @ row), kind="stable")
    tight = Settings(**{**vars(settings), "refit_tolerance": 1e-9})
    both = [_refits(bag, signs, order, asked, row) for asked in (settings, tight)]
    difference = np.subtract(*both)
    return {"largest": np.abs(difference).max(), "mean": difference.mean()}
