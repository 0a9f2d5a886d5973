"""What retraining found: measures of queries after each trial."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from upweight.meaning import Meaning
from upweight.retraining.trials import Trials

__all__ = ["Truth"]


@final
@dataclass(frozen=True)
class Truth:
    """Measures of queries under models that were really trained again.

    Attributes:
        trials: what each was trained on.
        query_ids: ``[q]``.
        measured: after each trial, ``[m, q]``; NaN where it failed.
        whole: after training on all of the data with each seed, ``[number of seeds, q]``.
        seeds: of the rows of ``whole``; those of the trials are among them.
        meaning: measure and unit.
        how: in words, what was trained and how.
        failures: trial to what went wrong.
    """

    trials: Trials
    query_ids: np.ndarray
    measured: np.ndarray
    whole: np.ndarray
    seeds: np.ndarray
    meaning: Meaning
    how: str
    failures: Mapping[int, str]

    def changes(self) -> np.ndarray:
        """What each trial changed, against all of the data with the same seed, ``[m, q]``."""
        base = self.whole[[self.seeds.tolist().index(seed) for seed in self.trials.seeds.tolist()]]
        change: np.ndarray = self.measured - base
        return change

    def by_seed(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct changes of the data ``[u, N]``, and what each changed ``[s, u, q]`` per seed.

        One row s is the answer for the model of that seed; their mean is the answer on average,
        and how far they are apart is the noise that bounds every prediction.
        """
        count = len(np.unique(self.trials.seeds))
        gone = self.trials.gone[::count]
        return gone, self.changes().reshape(len(gone), count, -1).swapaxes(0, 1)
