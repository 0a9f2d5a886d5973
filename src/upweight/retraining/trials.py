"""Changed training sets, one retraining each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from upweight.errors import InputError

__all__ = ["Trials"]


@final
@dataclass(frozen=True)
class Trials:
    """What to train on, and with which seed, m times.

    Attributes:
        kind: in words, for tables: "half subsets", "leave one out".
        gone: examples that are left out, ``[m, N]``.
        seeds: of weights and batch order, ``[m]``.

    Raises:
        InputError: shapes differ, or a trial leaves nothing.

    Example:
        >>> Trials.subsets(6, count=2, fraction=0.5, seeds=[0, 1]).gone.sum(1)
        array([3, 3, 3, 3])
    """

    kind: str
    gone: np.ndarray
    seeds: np.ndarray

    def __post_init__(self) -> None:
        if (
            self.gone.ndim != 2
            or self.gone.dtype != bool
            or self.seeds.shape != self.gone.shape[:1]
        ):
            raise InputError(
                f"Trials are a boolean matrix [m, N] and seeds [m], got {self.gone.dtype}"
                f"{list(self.gone.shape)} and {list(self.seeds.shape)}."
            )
        if self.gone.all(1).any():
            raise InputError(
                f"Trial {int(self.gone.all(1).argmax())} leaves no example to train on."
            )

    def __len__(self) -> int:
        return len(self.gone)

    @classmethod
    def subsets(
        cls, examples: int, *, count: int, fraction: float, seeds: Sequence[int], draw: int = 0
    ) -> "Trials":
        """Random subsets that keep a fraction of the data, each with every seed.

        Args:
            examples: N.
            count: subsets.
            fraction: of the examples that stay, in (0, 1).
            seeds: of training.
            draw: seed of the subsets; the first ``count`` are the same for any count.
        """
        if not 0 < fraction < 1 or count < 1:
            raise InputError(
                f"fraction is in (0, 1) and count ≥ 1, got {fraction!r} and {count!r}."
            )
        left_out = examples - max(1, round(fraction * examples))
        gone = np.zeros((count, examples), dtype=bool)
        for row in range(count):
            order = np.random.default_rng((draw, row)).permutation(examples)
            gone[row, order[:left_out]] = True
        return cls._paired(f"random subsets of {fraction:.0%}", gone, seeds)

    @classmethod
    def without(
        cls, groups: Sequence[Sequence[int]], examples: int, seeds: Sequence[int]
    ) -> "Trials":
        """Leave one group of positions out at a time, each with every seed.

        Args:
            groups: positions, m groups of at least one.
            examples: N.
            seeds: of training.
        """
        gone = np.zeros((len(groups), examples), dtype=bool)
        for row, group in enumerate(groups):
            gone[row, np.asarray(group, dtype=np.int64)] = True
        single = all(len(group) == 1 for group in groups)
        return cls._paired("leave one out" if single else "leave a group out", gone, seeds)

    @classmethod
    def whole(cls, examples: int, seeds: Sequence[int]) -> "Trials":
        """All of the data, once for each seed: what changes are measured from."""
        return cls._paired("all data", np.zeros((1, examples), dtype=bool), seeds)

    @classmethod
    def _paired(cls, kind: str, gone: np.ndarray, seeds: Sequence[int]) -> "Trials":
        each = np.asarray(seeds, dtype=np.int64)
        return cls(kind, np.repeat(gone, len(each), axis=0), np.tile(each, len(gone)))
