"""Random matrices by their columns: drawn when they are needed, from place and seed alone."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, final

import torch
from torch import Tensor

from upweight.errors import InputError
from upweight.gradients import Gradients
from upweight.linalg import RowValues
from upweight.linalg.blocks import pieces
from upweight.linalg.columns import columns
from upweight.noise import random_bits, signs_of_bytes
from upweight.projections.lifted import ProjectedRows
from upweight.projections.projection import Projection, Unprojected
from upweight.risk import Risk

__all__ = ["Entries", "GaussianEntries", "RademacherEntries", "RandomProjection", "SparseEntries"]

WORD = 8
# Sums of so many examples stay in the cache.
ROWS = 512
ADDITION = 16


@dataclass(frozen=True)
class Entries(ABC):
    """Entries of a random P ``[k, p]`` with E[PᵀP] = 1; a column depends on its place and the seed.

    Called with a Risk it is the projection of that objective's parameters, or the identity where
    these are no more than k.

    Args:
        width: k.
        seed: of all entries.

    Raises:
        InputError: fewer than one dimension.
    """

    width: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"A projection has at least 1 dimension, got {self.width}.")

    @property
    @abstractmethod
    def work(self) -> int:
        """Multiply-adds of a product that take as long as projecting one entry of a gradient.

        They are no fewer than the numbers that are drawn for it.
        """

    @abstractmethod
    def project(self, values: Tensor, places: Tensor, out: Tensor) -> None:
        """Add P times columns ``[n, c]`` of gradients at places ``[c]`` to ``[n, k]``."""

    @abstractmethod
    def spread(self, values: Tensor, places: Tensor) -> Tensor:
        """Rows ``[m, k]`` times the columns of P at places ``[c]``, ``[m, c]``."""

    @final
    def __call__(self, risk: Risk) -> Projection:
        """The projection of an objective's parameters."""
        l2 = risk.objective.l2
        if len(l2) <= self.width:
            return Unprojected(len(l2))
        one = bool((l2 == l2[0]).all())
        note = f"L2 differs between parameters; the projection has its mean, {float(l2.mean()):.3g}"
        return RandomProjection(self, l2, () if one else (note,))


@final
class RandomProjection(Projection):
    """A random map that is drawn anew, a few parameters at a time, whenever it is used.

    Args:
        entries: of its columns.
        like: a row of all parameters, ``[p]``.
        notes: what a reader of results must know.

    Example:
        >>> from upweight.linalg import DenseGradients
        >>> gradients = DenseGradients(torch.ones(1, 1000))
        >>> RandomProjection(RademacherEntries(50), torch.ones(1000)).project(gradients).shape
        torch.Size([1, 50])
    """

    def __init__(self, entries: Entries, like: Tensor, notes: tuple[str, ...] = ()) -> None:
        self.entries, self.like, self.notes = entries, like, notes
        self.size, self.width, self.widths = len(like), entries.width, (entries.width,)

    def project(self, gradients: Gradients) -> Tensor:
        """Sums over parameters, of which gradients and columns are formed together."""
        found, dtype = [], torch.promote_types(self.like.dtype, torch.float32)  # long sums
        for start in range(0, gradients.count, ROWS):
            some = gradients.part(slice(start, start + ROWS))
            out = torch.zeros(some.count, self.width, dtype=dtype, device=self.like.device)
            for places, values in columns(some, self.entries.work):
                self.entries.project(values.to(dtype), places, out)
            found.append(out.to(self.like))
        return torch.cat(found)

    def spread(self, values: Tensor) -> Tensor:
        """All parameters, a few at a time."""
        out = values.new_empty(len(values), self.size)
        for piece in pieces(self.size, self.entries.work * values.element_size()):
            places = torch.arange(piece.start, piece.stop, device=values.device)
            out[:, piece] = self.entries.spread(values, places)
        return out

    def rows(self, values: Tensor) -> Tensor | RowValues:
        """Rows ``[m, p]`` for few, and for many the values, which meet what is projected."""
        lazy = len(values) > self.entries.work
        return ProjectedRows(values, self) if lazy else self.spread(values)

    def ridge(self, l2: Tensor) -> Tensor:
        """Their mean: exact where all parameters have one λ."""
        return l2.mean().expand(self.width)


