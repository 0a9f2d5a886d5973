"""Per-example gradients of one batch, as values that are contracted before they are formed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import final

import torch
from torch import Tensor

__all__ = [
    "DenseGradients",
    "FactoredGradients",
    "Gradients",
    "Pieces",
    "RowValues",
    "join_blocks",
    "split_rows",
]


def split_rows(rows: Tensor, width: int, *, bias: bool) -> Tensor:
    """Rows ``[..., p]`` of a linear layer as matrices ``[..., c, d]`` over features of that width.

    With a bias, a row holds the weight ``[c, d−1]`` and then the bias ``[c]``, and the bias is
    the last column of the matrix.
    """
    if not bias:
        return rows.reshape(*rows.shape[:-1], rows.shape[-1] // width, width)
    outputs = rows.shape[-1] // width
    weight = rows[..., :-outputs].reshape(*rows.shape[:-1], outputs, width - 1)
    return torch.cat([weight, rows[..., -outputs:, None]], dim=-1)


def join_blocks(blocks: Tensor, *, bias: bool) -> Tensor:
    """Matrices ``[..., c, d]`` back to rows ``[..., p]``."""
    if not bias:
        return blocks.flatten(-2)
    return torch.cat([blocks[..., :-1].flatten(-2), blocks[..., -1]], dim=-1)


class Gradients(ABC):
    """Gradients g_i of n examples in p parameters, rows of a matrix G that need not exist.

    Attributes:
        count: n.
    """

    count: int

    @abstractmethod
    def dot(self, rows: Tensor) -> Tensor:
        """Rows ``[q, p]`` times Gᵀ: products ``[q, n]``."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """Weights ``[m, n]`` times G: weighted sums ``[m, p]``."""

    @abstractmethod
    def dense(self) -> Tensor:
        """G itself, ``[n, p]``."""

    @abstractmethod
    def part(self, rows: slice) -> "Gradients":
        """Some of the examples."""

    def pieces(self) -> Iterator["Gradients"]:
        """The examples one part after the other, none of which needs much memory."""
        yield self

    def squared_norms(self) -> Tensor:
        """‖g_i‖² of every gradient, ``[n]``."""
        return self.dense().square().sum(1)

    def finite(self) -> bool:
        """Whether no gradient is NaN or infinite; a finite one may be called infinite."""
        return bool(torch.isfinite(self.dense().sum()))


@final
class Pieces(Gradients):
    """Gradients that are made a few examples at a time, each time they are asked for.

    Args:
        make: all of them in order, in parts.
        count: n.

    Example:
        >>> twice = Pieces(lambda: iter((DenseGradients(torch.eye(2)),) * 2), 4)
        >>> twice.combine(torch.ones(1, 4))
        tensor([[2., 2.]])
    """

    def __init__(self, make: Callable[[], Iterator[Gradients]], count: int) -> None:
        self.make, self.count = make, count

    def pieces(self) -> Iterator[Gradients]:
        """Every part, and only one at a time."""
        return self.make()

    def dot(self, rows: Tensor) -> Tensor:
        """Rows times Gᵀ."""
        return torch.cat([piece.dot(rows) for piece in self.make()], 1)

    def combine(self, weights: Tensor) -> Tensor:
        """Weights times G."""
        start, total = 0, torch.zeros(())
        for piece in self.make():
            total = total + piece.combine(weights[:, start : start + piece.count])
            start += piece.count
        return total

    def dense(self) -> Tensor:
        """G."""
        return torch.cat([piece.dense() for piece in self.make()])

    def part(self, rows: slice) -> Gradients:
        """Some of the examples."""
        return DenseGradients(self.dense()[rows])


class RowValues(ABC):
    """Rows ``[m, p]`` of parameter space that meet gradients and need not exist."""

    @abstractmethod
    def __len__(self) -> int:
        """M."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The rows ``[m, p]``."""

    @abstractmethod
    def dot(self, gradients: Gradients) -> Tensor:
        """Products ``[m, n]`` with gradients."""

    @abstractmethod
    def times(self, row: Tensor) -> Tensor:
        """Inner products ``[m]`` with one row ``[p]``."""

    @abstractmethod
    def bytes(self) -> int:
        """Memory of what stands for the rows."""


@final
class DenseGradients(Gradients):
    """Gradients that exist as a matrix.

    Args:
        matrix: G, ``[n, p]``.

    Example:
        >>> DenseGradients(torch.eye(2)).dot(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 4.]])
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.count = matrix, len(matrix)

    def dot(self, rows: Tensor) -> Tensor:
        """Rows times Gᵀ."""
        return rows @ self.matrix.T

    def combine(self, weights: Tensor) -> Tensor:
        """Weights times G."""
        return weights @ self.matrix

    def dense(self) -> Tensor:
        """G."""
        return self.matrix

    def part(self, rows: slice) -> "DenseGradients":
        """Some of the examples."""
        return DenseGradients(self.matrix[rows])


@final
class FactoredGradients(Gradients):
    """Gradients r_i ⊗ x_i of a linear map z = x Wᵀ, with p = c·d.

    Args:
        residual: r, the derivative in the outputs, ``[n, c]``.
        features: x, ``[n, d]``.
        bias: whether the last feature is the 1 of a bias (see ``split_rows``).

    Example:
        >>> FactoredGradients(torch.ones(1, 2), torch.tensor([[3.0, 4.0]])).dense()
        tensor([[3., 4., 3., 4.]])
    """

    def __init__(self, residual: Tensor, features: Tensor, *, bias: bool = False) -> None:
        self.residual, self.features, self.bias = residual, features, bias
        self.count = len(residual)

    def dot(self, rows: Tensor) -> Tensor:
        """Project the features first (n·q·c·d), then contract with the residual (n·q·c)."""
        (n, c), d = self.residual.shape, self.features.shape[1]
        blocks = split_rows(rows, d, bias=self.bias)
        projected = self.features @ blocks.flatten(0, 1).T
        return torch.matmul(projected.view(n, -1, c), self.residual[:, :, None])[..., 0].T

    def combine(self, weights: Tensor) -> Tensor:
        """(w_i r_i)ᵀ x, one product for all m."""
        m, c = len(weights), self.residual.shape[1]
        scaled = weights.T[:, :, None] * self.residual[:, None, :]
        blocks = scaled.reshape(self.count, m * c).T @ self.features
        return join_blocks(blocks.view(m, c, -1), bias=self.bias)

    def dense(self) -> Tensor:
        """All outer products, ``[n, p]``."""
        outer = self.residual[:, :, None] * self.features[:, None, :]
        return join_blocks(outer, bias=self.bias)

    def squared_norms(self) -> Tensor:
        """‖r_i‖² ‖x_i‖²."""
        return self.residual.square().sum(1) * self.features.square().sum(1)

    def part(self, rows: slice) -> "FactoredGradients":
        """Some of the examples."""
        return FactoredGradients(self.residual[rows], self.features[rows], bias=self.bias)
