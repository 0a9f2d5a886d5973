"""Convolutions of one, two and three dimensions: patches are the right factors."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.gradients.rules.dense import bias_use
from upweight.gradients.watch import Given, Use, Watch, rule
from upweight.linalg import Outer

__all__ = ["convolve", "convolve_transposed"]

Sizes = int | Sequence[int]


def _each(value: Sizes, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value) * (count // len(value))


def _padding(kernel: Sequence[int], padding: Sizes | str, dilation: Sequence[int]) -> list[int]:
    """Zeros before and after every axis, the last axis first, as ``F.pad`` wants them."""
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        wide = _each(0 if isinstance(padding, str) else padding, len(kernel))
        pairs = [(p, p) for p in wide]
    return [p for pair in reversed(pairs) for p in pair]


def patches(x: Tensor, kernel: Sequence[int], settings: tuple[Any, ...]) -> Tensor:
    """Inputs under every position of the kernel, ``[n, c·k, s]``, from ``[n, c, *space]``."""
    stride, padding, dilation = settings
    # Views and one copy, in two dimensions too: several times as fast as F.unfold on a CPU.
    x = F.pad(x, _padding(kernel, padding, dilation))
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    space = len(kernel)
    order = (0, 1, *range(2 + space, 2 + 2 * space), *range(2, 2 + space))
    x = x.permute(order)
    n, c = x.shape[:2]
    return x.reshape(n, c * torch.Size(kernel).numel(), -1)


def _places(
    space: Sequence[int], kernel: Sequence[int], settings: tuple[Any, ...]
) -> tuple[int, ...]:
    """How many positions a kernel has along every axis."""
    stride, padding, dilation = settings
    sizes = zip(space, kernel, stride, _each(padding, len(kernel)), dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)


def _grouped(values: Tensor, groups: int, pictures: int) -> Tensor:
    """``[n·t, g·c, s]`` as ``[g, n, t·s, c]``; a view where each row is one picture."""
    s = values.shape[2]
    split = values.view(len(values) // pictures, pictures, groups, -1, s)
    return split.permute(2, 0, 1, 4, 3).flatten(2, 3)


def _settings(given: Given, kernel: Sequence[int]) -> tuple[Any, ...]:
    """Stride, padding and dilation."""
    space = len(kernel)
    return _each(given.stride, space), given.padding, _each(given.dilation, space)


CONVOLUTION = {
    "input": None,
    "weight": None,
    "bias": None,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
}


@rule(F.conv1d, F.conv2d, F.conv3d, takes=CONVOLUTION)
def convolve(watch: Watch, given: Given) -> Tensor:
    """Σ_s g_s ⊗ patch_s in every group of channels."""
    out: Tensor = given.run()
    weight, groups = given.weight, given.groups
    if watch.axis != 0 or out.dim() != weight.dim():
        return watch.skip(out)
    name, known = watch.name(weight), watch.name(given.bias)
    kernel, outputs, count = weight.shape[2:], weight.shape[0], watch.count
    x, settings = given.input.detach(), _settings(given, kernel)

    @cache
    def right() -> Tensor:  # the same for all slopes: made once for many backward passes
        return _grouped(patches(x, kernel, settings), groups, len(x) // count)

    def factors(slope: Tensor) -> Outer:
        return Outer(_grouped(slope.flatten(2), groups, len(slope) // count), right())

    shape = (groups, outputs // groups, weight[0].numel())
    use = None if name is None else Use(name, shape, factors, bias=known)
    return watch.keep(out, (use, _channel_bias(watch, known, outputs)), out.dim() - 1)


def _channel_bias(watch: Watch, name: str | None, channels: int) -> Use | None:
    use = bias_use(watch, name, channels)
    if use is None:
        return None
    count, summed = watch.count, use.factors

    def factors(slope: Tensor) -> Outer:
        return summed(slope.flatten(2).sum(2).view(count, -1, channels))

    return Use(use.name, use.shape, factors)


TRANSPOSED = {
    "input": None,
    "weight": None,
    "bias": None,
    "stride": 1,
    "padding": 0,
    "output_padding": 0,
    "groups": 1,
    "dilation": 1,
}


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, takes=TRANSPOSED)
def convolve_transposed(watch: Watch, given: Given) -> Tensor:
    """Σ_s x_s ⊗ patch_s of the gradient: the roles of input and output are exchanged."""
    out: Tensor = given.run()
    weight, groups = given.weight, given.groups
    if watch.axis != 0 or out.dim() != weight.dim():
        return watch.skip(out)
    name, known, kernel = watch.name(weight), watch.name(given.bias), weight.shape[2:]
    count = watch.count
    x, settings = given.input.detach(), _settings(given, kernel)

    def factors(slope: Tensor) -> Outer:
        right, pictures = patches(slope, kernel, settings), len(slope) // count
        if right.shape[2] > x[0, 0].numel():  # room that output padding made at the ends
            right = right.unflatten(2, _places(slope.shape[2:], kernel, settings))
            right = right[(..., *(slice(size) for size in x.shape[2:]))].flatten(2)
        return Outer(_grouped(x.flatten(2), groups, pictures), _grouped(right, groups, pictures))

    shape = (groups, weight.shape[0] // groups, weight[0].numel())
    use = None if name is None else Use(name, shape, factors)
    bias = _channel_bias(watch, known, out.shape[1])
    return watch.keep(out, (use, bias), out.dim() - 1)