class _Table(Entries):
    """Independent entries, looked up by pieces of random words."""

    piece: ClassVar[torch.dtype]

    @property
    def work(self) -> int:
        """All of a column."""
        return self.width

    @abstractmethod
    def table(self, like: Tensor) -> Tensor:
        """Equally likely entries ``[codes, m]``, of variance 1: m of them for every piece."""

    @final
    def entries(self, places: Tensor, like: Tensor) -> Tensor:
        """Columns of P at places ``[c]`` as rows ``[c, k]``."""
        table = self.table(like) / self.width**0.5
        of_word = WORD // self.piece.itemsize * table.shape[1]
        words = random_bits(places, -(-self.width // of_word), self.seed)
        codes = words.view(self.piece).flatten().int()
        found: Tensor = table.index_select(0, codes).view(len(places), -1)
        return found[:, : self.width]

    def project(self, values: Tensor, places: Tensor, out: Tensor) -> None:
        """One product."""
        out.addmm_(values, self.entries(places, out))

    def spread(self, values: Tensor, places: Tensor) -> Tensor:
        """One product."""
        return values @ self.entries(places, values).T


@final
@dataclass(frozen=True)
class RademacherEntries(_Table):
    """Random signs over √k (Achlioptas, 2003): eight to a byte.

    Args:
        width: k.
        seed: of all entries.

    Example:
        >>> RademacherEntries(4).entries(torch.tensor([7]), torch.ones(1)).abs()
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """

    piece = torch.uint8

    def table(self, like: Tensor) -> Tensor:
        """The signs of every byte."""
        return signs_of_bytes(like.dtype, like.device)


@final
@dataclass(frozen=True)
class GaussianEntries(_Table):
    """Normal numbers over √k, each one of 65,536 equally likely values.

    Args:
        width: k.
        seed: of all entries.

    Example:
        >>> columns = GaussianEntries(4).entries(torch.arange(10_000), torch.ones(1))
        >>> round(float(columns.square().sum(1).mean()), 1)
        1.0
    """

    piece = torch.uint16

    def table(self, like: Tensor) -> Tensor:
        """The values."""
        return _quantiles(like.dtype, like.device)


@cache
def _quantiles(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal quantiles in the middle of 2¹⁶ equal parts, of variance 1, ``[2¹⁶, 1]``."""
    middles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    values = torch.special.ndtri(middles)
    scaled: Tensor = values / values.square().mean().sqrt()
    return scaled[:, None].to(device, dtype)


@final
@dataclass(frozen=True)
class SparseEntries(Entries):
    """Columns of few signs: one in each of s equal parts of the k dimensions, over √s.

    Inner products have the variance that dense signs give them, for s additions to a parameter in
    place of k (Kane & Nelson, 2014; with s = 1 count sketch, Charikar, Chen & Farach-Colton, 2002).

    Args:
        width: k.
        seed: of all entries.
        nonzeros: s.

    Raises:
        InputError: more nonzeros than dimensions, or none.

    Example:
        >>> sparse = SparseEntries(6, nonzeros=2)
        >>> column = sparse.spread(torch.eye(6), torch.tensor([5]))
        >>> int((column != 0).sum()), round(float(column.square().sum()), 6)
        (2, 1.0)
    """

    nonzeros: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.nonzeros <= self.width:
            raise InputError(
                f"A column of {self.width} entries has 1 to {self.width} nonzeros, got "
                f"{self.nonzeros}."
            )

    @property
    def work(self) -> int:
        """Additions to places all over the sums, measured beside products."""
        return ADDITION * self.nonzeros

    def _columns(self, places: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and values of the nonzeros, ``[s, c]``."""
        words = random_bits(places, self.nonzeros, self.seed).T.contiguous()
        edges = [self.width * part // self.nonzeros for part in range(self.nonzeros + 1)]
        edge = torch.tensor(edges, device=places.device)[:, None]
        # Of 63 bits, so that a remainder is as good as even.
        rows = edge[:-1] + (words >> 1 & (2**62 - 1)) % edge.diff(dim=0)
        signs = (2 * (words & 1) - 1).to(like.dtype) / self.nonzeros**0.5
        return rows, signs

    def project(self, values: Tensor, places: Tensor, out: Tensor) -> None:
        """Every gradient goes to s sums."""
        for rows, signs in zip(*self._columns(places, values), strict=True):
            out.index_add_(1, rows, values * signs)

    def spread(self, values: Tensor, places: Tensor) -> Tensor:
        """Every parameter reads s numbers."""
        parts = zip(*self._columns(places, values), strict=True)
        total = values.new_zeros(len(values), len(places))
        for rows, signs in parts:
            total += values[:, rows] * signs
        return total
