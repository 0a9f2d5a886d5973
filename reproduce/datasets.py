"""Real data: from the folder UPWEIGHT_DATA names, else fetched once from its public source.

Checksums are of the uncompressed content, because re-packed archives differ in their wrapper.
"""

import gzip
import hashlib
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from upweight.errors import DataError
from upweight.tables import atomic_write

__all__ = ["Digits", "mnist"]

MNIST_SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST = {
    "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@dataclass(frozen=True)
class Digits:
    """MNIST: pixels in 0..1 as rows ``[n, 784]`` (float32) and labels ``[n]``."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def _folder(name: str) -> Path:
    given = os.environ.get("UPWEIGHT_DATA")
    if given:
        return Path(given) / name
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "upweight" / name


def _verified(packed: bytes, name: str, expected: str) -> bytes:
    """The unpacked content, if it is the content that was meant."""
    try:
        content = gzip.decompress(packed)
    except (OSError, EOFError) as error:
        raise DataError(
            f"{name} is truncated or no gzip file ({error}). Fetch it again."
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(
            f"{name} has the wrong content: sha256 {found}, expected {expected}. Delete it and "
            "fetch it again."
        )
    return content


def _content(folder: Path, name: str, source: str, expected: str) -> bytes:
    path = folder / name
    if path.exists():
        return _verified(path.read_bytes(), str(path), expected)
    with urllib.request.urlopen(source + name, timeout=60) as reply:
        packed = reply.read()
    content = _verified(packed, source + name, expected)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, packed)
    return content


def mnist() -> Digits:
    """MNIST, complete, in the original order.

    Raises:
        DataError: a file is truncated or has another content.
    """
    folder = _folder("mnist")
    raw = [_content(folder, name, MNIST_SOURCE, total) for name, total in MNIST.items()]
    images = [np.frombuffer(raw[i], np.uint8, offset=16).reshape(-1, 784) for i in (0, 2)]
    labels = [np.frombuffer(raw[i], np.uint8, offset=8).astype(np.int64) for i in (1, 3)]
    pixels = [part.astype(np.float32) / 255 for part in images]
    return Digits(pixels[0], labels[0], pixels[1], labels[1])
