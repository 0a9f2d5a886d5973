"""Parameters that scale, shift or are copied: gradients in the parameter's own shape."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.gradients.watch import Given, Use, View, Watch, rule
from upweight.linalg import Outer
from upweight.linalg.columns import formed

__all__ = ["add", "expand", "multiply", "own_use", "prelu", "subtract"]

_NONE: Any = object()


def matrix_shape(shape: torch.Size) -> tuple[int, int, int]:
    """A parameter of any shape as one matrix: its last axis, and all the others."""
    width = shape[-1] if shape else 1
    return 1, math.prod(shape) // width if width else 0, width


def as_outer(matrices: Tensor, shape: torch.Size) -> Outer:
    """Formed gradients ``[n, *shape]`` as outer products with the rows of an identity."""
    return formed(matrices.reshape(len(matrices), *matrix_shape(shape)))


def _reduced(values: Tensor, shape: torch.Size) -> Tensor:
    """``[n, ...]`` summed over what a parameter of that shape was broadcast over."""
    inner = values.dim() - 1
    if inner < len(shape):
        values = values.reshape(len(values), *[1] * (len(shape) - inner), *values.shape[1:])
        inner = len(shape)
    lead = inner - len(shape)
    values = values.sum(tuple(range(1, 1 + lead))) if lead else values
    wide = tuple(1 + k for k, n in enumerate(shape) if n == 1 and values.shape[1 + k] != 1)
    return values.sum(wide, keepdim=True) if wide else values


def own_use(watch: Watch, source: View, formed: Callable[[Tensor], Tensor]) -> Use:
    """The use of a parameter whose gradient is formed, ``[n, *broadcast shape]``."""
    shape, count = source.tensor.shape, watch.count

    def factors(slope: Tensor) -> Outer:
        values = formed(slope)
        if len(values) != count:  # several pictures or windows of one row
            values = values.unflatten(0, (count, -1))
        return as_outer(source.pull(_reduced(values, shape)), source.shape)

    return Use(source.name, matrix_shape(source.shape), factors)


def _batch_first(watch: Watch, x: Tensor, dim: int) -> Callable[[], Tensor]:
    """The other operand, batch first, with the rank of the output."""
    axis, n = watch.axis, watch.count

    def spread() -> Tensor:
        wide = x.reshape(*[1] * (dim - x.dim()), *x.shape)
        if axis == 1:
            wide = wide.movedim(1, 0)
        return wide if axis is not None else wide.expand(n, *wide.shape)

    return spread


def _fits(watch: Watch, out: Tensor, parameter: Tensor) -> bool:
    """Whether the batch is an axis of its own that the parameter was broadcast over."""
    axis = watch.axis
    if watch.axes is None:
        return True
    if axis is None:
        return out.shape == parameter.shape
    whole = out.shape[axis] == watch.count or (axis == 0 and out.shape[0] % watch.count == 0)
    return whole and (parameter.dim() < out.dim() - axis or parameter.shape[axis - out.dim()] == 1)


TWO = {"input": None, "other": None}


@rule(
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply),
    takes=TWO,
)
def multiply(watch: Watch, given: Given) -> Tensor:
    """G ∘ x, summed over what the parameter was broadcast over."""
    out: Tensor = given.run()
    parameter, x = given.input, given.other
    if watch.source(parameter) is None:
        parameter, x = x, parameter
    source = watch.source(parameter)
    if source is None or watch.source(x) is not None:
        return out
    if not _fits(watch, out, parameter):
        return watch.skip(out)
    if not isinstance(x, Tensor):
        return watch.keep(out, (own_use(watch, source, lambda g: g * x),), features=0)
    spread = _batch_first(watch, x.detach(), out.dim())
    return watch.keep(out, (own_use(watch, source, lambda g: g * spread()),), features=0)


def _shift(watch: Watch, out: Tensor, parameter: Any, sign: float) -> Tensor:
    source = watch.source(parameter)
    if source is None:
        return out
    if not _fits(watch, out, parameter):
        return watch.skip(out)
    return watch.keep(out, (own_use(watch, source, lambda g: g * sign),), features=0)


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, takes=TWO)
def add(watch: Watch, given: Given) -> Tensor:
    """G, summed over what the parameter was broadcast over."""
    out: Tensor = given.run()
    first, second = watch.source(given.input), watch.source(given.other)
    if first is not None and second is not None:
        return out
    return _shift(watch, out, given.other if first is None else given.input, 1.0)


@rule(torch.sub, Tensor.sub, Tensor.__sub__, takes=TWO)
def subtract(watch: Watch, given: Given) -> Tensor:
    """±g, summed over what the parameter was broadcast over."""
    out: Tensor = given.run()
    first, second = watch.source(given.input), watch.source(given.other)
    if first is not None and second is not None:
        return out
    if first is None:
        return _shift(watch, out, given.other, -1.0)
    return _shift(watch, out, given.input, 1.0)


@rule(Tensor.expand, takes={"input": None} | {f"size{k}": _NONE for k in range(8)})
def expand(watch: Watch, given: Given) -> Tensor:
    """G of every copy, as of a class token."""
    sizes = [value for key, value in vars(given).items() if key.startswith("size")]
    out = given.input.expand(*[size for size in sizes if size is not _NONE])
    if watch.axis is None:  # copied without a batch: its rows cannot be told apart here
        return watch.skip(out)
    return _shift(watch, out, given.input, 1.0)


@rule(F.prelu, torch.prelu, takes={"input": None, "weight": None})
def prelu(watch: Watch, given: Given) -> Tensor:
    """G ∘ min(x, 0), by channel or over all."""
    out: Tensor = given.run()
    source, count = watch.source(given.weight), given.weight.numel()
    if source is None:
        return out
    low = given.input.detach().clamp_max(0)

    def formed(slope: Tensor) -> Tensor:
        product: Tensor = slope * low
        if count == 1 or product.dim() < 2:
            return product.flatten(1).sum(1, keepdim=True)
        return product.flatten(2).sum(2) if product.dim() > 2 else product

    return watch.keep(out, (own_use(watch, source, formed),), features=0)
