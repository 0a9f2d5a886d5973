"""Changed training sets, one retraining each."""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from upweight.errors import DataError, InputError

__all__ = ["Relabels", "Trials"]


@final
@dataclass(frozen=True)
class Relabels:
    """Examples that have another label in some trials.

    Attributes:
        trial: in which, ``[r]``.
        position: of the example, ``[r]``.
        label: the new one, ``[r, ...]``.
    """

    trial: np.ndarray
    position: np.ndarray
    label: np.ndarray

    def of(self, trials: np.ndarray) -> "Relabels | None":
        """Those of some trials ``[k]``, numbered from 0 in their order; None without any."""
        rank = np.full(int(max(self.trial.max(), trials.max())) + 1, -1)
        rank[trials] = np.arange(len(trials))
        here = rank[self.trial] >= 0
        if not here.any():
            return None
        return Relabels(rank[self.trial[here]], self.position[here], self.label[here])

    def like(self, targets: Tensor) -> Tensor:
        """The new labels in the dtype and on the device of targets ``[n, ...]``.

        Raises:
            DataError: a label has another shape, or a value that the targets cannot take.
        """
        label = torch.from_numpy(self.label)
        if label[0].numel() != targets[0].numel():
            raise DataError(
                f"New labels must have the shape of the old ones, {tuple(targets.shape[1:])}; got "
                f"{tuple(label.shape[1:])}."
            )
        cast = label.reshape(-1, *targets.shape[1:]).to(targets.dtype)
        if not torch.allclose(cast.double(), label.double().view_as(cast), equal_nan=True):
            raise DataError(
                f"A new label is not a value of the targets' dtype, {targets.dtype}: it would be "
                "rounded. Give labels of that kind."
            )
        return cast.to(targets.device)


