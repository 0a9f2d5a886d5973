"""Rows of parameter space by blocks: matrices, kept as sums of outer products where they are.

A block is the weight of one layer seen as g matrices ``[o, i]`` (g > 1 for grouped convolutions),
its bias as a last column. The gradient of example n is G_n = Σ_s l_ns ⊗ r_ns over the s positions
and calls that used the weight; it is formed only where that is the cheaper way to a product.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from upweight.linalg.block import Block
from upweight.linalg.values import Gradients, RowValues

__all__ = ["BlockGradients", "BlockRows", "Outer", "form", "times"]

PIECE_BYTES = 32 * 2**20


@final
@dataclass(frozen=True)
class Outer:
    """Σ_s l_ns ⊗ r_ns of n examples.

    Attributes:
        left: l, ``[g, n, s, o]``; or whole numbers ``[n, s]``, each the one row that is not 0.
        right: r, ``[g, n, s, i]``.
        ones: whether a last column of r is 1 and left out.
    """

    left: Tensor
    right: Tensor
    ones: bool = False

    @property
    def indexed(self) -> bool:
        """Whether the left factors are rows of an identity matrix."""
        return not self.left.is_floating_point()

    @property
    def positions(self) -> int:
        """S."""
        return self.right.shape[2]

    def part(self, rows: slice) -> "Outer":
        """Some of the examples."""
        left = self.left[rows] if self.indexed else self.left[:, rows]
        return Outer(left, self.right[:, rows], self.ones)


def times(right: Tensor, matrix: Tensor, *, ones: bool) -> Tensor:
    """Right factors ``[g, n, s, i]``, with their 1 where it is left out, times ``[g, i, k]``."""
    flat = right.flatten(1, 2)
    product: Tensor
    if not ones:
        product = flat @ matrix
    elif len(matrix) == 1:
        product = torch.addmm(matrix[0, -1], flat[0], matrix[0, :-1])[None]
    else:
        product = torch.baddbmm(matrix[:, -1:], flat, matrix[:, :-1])
    spread: Tensor = product.unflatten(1, right.shape[1:3])
    return spread


def _form(term: Outer, outputs: int) -> Tensor:
    _, n, s, i = term.right.shape
    if term.indexed:
        matrix = term.right.new_zeros(n * outputs, i)
        offset = torch.arange(n, device=term.left.device)[:, None] * outputs
        matrix.index_add_(0, (term.left + offset).flatten(), term.right[0].reshape(n * s, i))
        return matrix.view(n, 1, outputs, i)
    if s == 1:
        matrix = term.left.transpose(2, 3) * term.right
    else:
        matrix = term.left.transpose(2, 3) @ term.right
    if term.ones:
        matrix = torch.cat([matrix, term.left.sum(2)[..., None]], dim=3)
    return matrix.transpose(0, 1)


def form(terms: Sequence[Outer], outputs: int) -> Tensor:
    """The matrices ``[n, g, o, i]`` that terms of one block add up to."""
    matrix = _form(terms[0], outputs)
    for term in terms[1:]:
        matrix = matrix + _form(term, outputs)
    return matrix


def pieces(count: int, bytes_each: int) -> Iterator[slice]:
    """Slices of a count whose parts stay within a bounded memory."""
    size = max(1, PIECE_BYTES // max(bytes_each, 1))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


@final
@dataclass(frozen=True)
class Pair:
    """Rows of one block as Σ_r l_qr ⊗ r_qr.

    Attributes:
        left: ``[g, q, r, o]``.
        right: ``[g, q, r, i]``.
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The matrices ``[q, g, o, i]``."""
        return (self.left.mT @ self.right).transpose(0, 1)

    @classmethod
    def joined(cls, pairs: Sequence["Pair"]) -> "Pair":
        """Rows of the same block, one after the other; zeros fill up to the largest rank."""
        rank = max(pair.left.shape[2] for pair in pairs)
        sides = ([pair.left for pair in pairs], [pair.right for pair in pairs])
        left, right = (
            torch.cat([pad(part, (0, 0, 0, rank - part.shape[2])) for part in side], 1)
            for side in sides
        )
        return cls(left, right)


@final
class BlockRows(RowValues):
    """Rows of parameter space, block by block: matrices, or sums of outer products.

    Args:
        blocks: of the parameter row.
        parts: of each block, matrices ``[q, g, o, i]`` or a Pair.
        size: p.
    """

    def __init__(self, blocks: Sequence[Block], parts: Sequence[Tensor | Pair], size: int) -> None:
        self.blocks, self.parts, self.size = tuple(blocks), tuple(parts), size

    def __len__(self) -> int:
        part = self.parts[0]
        return part.left.shape[1] if isinstance(part, Pair) else len(part)

    def dense(self) -> Tensor:
        """The rows ``[q, p]``."""
        parts = [part.dense() if isinstance(part, Pair) else part for part in self.parts]
        rows = parts[0].new_zeros(len(self), self.size)
        for block, part in zip(self.blocks, parts, strict=True):
            block.write(rows, part)
        return rows

    @classmethod
    def joined(cls, rows: list["BlockRows"]) -> "BlockRows":
        """Rows of the same blocks, one after the other.

        The list is emptied on the way, so that no block is there twice but the one at hand.
        """
        if len(rows) == 1:
            return rows[0]
        blocks, size, waiting = rows[0].blocks, rows[0].size, [list(each.parts) for each in rows]
        rows.clear()
        parts: list[Tensor | Pair] = []
        for _ in blocks:
            found = [part.pop(0) for part in waiting]
            pairs = [part for part in found if isinstance(part, Pair)]
            if len(pairs) == len(found):
                parts.append(Pair.joined(pairs))
            else:
                dense = [part.dense() if isinstance(part, Pair) else part for part in found]
                parts.append(torch.cat(dense))
        return cls(blocks, parts, size)

    def dot(self, gradients: Gradients) -> Tensor:
        """Products ``[q, n]`` with gradients, in their factors where they have the same blocks."""
        if isinstance(gradients, BlockGradients):
            return gradients.dot(self)
        return gradients.dot(self.dense())

    def times(self, row: Tensor) -> Tensor:
        """Inner products ``[q]`` with one row ``[p]``."""
        total = row.new_zeros(len(self))
        for block, part in zip(self.blocks, self.parts, strict=True):
            matrix = block.read(row[None])[0]
            if isinstance(part, Pair):
                total += ((part.left @ matrix[:, None]) * part.right).sum((0, 2, 3))
            else:
                total += part.flatten(1) @ matrix.flatten()
        return total

    def bytes(self) -> int:
        """Of all parts."""
        sides = [(p.left, p.right) if isinstance(p, Pair) else (p,) for p in self.parts]
        return sum(tensor.nbytes for side in sides for tensor in side)


@final
class BlockGradients(Gradients):
    """Gradients of n examples as sums of outer products in blocks of parameters.

    Args:
        blocks: all of them together hold every chosen parameter once.
        terms: of each block; none where its gradients are 0.
        count: n.
        like: a tensor of the parameters' dtype and device.

    Example:
        >>> outer = Outer(torch.ones(1, 1, 1, 2), torch.tensor([[[[3.0, 4.0]]]]))
        >>> block = Block("w", 1, 2, 2, weight=0)
        >>> BlockGradients([block], [[outer]], 1, torch.ones(1)).dense()
        tensor([[3., 4., 3., 4.]])
    """

    def __init__(
        self, blocks: Sequence[Block], terms: Sequence[Sequence[Outer]], count: int, like: Tensor
    ) -> None:
        self.blocks, self.count, self.like = tuple(blocks), count, like
        self.terms = tuple(tuple(part) for part in terms)
        self.size = sum(block.size for block in self.blocks)

    def part(self, rows: slice) -> "BlockGradients":
        """Some of the examples."""
        terms = [[term.part(rows) for term in part] for part in self.terms]
        return BlockGradients(self.blocks, terms, len(range(self.count)[rows]), self.like)

    def without(self, places: Collection[int]) -> "BlockGradients":
        """The same with nothing in some blocks."""
        terms = [() if place in places else part for place, part in enumerate(self.terms)]
        return BlockGradients(self.blocks, terms, self.count, self.like)

    def bytes(self) -> int:
        """Memory of the factors."""
        tensors = [t for part in self.terms for term in part for t in (term.left, term.right)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def finite(self) -> bool:
        """Whether all factors are."""
        factors = [t for part in self.terms for term in part for t in (term.left, term.right)]
        sums = [factor.sum() for factor in factors if factor.is_floating_point()]
        return not sums or bool(torch.isfinite(torch.stack(sums)).all())

    def matrices(self, place: int) -> Tensor:
        """The gradients in one block, formed, ``[n, g, o, i]``."""
        block = self.blocks[place]
        if not self.terms[place]:
            return self.like.new_zeros(self.count, *block.shape)
        return form(self.terms[place], block.outputs)

    def dot(self, rows: Tensor | BlockRows) -> Tensor:
        """Rows times Gᵀ, ``[q, n]``; each block in the order that costs least."""
        # Examples first: for a small batch the product is then about twice as fast.
        total = self.like.new_zeros(self.count, len(rows))
        for place, block in enumerate(self.blocks):
            terms = self.terms[place]
            if not terms:
                continue
            part = rows.parts[place] if isinstance(rows, BlockRows) else block.views(rows)
            if isinstance(part, Pair):
                for term in terms:
                    total += _pair_dot(part, term)
            elif isinstance(part, Tensor):
                split = block.bias is not None
                weight, bias = (part[..., :-1], part[..., -1]) if split else (part, None)
                _matrix_dot(weight, bias, terms, total)
            else:
                _matrix_dot(*part, terms, total)
        return total.T

    def combine(self, weights: Tensor) -> Tensor:
        """Weights ``[m, n]`` times G; each block in the order that costs least."""
        rows = self.like.new_zeros(len(weights), self.size)
        for place, block in enumerate(self.blocks):
            if self.terms[place]:
                block.write(rows, self._sums(place, weights))
        return rows

    def _sums(self, place: int, weights: Tensor) -> Tensor:
        """Σ_n w_mn G_n of one block, ``[m, g, o, i]``."""
        block, terms = self.blocks[place], self.terms[place]
        if len(weights) == 1 or any(term.positions == 1 or term.indexed for term in terms):
            sums = (form([_summed(term, w) for term in terms], block.outputs) for w in weights)
            return torch.cat(list(sums))
        # Over m sums, forming every G once takes s + m products of matrices in place of m · s.
        total = self.like.new_zeros(len(weights), block.size)
        for piece in pieces(self.count, block.size * self.like.element_size()):
            formed = self.part(piece).matrices(place).flatten(1)
            total.addmm_(weights[:, piece].to(formed), formed)
        return total.view(-1, *block.shape)

    def squared_norms(self) -> Tensor:
        """‖g_i‖², from the factors where a block's gradient is one outer product."""
        parts = [self._block_squares(place) for place in range(len(self.blocks))]
        return torch.stack(parts).sum(0)

    def _block_squares(self, place: int) -> Tensor:
        terms, block = self.terms[place], self.blocks[place]
        if not terms:
            return self.like.new_zeros(self.count)
        if len(terms) == 1 and terms[0].positions == 1 and not terms[0].indexed:
            left, right = (f[:, :, 0].square().sum(2) for f in (terms[0].left, terms[0].right))
            return (left * (right + terms[0].ones)).sum(0)
        steps = pieces(self.count, block.size * self.like.element_size())
        formed = (self.part(piece).matrices(place) for piece in steps)
        return torch.cat([matrices.square().flatten(1).sum(1) for matrices in formed])

    def dense(self) -> Tensor:
        """All gradients, ``[n, p]``."""
        rows = self.like.new_zeros(self.count, self.size)
        for place, block in enumerate(self.blocks):
            if self.terms[place]:
                block.write(rows, self.matrices(place))
        return rows


