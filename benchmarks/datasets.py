"""The data of the tasks, from the folder that UPWEIGHT_DATA names. Needs numpy alone.

CIFAR-10 needs Pillow too, when it is decoded into scratch.
"""

import gzip
import io
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

__all__ = ["Arrays", "cifar", "digits", "read_idx", "scratch", "shakespeare", "source"]

Arrays = dict[str, np.ndarray]
QUERIES = 100


def source(name: str) -> Path:
    """A data set's file or folder.

    Raises:
        SystemExit: UPWEIGHT_DATA is unset or has no such entry.
    """
    folder = os.environ.get("UPWEIGHT_DATA")
    if not folder or not (Path(folder) / name).exists():
        raise SystemExit(f"Set UPWEIGHT_DATA to the folder that holds {name}.")
    return Path(folder) / name


def scratch(task: str) -> Path:
    """Where a task keeps its data, weights, truth and scores."""
    base = os.environ.get("UPWEIGHT_SCRATCH") or Path(tempfile.gettempdir()) / "upweight-bench"
    return Path(base) / task


def read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes of an idx file behind its header."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), dtype=np.uint8, offset=header).copy()


def digits(name: str, n: int, shape: tuple[int, ...]) -> Arrays:
    """Part of MNIST or a data set in its format: ``n`` seeded training images, 100 test images."""
    folder = source(name)
    train = read_idx(folder / "train-images-idx3-ubyte.gz", 16).reshape(-1, *shape)
    test = read_idx(folder / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, *shape)
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz", 8)
    test_labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", 8)
    rows = np.sort(np.random.default_rng(0).choice(len(train), n, replace=False))
    return _images((train[rows], labels[rows]), (test[:QUERIES], test_labels[:QUERIES]))


def cifar(n: int) -> Arrays:
    """Part of CIFAR-10: ``n / 10`` training images of each class, ten test images of each."""
    with zipfile.ZipFile(source("cifar10/cifar10_subset_20k_5k.zip")) as file:
        train, test = _mosaics(file, "train", n // 10), _mosaics(file, "test", QUERIES // 10)
    return _images(train, test)


def _mosaics(file: zipfile.ZipFile, split: str, each: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of each class in turn: pixels ``[n, 3, 32, 32]`` and labels."""
    from PIL import Image  # noqa: PLC0415 - peers have no Pillow

    pixels = []
    for name in sorted(x for x in file.namelist() if Path(x).name.startswith(f"{split}_")):
        mosaic = np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB"))
        tiles = mosaic.reshape(-1, 32, 50, 32, 3).transpose(0, 2, 4, 1, 3)
        pixels.append(tiles.reshape(-1, 3, 32, 32)[:each])
    return np.stack(pixels, 1).reshape(-1, 3, 32, 32), np.tile(np.arange(len(pixels)), each)


def shakespeare(n: int, length: int) -> Arrays:
    """Sequences of characters and the ones that follow; queries are from the last tenth."""
    with gzip.open(source("text/tinyshakespeare.txt.gz"), "rt", encoding="utf-8") as file:
        text = file.read()
    known = {letter: number for number, letter in enumerate(sorted(set(text)))}
    codes = np.array([known[letter] for letter in text], dtype=np.int64)
    cut = len(codes) * 9 // 10
    random = np.random.default_rng(0)
    starts = random.choice(cut // length - 1, n, replace=False) * length
    asked = cut + random.choice((len(codes) - cut) // length - 1, QUERIES, replace=False) * length
    window = np.arange(length + 1)
    train, test = codes[starts[:, None] + window], codes[asked[:, None] + window]
    arrays = (train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:])
    return dict(zip(_NAMES, arrays, strict=True))


_NAMES = ("inputs", "labels", "query_inputs", "query_labels")


def _images(train: tuple[np.ndarray, ...], test: tuple[np.ndarray, ...]) -> Arrays:
    """Pixels in 0 to 1 and labels, by name."""
    parts = []
    for pixels, labels in (train, test):
        parts += [(pixels / 255).astype(np.float32), labels.astype(np.int64)]
    return dict(zip(_NAMES, parts, strict=True))
