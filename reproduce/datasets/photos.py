"""Dog against fish: English springers and tenches of Imagenette, squeezed to 224 x 224.

A stand-in for the paper's photographs (the wide synsets n02084071 and n02512053), which could not
be had. Everything in a network trained on ImageNet has seen most of these.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from reproduce.datasets.files import content, folder, joined, members

__all__ = ["Photos", "photos"]

COMMIT = "b850f030ff0701c36a4adc8b928ea9483a46915b"
SOURCE = f"https://codeload.github.com/thunderInfy/imagenette/zip/{COMMIT}"
FILE = "imagenette_tench_springer_224.zip"
CONTENT = "328775bf9501407ed1b2fdf780b1fa69785d2ae396a5411e395b90ee0b29f942"
FISH, DOG = "n01440764", "n02102040"


@dataclass(frozen=True)
class Photos:
    """Levels 0..255 as ``[n, 3, 224, 224]`` (uint8) and labels ``[n]``: 1 = dog, 0 = fish."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def _both_classes(packed: bytes) -> bytes:
    """The photographs of the two classes, from our archive or from the whole repository's."""
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        found = {}
        for item in archive.infolist():
            parts = item.filename.split("/")[-3:]
            if not item.is_dir() and len(parts) == 3 and parts[1] in (FISH, DOG):
                found["/".join(parts)] = archive.read(item)
    return joined(found)


def _decoded(files: Sequence[bytes]) -> np.ndarray:
    images = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    return np.stack(images).transpose(0, 3, 1, 2)


def photos(train: int = 900, test: int = 300) -> Photos:
    """The first photographs of each class in the order of their names, fish before dogs.

    Args:
        train: of each class, 955 at most.
        test: of each class, 387 at most.

    Raises:
        DataError: the archive is truncated or has another content.
    """
    files = members(content(folder("dogfish") / FILE, SOURCE, CONTENT, _both_classes))
    parts = []
    for split, count in (("train", train), ("val", test)):
        names = [
            name
            for kind in (FISH, DOG)
            for name in sorted(n for n in files if n.startswith(f"{split}/{kind}/"))[:count]
        ]
        parts += [_decoded([files[name] for name in names])]
        parts += [np.array([int(f"/{DOG}/" in name) for name in names])]
    return Photos(*parts)