def _summed(term: Outer, weights: Tensor) -> Outer:
    """Σ_n w_n l_n ⊗ r_n as the outer products of one example."""
    right = term.right * weights[:, None, None].to(term.right)
    left = term.left.reshape(1, -1) if term.indexed else term.left.flatten(1, 2)[:, None]
    if not term.ones:
        return Outer(left, right.flatten(1, 2)[:, None])
    scale = weights[:, None].expand(right.shape[1:3]).reshape(1, 1, -1, 1).to(left)
    return Outer(left * scale, term.right.flatten(1, 2)[:, None], ones=True)


def _pair_dot(pair: Pair, term: Outer) -> Tensor:
    """Σ_rs (l_qr·l_ns)(r_qr·r_ns), ``[n, q]``."""
    g, q, r, _ = pair.left.shape
    n, s = term.right.shape[1:3]
    total = term.right.new_zeros(n, q)
    left, right = pair.left.flatten(1, 2).mT, pair.right.flatten(1, 2).mT
    for piece in pieces(n, 2 * g * s * q * r * total.element_size()):
        some = term.part(piece)
        if some.indexed:
            first = left[0, some.left.flatten()].view(1, -1, s, q * r)
        else:
            first = times(some.left, left, ones=False)
        product = first.mul_(times(some.right, right, ones=some.ones))
        total[piece] = product.view(g, -1, s, q, r).sum((0, 2, 4))
    return total


