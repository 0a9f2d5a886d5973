"""Rows of parameter space in one block of it: formed, or outer products that share a factor."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from upweight.linalg.block import Block
from upweight.linalg.blocks import Outer, form, pieces, times

__all__ = ["FormedRows", "ProductRows", "RowPart", "rows_of"]


class RowPart(ABC):
    """V of one block: m matrices ``[g, o, i]``, seen as rows."""

    @abstractmethod
    def dot(self, rows: Tensor) -> Tensor:
        """Products ``[m, q]`` with matrices ``[q, g, o, i]``."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """Sums with weights ``[q, m]``: matrices ``[q, g, o, i]``."""

    @abstractmethod
    def gram(self) -> Tensor:
        """V Vᵀ, ``[m, m]``."""

    @abstractmethod
    def bytes(self) -> int:
        """Memory of the rows."""

    @abstractmethod
    def joined(self, others: Sequence[Any]) -> "RowPart":
        """These rows and those of others of the same kind."""


@final
class FormedRows(RowPart):
    """Matrices that exist.

    Args:
        matrices: ``[m, g, o, i]``.
    """

    def __init__(self, matrices: Tensor) -> None:
        self.flat, self.shape = matrices.flatten(1), matrices.shape[1:]

    def dot(self, rows: Tensor) -> Tensor:
        """One product."""
        return self.flat @ rows.flatten(1).T

    def combine(self, weights: Tensor) -> Tensor:
        """One product."""
        return (weights @ self.flat).view(-1, *self.shape)

    def gram(self) -> Tensor:
        """One product."""
        return self.flat @ self.flat.T

    def bytes(self) -> int:
        """Of the matrices."""
        return self.flat.nbytes

    def joined(self, others: Sequence["FormedRows"]) -> "FormedRows":
        """One below the other."""
        flat = torch.cat([self.flat, *(other.flat for other in others)])
        return FormedRows(flat.view(-1, *self.shape))


@final
class ProductRows(RowPart):
    """Outer products l_nc ⊗ r_n, never formed: m = n·c rows, those of an example side by side.

    Args:
        left: l, ``[n, c, o]``.
        right: r with one position, ``[1, n, 1, i]``.
        ones: whether a last column of r is 1 and left out.
    """

    def __init__(self, left: Tensor, right: Tensor, *, ones: bool) -> None:
        self.left, self.right, self.ones = left, right, ones

    def dot(self, rows: Tensor) -> Tensor:
        """Matrices times r first, for all c at once, then times l."""
        q, _, o, i = rows.shape
        matrix = rows[:, 0].permute(2, 0, 1).reshape(1, i, q * o)
        found = []
        for piece in pieces(len(self.left), q * o * rows.element_size()):
            turned = times(self.right[:, piece], matrix, ones=self.ones).view(-1, q, o)
            found.append(torch.matmul(self.left[piece], turned.mT))
        return torch.cat(found).flatten(0, 1)

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_n (Σ_c w_nc l_nc) ⊗ r_n: one product over the examples for all rows of weights."""
        (n, c, o), q = self.left.shape, len(weights)
        right, spread = self.right[0, :, 0], weights.view(q, n, c).transpose(0, 1)
        total, last = right.new_zeros(q * o, right.shape[1]), right.new_zeros(q * o)
        for piece in pieces(n, q * o * right.element_size()):
            scaled = torch.matmul(spread[piece], self.left[piece]).flatten(1)
            total.addmm_(scaled.T, right[piece])
            if self.ones:
                last += scaled.sum(0)
        matrix = torch.cat([total, last[:, None]], 1) if self.ones else total
        return matrix.view(q, 1, o, -1)

    def gram(self) -> Tensor:
        """(L Lᵀ) ∘ (R Rᵀ)."""
        c, flat = self.left.shape[1], self.left.flatten(0, 1)
        right = self.right[0, :, 0]
        inner = right @ right.T
        inner = inner + 1 if self.ones else inner
        if c > 1:
            inner = inner.repeat_interleave(c, 0).repeat_interleave(c, 1)
        return (flat @ flat.T) * inner

    def bytes(self) -> int:
        """Of the factors."""
        return self.left.nbytes + self.right.nbytes

    def joined(self, others: Sequence["ProductRows"]) -> "ProductRows":
        """One below the other."""
        every = [self, *others]
        left = torch.cat([part.left for part in every])
        return ProductRows(left, torch.cat([part.right for part in every], 1), ones=self.ones)


def rows_of(block: Block, columns: Sequence[Sequence[Outer]]) -> RowPart | None:
    """Gradients of n examples for c slopes each in one block as n·c rows; None where they are 0.

    Where an example has one position, and its right factor is the same for all slopes, as the input
    of a layer is, it is held once; elsewhere the matrices are formed.

    Args:
        block: of the parameter row.
        columns: the block's terms for each of the slopes.
    """
    first = columns[0]
    if not first:
        return None
    if block.groups == 1 and _shares_right(columns):
        left = torch.stack([terms[0].left[0, :, 0] for terms in columns], 1)
        return ProductRows(left, first[0].right, ones=first[0].ones)
    n, like = first[0].right.shape[1], first[0].right
    matrices = like.new_empty(n, len(columns), *block.shape)
    for piece in pieces(n, block.size * like.element_size()):
        for c, terms in enumerate(columns):
            matrices[piece, c] = form([term.part(piece) for term in terms], block.outputs)
    return FormedRows(matrices.flatten(0, 1))


def _shares_right(columns: Sequence[Sequence[Outer]]) -> bool:
    """Whether every slope has one outer product with one and the same right factor in memory."""
    terms = [column[0] for column in columns if len(column) == 1]
    if len(terms) < len(columns) or any(t.positions != 1 or t.indexed for t in terms):
        return False
    return len({term.right.data_ptr() for term in terms}) == 1
