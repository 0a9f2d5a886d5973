"""Where the weight of one layer, with its bias, stands in a row of parameters."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["Block"]


@final
@dataclass(frozen=True)
class Block:
    """Where matrices ``[g, o, i]`` of parameters stand in a parameter row.

    Attributes:
        name: of the weight.
        groups: g.
        outputs: o.
        inputs: i, the bias's column included.
        weight: where the weight starts.
        bias: where the bias starts, if it is the last column.
        transposed: whether the weight is stored ``[g, i, o]``.
    """

    name: str
    groups: int
    outputs: int
    inputs: int
    weight: int
    bias: int | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(g, o, i)."""
        return self.groups, self.outputs, self.inputs

    @property
    def size(self) -> int:
        """Parameters in the block."""
        return self.groups * self.outputs * self.inputs

    def places(self) -> Tensor:
        """Position of every entry in the parameter row, ``[g, o, i]``."""
        width = self.inputs - (self.bias is not None)
        stored = (width, self.outputs) if self.transposed else (self.outputs, width)
        places = torch.arange(self.groups * self.outputs * width, device="cpu")
        places = self.weight + places.view(self.groups, *stored)
        places = places.mT if self.transposed else places
        if self.bias is None:
            return places
        last = self.bias + torch.arange(self.groups * self.outputs, device="cpu")
        return torch.cat([places, last.view(self.groups, self.outputs, 1)], dim=2)

    def views(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The block of rows ``[m, p]``: its weight ``[m, g, o, i]``, its bias ``[m, g, o]``."""
        g, o, i = self.shape
        width = i - (self.bias is not None)
        part = rows[:, self.weight : self.weight + g * o * width]
        stored = (width, o) if self.transposed else (o, width)
        weight = part.unflatten(1, (g, *stored))
        weight = weight.mT if self.transposed else weight
        if self.bias is None:
            return weight, None
        return weight, rows[:, self.bias : self.bias + g * o].unflatten(1, (g, o))

    def read(self, rows: Tensor) -> Tensor:
        """The block of rows ``[m, p]`` as ``[m, g, o, i]``: a view where there is no bias."""
        weight, bias = self.views(rows)
        return weight if bias is None else torch.cat([weight, bias[..., None]], dim=3)

    def write(self, rows: Tensor, matrix: Tensor) -> None:
        """Put matrices ``[m, g, o, i]`` where they stand in rows ``[m, p]``."""
        (g, o, i), m = self.shape, len(rows)
        width = i - (self.bias is not None)
        weight = matrix[..., :width]
        weight = weight.mT if self.transposed else weight
        rows[:, self.weight : self.weight + g * o * width] = weight.reshape(m, -1)
        if self.bias is not None:
            rows[:, self.bias : self.bias + g * o] = matrix[..., -1].reshape(m, -1)