def _matrix_dot(weight: Tensor, bias: Tensor | None, terms: Sequence[Outer], total: Tensor) -> None:
    """Add ⟨S_q, G_n⟩ of matrices S = ``[q, g, o, i]``, and a last column apart, to ``[n, q]``."""
    if bias is not None:
        for term in terms:
            total += (term.left.sum(2) @ bias.permute(1, 2, 0)).sum(0)
        terms = [replace(term, ones=False) for term in terms]
    q, _, o, i = weight.shape
    n, item = len(total), total.element_size()
    if len(terms) == 1 and terms[0].indexed and terms[0].positions < o:
        term = terms[0]
        for piece in pieces(n, q * term.positions * i * item):
            some = term.part(piece)
            gathered = weight[:, 0, some.left]
            total[piece] += torch.einsum("qnsi,nsi->nq", gathered, some.right[0])
        return
    # Of one position G is a product entry by entry, which is slow along a short side.
    long = o >= i or any(term.positions > 1 for term in terms)
    if long and weight.stride(2) < weight.stride(3) and not any(term.indexed for term in terms):
        # Met as it lies: a copy of all queries for every batch costs more than the product.
        weight, o = weight.mT, i
        terms = [Outer(term.right, term.left) for term in terms]
    flat = weight.flatten(1).T
    for piece in pieces(n, weight[0].numel() * item):
        formed = form([term.part(piece) for term in terms], o)
        total[piece].addmm_(formed.flatten(1), flat)
