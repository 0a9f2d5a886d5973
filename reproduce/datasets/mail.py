"""Enron1: mail and spam, preprocessed by Metsis, Androutsopoulos and Paliouras (CEAS 2006)."""

from dataclasses import dataclass

import numpy as np

from reproduce.datasets.files import content, folder, joined, members, unpacked_tar

__all__ = ["Mail", "mail"]

SOURCE = "http://www2.aueb.gr/users/ion/data/enron-spam/preprocessed/enron1.tar.gz"
SHA256 = "f4867e0398b0cf7f9ff01e27a6b671fd01ffa8eec78a0ff82c8838f7569933eb"
SEED, TRAIN_SHARE = 0, 0.8


@dataclass(frozen=True)
class Mail:
    """Texts, and labels ``[n]``: 1 for spam, 0 for wanted mail ("ham")."""

    train: list[str]
    train_y: np.ndarray
    test: list[str]
    test_y: np.ndarray


def _letters(packed: bytes) -> bytes:
    """The mails of an archive as ``members`` takes them, without what a packer may add."""
    found = {name.split("/", 1)[-1]: value for name, value in members(unpacked_tar(packed)).items()}
    return joined({n: value for n, value in found.items() if n.startswith(("ham/", "spam/"))})


def mail() -> Mail:
    """4,137 mails for training and 1,035 for testing, in the proportion of the paper.

    The order is spam, then ham, each by file name, shuffled with NumPy's legacy seed 0. The code
    of 2017 shuffled with the same seed, but what its folder listing began with is not known.

    Raises:
        DataError: the file is truncated or has another content.
    """
    raw = members(content(folder("enron1") / "enron1.tar.gz", SOURCE, SHA256, _letters))
    names = sorted(raw, key=lambda name: (not name.startswith("spam/"), name))
    order = np.arange(len(names))
    np.random.RandomState(SEED).shuffle(order)
    texts = [raw[names[i]].decode("latin-1") for i in order]
    spam = np.array([names[i].startswith("spam/") for i in order], dtype=np.int64)
    cut = int(TRAIN_SHARE * len(texts))
    return Mail(texts[:cut], spam[:cut], texts[cut:], spam[cut:])
