"""Curvature in the dimensions of a projection."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from upweight.errors import InputError
from upweight.gradients import Compression
from upweight.linalg import Operator
from upweight.projections.projection import Projection

__all__ = ["Projected", "compression_of"]


@final
class Projected(Operator):
    """P G Pᵀ of a curvature G, an operator in k dimensions that knows the way there.

    Its mean eigenvalue is that of k dimensions, and a damping is added there.

    Args:
        projection: P.
        parts: operators on consecutive parts of the k numbers, between which it is 0; with the L2
            of the objective.
        compression: what is kept of training gradients for it; all by default.

    Example:
        >>> from upweight.linalg import Dense
        >>> from upweight.projections.projection import Unprojected
        >>> Projected(Unprojected(2), [Dense(2 * torch.eye(2))]) @ torch.ones(2)
        tensor([2., 2.])
    """

    def __init__(
        self,
        projection: Projection,
        parts: Sequence[Operator],
        compression: Compression | None = None,
    ) -> None:
        self.projection, self.parts, self.compression = projection, tuple(parts), compression
        self.size = projection.width
        self.dtype, self.device = self.parts[0].dtype, self.parts[0].device

    def apply(self, rows: Tensor) -> Tensor:
        """Rows ``[m, k]`` times it."""
        split = rows.split([part.size for part in self.parts], 1)
        return torch.cat([a.apply(b) for a, b in zip(self.parts, split, strict=True)], 1)

    def trace(self) -> float:
        """Of all parts."""
        return sum(part.trace() for part in self.parts)


def projected(operator: Operator) -> Projected:
    """The operator itself, if it is in the dimensions of a projection.

    Raises:
        InputError: it is a curvature of all parameters.
    """
    if isinstance(operator, Projected):
        return operator
    raise InputError(
        f"{type(operator).__name__} is a curvature of all parameters. Use its solver as it is, or "
        "a projected curvature such as ProjectedKernel(RademacherEntries(1024))."
    )


def compression_of(operator: Operator) -> Compression | None:
    """What is kept of training gradients for a projected curvature.

    Raises:
        InputError: it is a curvature of all parameters.

    Example:
        >>> from upweight.linalg import Dense
        >>> from upweight.projections.projection import Unprojected
        >>> compression_of(Projected(Unprojected(2), [Dense(torch.eye(2))])) is None
        True
    """
    return projected(operator).compression