@final
@dataclass(frozen=True)
class Trials:
    """What to train on, and with which seed, m times.

    Attributes:
        kind: in words, for tables: "half subsets", "leave one out".
        gone: examples that are left out, ``[m, N]``.
        seeds: of weights and batch order, ``[m]``.
        relabels: examples with other labels, or None.

    Raises:
        InputError: shapes differ, a trial leaves nothing, or a label is for no example.

    Example:
        >>> Trials.subsets(6, count=2, fraction=0.5, seeds=[0, 1]).gone.sum(1)
        array([3, 3, 3, 3])
    """

    kind: str
    gone: np.ndarray
    seeds: np.ndarray
    relabels: Relabels | None = None

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
        if self.relabels is not None:
            self._check_labels(self.relabels)

    def _check_labels(self, new: Relabels) -> None:
        places = (new.trial, new.position)
        outside = any(
            part.shape != new.label.shape[:1] or (part < 0).any() or (part >= count).any()
            for part, count in zip(places, self.gone.shape, strict=True)
        )
        if outside or self.gone[places].any():
            raise InputError(
                "Every new label belongs to a trial and to an example that is in it: trial [r], "
                f"position [r] and label [r, ...], got {new.trial.shape}, {new.position.shape} "
                f"and {new.label.shape} for trials {self.gone.shape}."
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
            draw: seed of the subsets, which all differ; the first are the same for any count.

        Raises:
            InputError: a setting is out of range, or there are fewer different subsets.
        """
        if not 0 < fraction < 1 or count < 1:
            raise InputError(
                f"fraction is in (0, 1) and count ≥ 1, got {fraction!r} and {count!r}."
            )
        left_out = examples - max(1, round(fraction * examples))
        if count > math.comb(examples, left_out):
            raise InputError(
                f"Of {examples} examples there are {math.comb(examples, left_out)} different "
                f"subsets of {examples - left_out}, and count={count} are asked for. Ask for fewer."
            )
        found: dict[bytes, np.ndarray] = {}
        for number in itertools.count():
            if len(found) == count:
                break
            gone = np.zeros(examples, dtype=bool)
            gone[np.random.default_rng((draw, number)).permutation(examples)[:left_out]] = True
            found.setdefault(gone.tobytes(), gone)
        return cls._paired(f"random subsets of {fraction:.0%}", np.stack([*found.values()]), seeds)

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
    def relabelled(
        cls,
        positions: Sequence[int] | np.ndarray,
        labels: np.ndarray,
        examples: int,
        *,
        seeds: Sequence[int],
    ) -> "Trials":
        """Give one example another label at a time, each with every seed.

        Args:
            positions: of the examples, ``[u]``.
            labels: their new labels, ``[u, ...]``.
            examples: N.
            seeds: of training.

        Example:
            >>> Trials.relabelled([3], np.array([1]), 6, seeds=[0, 1]).relabels.trial
            array([0, 1])
        """
        places, new = np.asarray(positions, dtype=np.int64), np.asarray(labels)
        if new.shape[:1] != places.shape:
            raise InputError(f"{len(places)} positions need as many labels, got {new.shape}.")
        blank = cls._paired("relabel one", np.zeros((len(places), examples), dtype=bool), seeds)
        each = len(seeds)
        relabels = Relabels(np.arange(len(blank)), places.repeat(each), new.repeat(each, axis=0))
        return cls(blank.kind, blank.gone, blank.seeds, relabels)

    @classmethod
    def whole(cls, examples: int, seeds: Sequence[int]) -> "Trials":
        """All of the data, once for each seed: what changes are measured from."""
        return cls._paired("all data", np.zeros((1, examples), dtype=bool), seeds)

    @classmethod
    def _paired(cls, kind: str, gone: np.ndarray, seeds: Sequence[int]) -> "Trials":
        each = np.asarray(seeds, dtype=np.int64)
        return cls(kind, np.repeat(gone, len(each), axis=0), np.tile(each, len(gone)))

    def whole_data(self) -> np.ndarray:
        """Which trials change nothing, ``[m]``."""
        found: np.ndarray = np.logical_not(self.gone.any(axis=1))
        if self.relabels is not None:
            found[self.relabels.trial] = False
        return found

    def take(self, rows: np.ndarray) -> "Trials":
        """Some of the trials, by their numbers ``[k]``."""
        relabels = None if self.relabels is None else self.relabels.of(rows)
        return Trials(self.kind, self.gone[rows], self.seeds[rows], relabels)

    def then(self, others: "Trials") -> "Trials":
        """These trials followed by others on the same data.

        Raises:
            InputError: they are of different data.
        """
        if self.gone.shape[1] != others.gone.shape[1]:
            raise InputError(
                f"Trials on {self.gone.shape[1]} and {others.gone.shape[1]} examples do not join."
            )
        parts = [
            Relabels(new.trial + start, new.position, new.label)
            for new, start in ((self.relabels, 0), (others.relabels, len(self)))
            if new is not None
        ]
        joined = (
            Relabels(
                *(np.concatenate([getattr(part, name) for part in parts]) for name in _RELABEL)
            )
            if parts
            else None
        )
        gone = np.concatenate([self.gone, others.gone])
        return Trials(self.kind, gone, np.concatenate([self.seeds, others.seeds]), joined)

    def changes(self) -> np.ndarray:
        """What each trial does to the data, as a hash of what is gone and new labels, ``[m]``."""
        found = [hashlib.sha256(np.packbits(row).tobytes()) for row in self.gone]
        for digest in found:
            digest.update(f"{self.gone.shape[1]};".encode())
        if self.relabels is not None:
            new = self.relabels
            for row in np.lexsort((new.position, new.trial)):
                label = new.label[row].tolist()
                found[new.trial[row]].update(f"{new.position[row]}={label!r};".encode())
        return np.array([digest.hexdigest()[:32] for digest in found])

    def keys(self) -> np.ndarray:
        """What each trial is, as a hash of its change of the data with its seed, ``[m]``.

        Example:
            >>> keys = Trials.subsets(6, count=2, fraction=0.5, seeds=[0]).keys()
            >>> bool(Trials.subsets(6, count=1, fraction=0.5, seeds=[0]).keys()[0] == keys[0])
            True
        """
        pairs = zip(self.changes().tolist(), self.seeds.tolist(), strict=True)
        return np.array([f"{change}:{seed}" for change, seed in pairs])


_RELABEL = ("trial", "position", "label")
