"""MNIST, complete, in the original order."""

from dataclasses import dataclass

import numpy as np

from reproduce.datasets.files import content, folder

__all__ = ["Digits", "mnist", "ones_and_sevens"]

SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = {
    "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
HELD_OUT = 5_000


@dataclass(frozen=True)
class Digits:
    """Pixels in 0..1 as rows ``[n, 784]`` (float32) and labels ``[n]``."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def mnist() -> Digits:
    """MNIST, complete, in the original order.

    Raises:
        DataError: a file is truncated or has another content.
    """
    place = folder("mnist")
    raw = [content(place / name, SOURCE + name, total) for name, total in FILES.items()]
    images = [np.frombuffer(raw[i], np.uint8, offset=16).reshape(-1, 784) for i in (0, 2)]
    labels = [np.frombuffer(raw[i], np.uint8, offset=8).astype(np.int64) for i in (1, 3)]
    pixels = [part.astype(np.float32) / 255 for part in images]
    return Digits(pixels[0], labels[0], pixels[1], labels[1])


def ones_and_sevens() -> Digits:
    """The ones (+1) and sevens (−1) of MNIST as the paper splits it.

    The first 5,000 training images are set aside, which leaves 11,894 for training (6,179 ones,
    5,715 sevens) and 2,163 for testing.
    """
    digits = mnist()
    parts = []
    for x, y in (
        (digits.train_x[HELD_OUT:], digits.train_y[HELD_OUT:]),
        (digits.test_x, digits.test_y),
    ):
        kept = (y == 1) | (y == 7)
        parts += [x[kept], np.where(y[kept] == 1, 1, -1)]
    return Digits(*parts)
