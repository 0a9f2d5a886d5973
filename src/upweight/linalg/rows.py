"""Rows of parameter space in one block of it: formed, or outer products that share a factor."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from upweight.linalg.block import Block
from upweight.linalg.blocks import Outer, form, pieces
from upweight.linalg.kronecker import Eigenblock

__all__ = ["FormedRows", "ProductRows", "RowPart", "rows_of"]


class RowPart(ABC):
    """V of one block: m matrices ``[g, o, i]``, seen as rows.

    Matrices they are multiplied with or added to are views of parameter rows, as ``Block.views``
    makes them, with a bias apart: nothing of the size of parameter rows is copied.
    """

    @abstractmethod
    def dot(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Products ``[m, q]`` with weights ``[q, g, o, i]`` and biases ``[q, g, o]``."""

    @abstractmethod
    def add(self, weights: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Add the sums with weights ``[q, m]`` to weights and biases, in place."""

    @abstractmethod
    def gram(self) -> Tensor:
        """V Vᵀ, ``[m, m]``."""

    @abstractmethod
    def bytes(self) -> int:
        """Memory of the rows."""

    @abstractmethod
    def turned(self, basis: Eigenblock) -> "RowPart":
        """The matrices in a basis, with the column of a bias among the others."""

    @abstractmethod
    def joined(self, others: Sequence[Any]) -> "RowPart":
        """These rows and those of others of the same kind."""


@final
class FormedRows(RowPart):
    """Matrices that exist.

    Args:
        matrices: ``[m, g, o, i]``, without the column of a bias.
        last: the column of the bias, ``[m, g, o]``.
    """

    def __init__(self, matrices: Tensor, last: Tensor | None = None) -> None:
        self.matrices, self.last = matrices, last

    def dot(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One product."""
        products = self.matrices.flatten(1) @ weight.flatten(1).T
        if self.last is not None and bias is not None:
            products.addmm_(self.last.flatten(1), bias.flatten(1).T)
        return products

    def add(self, weights: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """One product."""
        weight += (weights @ self.matrices.flatten(1)).view(weight.shape)
        if self.last is not None and bias is not None:
            bias += (weights @ self.last.flatten(1)).view(bias.shape)

    def gram(self) -> Tensor:
        """One product."""
        parts = [part.flatten(1) for part in (self.matrices, self.last) if part is not None]
        inner = parts[0] @ parts[0].T
        return inner if self.last is None else inner.addmm_(parts[1], parts[1].T)

    def bytes(self) -> int:
        """Of the matrices."""
        return self.matrices.nbytes + (0 if self.last is None else self.last.nbytes)

    def turned(self, basis: Eigenblock) -> "FormedRows":
        """Turned as they are."""
        last = [] if self.last is None else [self.last[..., None]]
        return FormedRows(basis.turn(torch.cat([self.matrices, *last], 3)))

    def joined(self, others: Sequence["FormedRows"]) -> "FormedRows":
        """One below the other."""
        every = [self, *others]
        lasts = [part.last for part in every if part.last is not None]
        matrices = torch.cat([part.matrices for part in every])
        return FormedRows(matrices, torch.cat(lasts) if lasts else None)


@final
class ProductRows(RowPart):
    """Outer products l_nc ⊗ r_n, never formed: those of an example share its right factor.

    Args:
        left: l, ``[n, c, o]``.
        right: r, ``[n, i]``, without the 1 of a bias.
        ones: whether a last column of r is 1 and left out.
        places: which of the n·c outer products are rows, ``[m]``; all by default.
    """

    def __init__(
        self, left: Tensor, right: Tensor, *, ones: bool, places: Tensor | None = None
    ) -> None:
        self.left, self.right, self.ones, self.places = left, right, ones, places

    def dot(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Matrices times r first, for all c at once, then times l."""
        q, _, o, _ = weight.shape
        found = []
        for piece in pieces(len(self.left), q * o * self.left.element_size()):
            turned = torch.matmul(self.right[piece], weight[:, 0].mT)
            found.append(torch.matmul(self.left[piece], turned.permute(1, 2, 0)))
        products = torch.cat(found)
        if self.ones and bias is not None:
            products += self.left @ bias[:, 0].T
        products = products.flatten(0, 1)
        return products if self.places is None else products[self.places]

    def add(self, weights: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Σ_n (Σ_c w_nc l_nc) ⊗ r_n: one product over the examples for each row of weights."""
        (n, c, o), q = self.left.shape, len(weights)
        if self.places is not None:
            weights = weights.new_zeros(q, n * c).index_copy_(1, self.places, weights)
        spread = weights.view(q, n, c).transpose(0, 1)
        for piece in pieces(n, q * o * self.left.element_size()):
            scaled, right = torch.matmul(spread[piece], self.left[piece]), self.right[piece]
            for k, matrix in enumerate(weight[:, 0]):
                matrix.addmm_(scaled[:, k].T, right)
            if self.ones and bias is not None:
                bias[:, 0] += scaled.sum(0)

    def gram(self) -> Tensor:
        """(L Lᵀ) ∘ (R Rᵀ)."""
        c, flat = self.left.shape[1], self.left.flatten(0, 1)
        inner = self.right @ self.right.T
        inner = inner + 1 if self.ones else inner
        if self.places is not None:
            flat, owners = flat[self.places], self.places // c
            return (flat @ flat.T).mul_(inner[owners][:, owners])
        if c > 1:
            inner = inner.repeat_interleave(c, 0).repeat_interleave(c, 1)
        return (flat @ flat.T).mul_(inner)

    def bytes(self) -> int:
        """Of the factors."""
        return self.left.nbytes + self.right.nbytes

    def turned(self, basis: Eigenblock) -> RowPart:
        """Both factors; the matrices where the basis is one of vectors."""
        (n, c, o), right = self.left.shape, self.right[None, :, None]
        term = Outer(self.left.view(1, n * c, 1, o), right, self.ones)
        if basis.flat:
            each = replace(term, right=right.repeat_interleave(c, 1))
            return FormedRows(basis.turn(form([each], o)))
        left = basis.turned_left(term).view(n, c, -1)
        return ProductRows(left, basis.turned_right(term)[0, :, 0], ones=False)

    def joined(self, others: Sequence["ProductRows"]) -> "ProductRows":
        """One below the other."""
        every = [self, *others]
        left = torch.cat([part.left for part in every])
        return ProductRows(left, torch.cat([part.right for part in every]), ones=self.ones)

    def grouped(self, owners: Tensor) -> "ProductRows":
        """The same rows, c = 1, with those of an example side by side, if they share its r.

        Args:
            owners: the example of each row, ``[m]``, ascending.
        """
        _, group, counts = owners.unique_consecutive(return_inverse=True, return_counts=True)
        first, width = counts.cumsum(0) - counts, int(counts.max())
        gap, size = (self.right - self.right[first[group]]).abs().max(), self.right.abs().max()
        if gap > 8 * torch.finfo(size.dtype).eps * size:
            return self
        places = group * width + torch.arange(len(owners), device=group.device) - first[group]
        left = self.left.new_zeros(len(counts), width, self.left.shape[2])
        left.flatten(0, 1)[places] = self.left[:, 0]
        return ProductRows(left, self.right[first], ones=self.ones, places=places)


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
        return ProductRows(left, first[0].right[0, :, 0], ones=first[0].ones)
    n, like = first[0].right.shape[1], first[0].right
    g, o, i = block.shape
    matrices = like.new_empty(n, len(columns), g, o, i - first[0].ones)
    for c, terms in enumerate(columns):
        bare = [replace(term, ones=False) for term in terms]
        for piece in pieces(n, block.size * like.element_size()):
            matrices[piece, c] = form([term.part(piece) for term in bare], o)
    if not first[0].ones:
        return FormedRows(matrices.flatten(0, 1))
    sums = [torch.stack([term.left.sum(2) for term in terms]).sum(0) for terms in columns]
    lasts = torch.stack([part.transpose(0, 1) for part in sums], 1)
    return FormedRows(matrices.flatten(0, 1), lasts.flatten(0, 1))


def _shares_right(columns: Sequence[Sequence[Outer]]) -> bool:
    """Whether every slope has one outer product with one and the same right factor in memory."""
    terms = [column[0] for column in columns if len(column) == 1]
    if len(terms) < len(columns) or any(t.positions != 1 or t.indexed for t in terms):
        return False
    return len({term.right.data_ptr() for term in terms}) == 1
