"""Arrays as pictures: a PNG in a data URI, written with zlib and struct alone."""

import base64
import struct
import zlib

import numpy as np
import numpy.typing as npt

from upweight.errors import InputError

__all__ = ["picture"]

# Pictures are shown at 5 to 8 rem; more pixels than this only make the page heavier.
MAX_SIDE = 96


def picture(array: npt.ArrayLike) -> str:
    """An image as a ``data:image/png`` URI, at most 96 pixels a side.

    uint8 values are taken as they are, and so are colours already between 0 and 1; anything else
    is stretched from its own smallest value to its own largest. Larger images are reduced by
    averaging square blocks.

    Args:
        array: ``[h, w]``, ``[1, h, w]`` or ``[h, w, 1]`` in grey, ``[h, w, 3]`` or ``[3, h, w]``
            in colour.

    Raises:
        InputError: another shape, no pixels, not numbers, or a value that is NaN or infinite.

    Example:
        >>> picture(np.zeros((8, 8), np.uint8))[:22]
        'data:image/png;base64,'
    """
    pixels = _bytes(_reduce(_channels_last(np.asarray(array))))
    return "data:image/png;base64," + base64.b64encode(_png(pixels)).decode("ascii")


def _channels_last(array: np.ndarray) -> np.ndarray:
    """``[h, w, 1]`` or ``[h, w, 3]``; where both ends could be colours, the last axis is."""
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"A picture needs numbers; got an array of {array.dtype}. Pass an image of integers "
            "or floats."
        )
    if array.size:
        if array.ndim == 2:
            return array[:, :, None]
        if array.ndim == 3 and array.shape[2] in (1, 3):
            return array
        if array.ndim == 3 and array.shape[0] in (1, 3):
            return np.moveaxis(array, 0, 2)
    raise InputError(
        f"A picture is [h, w], [h, w, 3] or [3, h, w] with at least one pixel; got the shape "
        f"{list(array.shape)}. Reshape each example to its image, one at a time."
    )


def _reduce(array: np.ndarray) -> np.ndarray:
    """At most MAX_SIDE pixels a side, by averages of square blocks."""
    height, width, channels = array.shape
    block = -(-max(height, width) // MAX_SIDE)
    if block == 1:
        return array
    # Edges repeat, so that the last block of a row that does not divide is not darkened.
    padded = np.pad(array, [(0, -height % block), (0, -width % block), (0, 0)], mode="edge")
    rows, columns = padded.shape[0] // block, padded.shape[1] // block
    means = padded.reshape(rows, block, columns, block, channels).mean(axis=(1, 3))
    reduced: np.ndarray = means
    return np.rint(means).astype(np.uint8) if array.dtype == np.uint8 else reduced


def _bytes(array: np.ndarray) -> np.ndarray:
    """Values as uint8."""
    if array.dtype == np.uint8:
        return array
    values = array.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise InputError(
            "A picture needs finite values; got NaN or infinity. Look at the example's data, or "
            "replace them (numpy.nan_to_num)."
        )
    if array.dtype.kind == "f" and array.shape[2] == 3 and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    # Halves, because the difference of two huge floats overflows.
    half = high / 2 - low / 2
    stretched = (values / 2 - low / 2) / half if half > 0 else np.zeros_like(values)
    return np.rint(255 * stretched).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    """``[h, w, 1 or 3]`` uint8 as a PNG file: 8 bits, no filter, no interlace."""
    height, width, channels = pixels.shape
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # a filter byte, 0, begins each line
    lines[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND")


def _chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
