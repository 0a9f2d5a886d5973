"""Random numbers that belong to an example: the same however examples are batched or padded."""

from functools import cache

import torch
from torch import Tensor

__all__ = ["random_bits", "random_signs", "signs_of_bytes", "uniform"]

_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)


def _wrapped(value: int) -> int:
    """A 64-bit pattern as torch's signed integer."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A logical shift to the right."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def random_bits(positions: Tensor, count: int, seed: int) -> Tensor:
    """Words of 64 random bits ``[n, count]`` that depend on position, place and seed alone.

    However rows are batched or padded, a row gets the same words (SplitMix64, Steele, Lea &
    Flood, 2014, as a counter-based generator).

    Example:
        >>> words = random_bits(torch.tensor([3, 7]), 2, seed=0)
        >>> torch.equal(words[1:], random_bits(torch.tensor([7]), 2, seed=0))
        True
    """
    place = torch.arange(count, device=positions.device) * _wrapped(_MIX[0])
    row = positions[:, None] * _wrapped(_MIX[3]) + _wrapped((seed + 1) * _MIX[1])
    return _mixed(_mixed(row) + place)


def uniform(positions: Tensor, shape: torch.Size, seed: int) -> Tensor:
    """Numbers between 0 and 1, ``[n, *shape]``, that depend on position, place and seed alone.

    Example:
        >>> rows = uniform(torch.tensor([3, 7]), torch.Size([2]), seed=0)
        >>> torch.equal(rows[1:], uniform(torch.tensor([7]), torch.Size([2]), seed=0))
        True
    """
    bits = random_bits(positions, shape.numel(), seed)
    return (_shifted(bits, 11).double() / 2**53).view(len(positions), *shape)


def random_signs(positions: Tensor, shape: torch.Size, seed: int) -> Tensor:
    """Signs ``[n, *shape]``, int8, that depend on position, place and seed alone.

    More places along the first axis, or fewer along the last, leave the others as they are.

    Example:
        >>> rows = random_signs(torch.tensor([3, 7]), torch.Size([2, 3]), seed=0)
        >>> longer = random_signs(torch.tensor([7]), torch.Size([4, 3]), seed=0)
        >>> torch.equal(rows[1:], longer[:, :2])
        True
    """
    lines, width = (shape[:-1], shape[-1]) if shape else (shape, 1)
    words = random_bits(positions, lines.numel() * -(-width // 64), seed)
    codes = words.view(torch.uint8).flatten().int()
    signs = (
        signs_of_bytes(torch.int8, words.device)
        .index_select(0, codes)
        .view(len(positions), *lines, -1)
    )
    return signs[..., :width].reshape(len(positions), *shape)


@cache
def signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs of every byte, ``[256, 8]``."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (2 * bits - 1).to(device, dtype)


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _wrapped(_MIX[1])
    bits = (bits ^ _shifted(bits, 27)) * _wrapped(_MIX[2])
    return bits ^ _shifted(bits, 31)
