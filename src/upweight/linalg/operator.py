"""Symmetric operators on rows: what can be applied, composed and made dense."""

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.errors import InputError

__all__ = ["Dense", "Identity", "MeanOperator", "Operator", "Recycled", "Shifted", "unshifted"]

CHUNK = 64
PROBES = 32


class Operator(ABC):
    """A symmetric linear map A on rows of length ``size``.

    ``apply`` takes rows ``[m, p]`` and gives rows ``[m, p]``; ``A @ x`` takes a row or rows, and
    ``A + λ`` adds λ times the identity. The dense form falls back on applying A to the identity.
    """

    size: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def apply(self, rows: Tensor) -> Tensor:
        """Rows ``[m, p]`` times A."""

    def to_dense(self) -> Tensor:
        """A as a matrix ``[p, p]``."""
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        parts = eye.split(CHUNK)
        return torch.cat([self.apply(part) for part in track(parts, "dense curvature")])

    def trace(self) -> float:
        """The sum of the eigenvalues; an estimate where the diagonal is not at hand.

        It is the mean of v A vᵀ over random signs v (Hutchinson, 1990).
        """
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (PROBES, self.size), generator=generator) * 2 - 1
        rows = signs.to(self.device, self.dtype)
        return float((rows * self.apply(rows)).sum()) / PROBES

    @final
    def __matmul__(self, rows: Tensor) -> Tensor:
        if rows.shape[-1:] != (self.size,) or rows.dim() not in (1, 2):
            raise InputError(
                f"Expected a row [{self.size}] or rows [m, {self.size}], got {tuple(rows.shape)}."
            )
        return self.apply(rows.reshape(-1, self.size)).reshape(rows.shape)

    @final
    def __add__(self, shift: float) -> "Operator":
        return self if shift == 0 else Shifted(self, shift)


@final
class Dense(Operator):
    """A symmetric matrix.

    Args:
        matrix: ``[p, p]``, symmetric.

    Example:
        >>> (Dense(torch.eye(2)) + 1.0) @ torch.tensor([1.0, 2.0])
        tensor([2., 4.])
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.size = matrix.shape[0]
        self.dtype, self.device = matrix.dtype, matrix.device

    def apply(self, rows: Tensor) -> Tensor:
        """Rows times the matrix."""
        return rows.to(self.dtype) @ self.matrix

    def to_dense(self) -> Tensor:
        """The matrix itself."""
        return self.matrix

    def trace(self) -> float:
        """The sum of its diagonal."""
        return float(self.matrix.trace())


@final
class Identity(Operator):
    """The identity: what a gradient dot product uses in place of H⁻¹.

    Args:
        size: p.
        dtype: of its dense form.
        device: of its dense form.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device

    def apply(self, rows: Tensor) -> Tensor:
        """The rows."""
        return rows


@final
class Shifted(Operator):
    """A + λ I.

    Args:
        base: A.
        shift: λ.
    """

    def __init__(self, base: Operator, shift: float) -> None:
        self.base, self.shift = base, shift
        self.size, self.dtype, self.device = base.size, base.dtype, base.device

    def apply(self, rows: Tensor) -> Tensor:
        """Rows times A, plus λ rows."""
        return self.base.apply(rows).add(rows, alpha=self.shift)

    def to_dense(self) -> Tensor:
        """A with λ added to its diagonal (a copy)."""
        dense = self.base.to_dense().clone()
        dense.diagonal().add_(self.shift)
        return dense


@final
class Recycled(Operator):
    """A, whose solver keeps the directions it multiplied for solves of A + λ at other λ.

    Args:
        base: A.
        kept: where they are kept; known to the solver alone.
    """

    def __init__(self, base: Operator, kept: Any) -> None:
        self.base, self.kept = base, kept
        self.size, self.dtype, self.device = base.size, base.dtype, base.device

    def apply(self, rows: Tensor) -> Tensor:
        """Rows times A."""
        return self.base.apply(rows)

    def trace(self) -> float:
        """That of A."""
        return self.base.trace()


def unshifted(operator: Operator) -> tuple[Operator, float]:
    """A and λ of an operator A + λ."""
    base, shift = (
        (operator.base, operator.shift) if isinstance(operator, Shifted) else (operator, 0.0)
    )
    return (base.base if isinstance(base, Recycled) else base), shift


class MeanOperator(Operator):
    """A mean over examples, A = Σ_i share_i A_i + Λ, of which random parts can be applied.

    Attributes:
        count: the number of examples.
    """

    count: int

    @property
    def l2(self) -> Tensor:
        """Λ, ``[p]``: what is known to stand beside the mean; 0 by default."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    @abstractmethod
    def apply_sampled(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Rows ``[g, q, p]``, each group g times its own estimate of A from rows ``[g, b]``.

        The estimate is unbiased when positions are drawn uniformly.
        """

    @abstractmethod
    def restrict(self, positions: Tensor) -> Operator:
        """The estimate of A from the examples at positions ``[b]`` alone."""
