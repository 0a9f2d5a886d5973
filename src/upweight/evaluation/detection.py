"""Finding wrong labels: how well a ranking of training examples puts them first."""

from dataclasses import dataclass
from typing import final

import numpy as np

from upweight.errors import InputError
from upweight.evaluation.ranks import midranks

__all__ = ["Detection", "detection"]


@final
@dataclass(frozen=True)
class Detection:
    """How well suspicion finds the examples that are wrong.

    Examples of equal suspicion may be checked in any order. What is said is the mean over all such
    orders, exactly, and not one that depends on how the data were sorted.

    Attributes:
        auc: probability that a wrong example is more suspicious than a right one, ties counting
            half; 0.5 for guesses.
        average_precision: mean precision where each wrong example is found, over thresholds.
        found: wrong examples found after checking 0, 1, ..., N, ``[N + 1]``.
    """

    auc: float
    average_precision: float
    found: np.ndarray

    def _checked(self, budget: int) -> float:
        if not 1 <= budget < len(self.found):
            raise InputError(
                f"A budget is between 1 and {len(self.found) - 1} examples, got {budget}."
            )
        return float(self.found[budget])

    def precision(self, budget: int) -> float:
        """Share of wrong examples among the first that are checked.

        Raises:
            InputError: fewer than one, or more examples than there are.
        """
        return self._checked(budget) / budget

    def recall(self, budget: int) -> float:
        """Share of the wrong examples that is found by checking this many.

        Raises:
            InputError: fewer than one, or more examples than there are.
        """
        return self._checked(budget) / float(self.found[-1])


def detection(suspicion: np.ndarray, wrong: np.ndarray) -> Detection:
    """Compare a ranking, most suspicious first, with what is known to be wrong.

    Args:
        suspicion: larger = checked earlier, ``[N]``; self-influence, for example.
        wrong: which examples are wrong, ``[N]``, boolean.

    Raises:
        InputError: shapes differ, a suspicion is NaN, or all or no examples are wrong.

    Source:
        Hanley & McNeil (1982) for the area as a rank statistic.

    Example:
        >>> found = detection(np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False]))
        >>> found.auc, found.found.tolist(), found.precision(2)
        (0.875, [0.0, 1.0, 1.5, 2.0, 2.0], 0.75)
    """
    if suspicion.shape != wrong.shape or suspicion.ndim != 1 or wrong.dtype != bool:
        raise InputError(
            f"Suspicion [N] and a boolean array [N] are needed, got {list(suspicion.shape)} and "
            f"{wrong.dtype}{list(wrong.shape)}."
        )
    if np.isnan(suspicion).any():
        raise InputError(
            f"{int(np.isnan(suspicion).sum())} suspicions are NaN and have no rank. Leave these "
            "examples out."
        )
    bad = int(wrong.sum())
    good = len(wrong) - bad
    if not bad or not good:
        raise InputError(
            f"{bad} of {len(wrong)} examples are wrong. At least one must be, and one must not."
        )
    ranks = midranks(suspicion)
    auc = (float(ranks[wrong].sum()) - bad * (bad + 1) / 2) / (bad * good)
    checked, hits = _thresholds(suspicion, wrong)
    gained = np.diff(hits, prepend=0)
    return Detection(
        auc,
        float((gained * hits / checked).sum() / bad),
        np.interp(np.arange(len(wrong) + 1), np.append(0, checked), np.append(0, hits)),
    )


def _thresholds(suspicion: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Examples checked, and wrong ones found, down to each distinct suspicion."""
    order = np.argsort(-suspicion, kind="stable")
    ordered = suspicion[order]
    last = np.append(ordered[1:] != ordered[:-1], True)
    return np.flatnonzero(last) + 1, np.cumsum(wrong[order])[last]
