"""Gradients a few parameters at a time, so that they are never formed at once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from upweight.linalg.block import Block
from upweight.linalg.blocks import BlockGradients, Outer, form, pieces
from upweight.linalg.values import FactoredGradients, Gradients

__all__ = ["as_blocks", "columns", "formed"]

Columns = tuple[Tensor, Tensor]
# Of the usual pieces, so that they stay in the cache: four times as fast for sparse projections.
EIGHTH = 8


def as_blocks(gradients: Gradients, blocks: Sequence[Block]) -> BlockGradients:
    """Gradients as outer products in these blocks: they are already, or they are formed.

    Example:
        >>> from upweight.linalg import DenseGradients
        >>> block = Block("w", 1, 2, 2, weight=0)
        >>> as_blocks(DenseGradients(torch.ones(3, 4)), [block]).matrices(0).shape
        torch.Size([3, 1, 2, 2])
    """
    if isinstance(gradients, FactoredGradients):
        gradients = _one_block(gradients)
    if isinstance(gradients, BlockGradients) and gradients.blocks == tuple(blocks):
        return gradients
    matrix = gradients.dense()
    terms = [[formed(block.read(matrix))] for block in blocks]
    return BlockGradients(blocks, terms, gradients.count, matrix)


def _one_block(gradients: FactoredGradients) -> BlockGradients:
    residual, features = gradients.residual, gradients.features
    c, d = residual.shape[1], features.shape[1]
    block = Block("weight", 1, c, d, weight=0, bias=c * (d - 1) if gradients.bias else None)
    term = Outer(residual[None, :, None], features[None, :, None])
    return BlockGradients([block], [[term]], gradients.count, residual)


def formed(matrices: Tensor) -> Outer:
    """Matrices ``[n, g, o, i]`` as outer products with the rows of an identity.

    Example:
        >>> form([formed(torch.ones(3, 1, 2, 4))], 2).shape
        torch.Size([3, 1, 2, 4])
    """
    n, g, o, _ = matrices.shape
    right = matrices.transpose(0, 1)
    if o == 1:
        return Outer(right.new_ones(1, 1, 1, 1).expand(g, n, 1, 1), right)
    if g == 1:
        return Outer(torch.arange(o, device=right.device).expand(n, o), right)
    eye = torch.eye(o, dtype=right.dtype, device=right.device)
    return Outer(eye.expand(g, n, o, o), right)


def columns(gradients: Gradients, width: int) -> Iterator[Columns]:
    """Places ``[c]`` of some parameters, and the gradients there, ``[n, c]``, until none is left.

    A place may come more than once; its gradient is the sum then.

    Args:
        gradients: of n examples.
        width: numbers that are needed for a place beside the n gradients, to bound c.

    Example:
        >>> from upweight.linalg import DenseGradients
        >>> [places.tolist() for places, _ in columns(DenseGradients(torch.ones(1, 3)), 2**19 - 1)]
        [[0, 1], [2]]
    """
    if isinstance(gradients, FactoredGradients):
        gradients = _one_block(gradients)
    if not isinstance(gradients, BlockGradients):
        matrix = gradients.dense()
        each = EIGHTH * (gradients.count + width) * matrix.element_size()
        for piece in pieces(matrix.shape[1], each):
            places = torch.arange(piece.start, piece.stop, device=matrix.device)
            yield places, matrix[:, piece]
        return
    each = EIGHTH * (gradients.count + width) * gradients.like.element_size()
    for block, terms in zip(gradients.blocks, gradients.terms, strict=True):
        for term in terms:
            yield from _of_lookup(block, term, each) if term.indexed else _of(block, term, each)


def _of(block: Block, term: Outer, each: int) -> Iterator[Columns]:
    """Of one term, some outputs at a time."""
    g, o, i = block.shape
    for piece in pieces(o, g * i * each):
        some = Outer(term.left[..., piece], term.right, term.ones)
        outputs = torch.arange(piece.start, piece.stop, device=term.right.device)
        yield _places(block, outputs), form([some], len(outputs)).flatten(1)


def _of_lookup(block: Block, term: Outer, each: int) -> Iterator[Columns]:
    """Of a lookup, some of the entries that were looked up at a time."""
    used, where = term.left.unique(return_inverse=True)
    for piece in pieces(len(used), block.inputs * each):
        count = piece.stop - piece.start
        # What is not among them goes into one more, and away.
        inside = (where >= piece.start) & (where < piece.stop)
        left = torch.where(inside, where - piece.start, count)
        formed = form([Outer(left, term.right, term.ones)], count + 1)[:, :, :count]
        yield _places(block, used[piece]), formed.flatten(1)


def _places(block: Block, outputs: Tensor) -> Tensor:
    """Places in the parameter row of some outputs of a block, ``[g · c · i]``."""
    g, o, i = block.shape
    width = i - (block.bias is not None)
    groups = torch.arange(g, device=outputs.device)[:, None, None]
    inputs = torch.arange(width, device=outputs.device)
    of_output, of_input = (1, o) if block.transposed else (width, 1)
    rows = outputs[None, :, None]
    places = block.weight + groups * (o * width) + rows * of_output + inputs * of_input
    if block.bias is not None:
        places = torch.cat([places, block.bias + groups * o + rows], 2)
    return places.flatten()
