"""The 1,797 handwritten digits of the UCI repository, with some labels flipped on purpose."""

from dataclasses import dataclass
from importlib import resources
from typing import final

import numpy as np
import torch
from torch import Tensor

from upweight.data import Data

__all__ = ["Split", "pixels_and_labels", "split"]

TRAIN = 1300
FLIPPED_SHARE = 0.05
BRIGHTEST = 16.0


def pixels_and_labels() -> tuple[Tensor, Tensor]:
    """Pixels ``[1797, 64]`` from 0 to 1 in float64, and labels ``[1797]``.

    Example:
        >>> pixels, labels = pixels_and_labels()
        >>> tuple(pixels.shape), labels[:4].tolist()
        ((1797, 64), [0, 1, 2, 3])
    """
    place = resources.files("upweight.demo") / "digits.npz"
    with place.open("rb") as file, np.load(file, allow_pickle=False) as found:
        pixels, labels = found["pixels"], found["labels"]
    flat = torch.from_numpy(pixels).double().flatten(1)
    return flat / BRIGHTEST, torch.from_numpy(labels).long()


@final
@dataclass(frozen=True)
class Split:
    """Digits to train on, a share of them with a wrong label, and digits to test on.

    Ids are places in the file, so that no example of the test set shares one with the training set.

    Attributes:
        train: pixels and labels, some flipped.
        train_ids: ``[n]``.
        test: pixels and labels, all true.
        test_ids: ``[t]``.
        flipped: ids of the training examples with a flipped label.
    """

    train: tuple[Tensor, Tensor]
    train_ids: np.ndarray
    test: tuple[Tensor, Tensor]
    test_ids: np.ndarray
    flipped: np.ndarray

    def queries(self, places: Tensor) -> Data:
        """Test digits at some places, with their ids."""
        pixels, labels = self.test
        return Data.of((pixels[places], labels[places]), ids=self.test_ids[places].tolist())


def split(seed: int = 0) -> Split:
    """Draw training and test digits and flip 5 % of the training labels to another class.

    Example:
        >>> digits = split(0)
        >>> len(digits.train_ids), len(digits.test_ids), len(digits.flipped)
        (1300, 497, 65)
    """
    draw = np.random.default_rng(seed)
    pixels, labels = pixels_and_labels()
    order = draw.permutation(len(labels))
    train, test = order[:TRAIN], order[TRAIN:]
    wrong = draw.choice(TRAIN, round(FLIPPED_SHARE * TRAIN), replace=False)
    given = labels[train]
    given[wrong] = (given[wrong] + torch.from_numpy(draw.integers(1, 10, len(wrong)))) % 10
    return Split((pixels[train], given), train, (pixels[test], labels[test]), test, train[wrong])
