"""Cat against dog: 500 + 500 training and 200 + 200 test images of CIFAR-10, 32 x 32.

Which images these are stands in ``cats.txt``, by their names in the public PNG copy of CIFAR-10
(Krizhevsky, 2009). They are read from a packed subset where there is one, else from that copy.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from reproduce.datasets.files import content, folder

__all__ = ["Cats", "cats"]

COMMIT = "a828d74fc38cd82a82ecfdeca6522873baf96efa"
SOURCE = f"https://codeload.github.com/cyizhuo/CIFAR-10-dataset/zip/{COMMIT}"
FILE = "cifar10_subset_20k_5k.zip"
CONTENT = "6ae796f6dd3a1023c750276a3b4ffd5b316b14cd88469dba9ccc990358eb7b8a"
NAMES = Path(__file__).with_name("cats.txt")
CLASSES = {"cat": 3, "dog": 5}
SIDE, ACROSS = 32, 50


@dataclass(frozen=True)
class Cats:
    """Levels 0..255 as ``[n, 3, 32, 32]`` (uint8) and labels ``[n]``: 1 = dog, 0 = cat."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def _image(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def _mosaics(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """Images of the packed subset by split/class/name."""
    rows = [line.split(",") for line in archive.read("index.csv").decode().split()[1:]]
    found = {}
    for split in ("train", "test"):
        for kind, label in CLASSES.items():
            whole = _image(archive.read(f"{split}_{label}_{kind}.webp"))
            tiles = whole.reshape(-1, SIDE, ACROSS, SIDE, 3).swapaxes(1, 2)
            tiles = tiles.reshape(-1, SIDE, SIDE, 3)
            for part, number, place, name in rows:
                if part == split and int(number) == label:
                    found[f"{split}/{kind}/{name}"] = tiles[int(place)]
    return found


def _pixels(packed: bytes) -> bytes:
    """Pixels of the listed images in the order of the list, from either archive."""
    wanted = NAMES.read_text().split()
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        names = archive.namelist()
        if "index.csv" in names:
            images = _mosaics(archive)
        else:
            places = {"/".join(name.split("/")[-3:]): name for name in names}
            images = {name: _image(archive.read(places[name])) for name in wanted}
    return b"".join(images[name].tobytes() for name in wanted)


def cats() -> Cats:
    """The images, cats and dogs in turn as in the list.

    Raises:
        DataError: the archive is truncated or has another content.
    """
    raw = content(folder("cifar10") / FILE, SOURCE, CONTENT, _pixels)
    x = np.frombuffer(raw, np.uint8).reshape(-1, SIDE, SIDE, 3).transpose(0, 3, 1, 2)
    names = NAMES.read_text().split()
    y = np.array([int("/dog/" in name) for name in names])
    train = np.array([name.startswith("train/") for name in names])
    return Cats(x[train], y[train], x[~train], y[~train])
