"""The two second moments of a block whose eigenvectors are its Kronecker basis."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from upweight.errors import NonFiniteError
from upweight.linalg import Block, Eigenblock, Outer, Spectra
from upweight.linalg.blocks import form, pieces
from upweight.linalg.gram import add_gram, mirror

__all__ = ["Axes", "Draw", "Expand", "Gradient", "Moments", "Reduce", "Whole", "alike"]

LARGEST_SIDE = 4096

# One draw of a batch's slopes: the terms of a block, and shares [n].
Draw = tuple[Sequence[Outer], Tensor]


class Moments(ABC):
    """Sums of left and right second moments of one block over batches.

    A side without a moment (one-hot, or larger than ``LARGEST_SIDE``) keeps its own axes.

    Attributes:
        block: of the parameter row.
        left: ``[g, o, o]``, or None.
        right: ``[g, i, i]``, or None.
        mass: Σ share_n s_n, of the positions that were counted.
    """

    def __init__(self, block: Block, like: Tensor, *, indexed: bool) -> None:
        g, o, i = block.shape
        self.block, self.mass, self.dtype = block, 0.0, like.dtype
        like = like.to(torch.promote_types(like.dtype, torch.float32))  # sums of many batches
        sided = o <= LARGEST_SIDE and not indexed
        self.left = like.new_zeros(g, o, o) if sided else None
        self.right = like.new_zeros(g, i, i) if i <= LARGEST_SIDE else None
        # The diagonal alone, for a side that keeps its axes.
        self.left_diagonal = like.new_zeros(g, o)
        self.right_diagonal = like.new_zeros(g, i)

    def add(self, draws: Sequence[Draw]) -> None:
        """Add a batch."""
        for terms, share in draws:
            self._add(terms, share)

    @abstractmethod
    def _add(self, terms: Sequence[Outer], share: Tensor) -> None:
        """Add one draw of a batch with shares ``[n]``."""

    def eigenblock(self) -> Eigenblock:
        """The block in the eigenvectors of both sides, with K-FAC's eigenvalues, when all is added.

        These are λ_L ⊗ λ_R / mass.
        """
        left, first = self._basis(self.left, self.left_diagonal)
        right, second = self._basis(self.right, self.right_diagonal)
        return self._made(left, right, (first, second))

    def _made(
        self, left: Tensor | None, right: Tensor | None, spectra: tuple[Tensor, Tensor]
    ) -> Eigenblock:
        values = self.product(*spectra)
        return Eigenblock(self.block, left, right, values, Spectra(*spectra, self.mass))

    def product(self, first: Tensor, second: Tensor) -> Tensor:
        """K-FAC's eigenvalues ``[g, o, i]`` from those of both sides, ``[g, o]`` and ``[g, i]``."""
        product: Tensor = first[:, :, None] * second[:, None, :] / max(self.mass, 1e-300)
        return product

    def _basis(self, moment: Tensor | None, diagonal: Tensor) -> tuple[Tensor | None, Tensor]:
        """Eigenvectors of a side with their eigenvalues; of none, the axes with the diagonal."""
        if moment is None:
            return None, diagonal
        # While batches are added, only the upper triangle is.
        values, vectors = eigen(mirror(moment))
        return vectors.to(self.dtype), values

    def _add_side(self, side: str, rows: Tensor, weights: Tensor) -> None:
        """Add rows ``[g, m, d]`` with weights ``[m]`` to the moment of a side."""
        moment: Tensor | None = getattr(self, side)
        if moment is None:
            diagonal: Tensor = getattr(self, f"{side}_diagonal")
            diagonal += torch.einsum("gmd,m->gd", rows.square(), weights)
            return
        for total, part in zip(moment, rows, strict=True):
            add_gram(total, part, weights)


def eigen(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors, in double where single precision fails.

    It may, on many equal eigenvalues: LAPACK then says so, or returns NaN.

    Raises:
        NonFiniteError: the moment is not finite.
    """
    if not bool(torch.isfinite(moment).all()):
        raise NonFiniteError("A moment of the curvature is not finite. Look for NaN in the data.")
    try:
        values, vectors = torch.linalg.eigh(moment)
        found = bool(torch.isfinite(vectors).all())
    except RuntimeError:
        found = False
    if not found:
        try:
            values, vectors = torch.linalg.eigh(moment.double())
        except RuntimeError:
            # Singular vectors of a symmetric positive matrix are its eigenvectors.
            vectors, values, _ = torch.linalg.svd(moment.double())
    return values.to(moment), vectors.to(moment).contiguous()


def _full(term: Outer) -> Tensor:
    """Right factors with the 1 that is left out, ``[g, n, s, i]``."""
    if not term.ones:
        return term.right
    return torch.cat([term.right, term.right.new_ones(*term.right.shape[:3], 1)], dim=3)


def alike(terms: Sequence[Outer]) -> bool:
    """Whether the terms of several draws have one right factor: what the layer was given."""
    return len({term.right.data_ptr() for term in terms}) == 1


def _used(term: Outer) -> Tensor:
    """Positions ``[n, s]`` that add to a gradient: those of padding do not, and must not count."""
    factor = term.right if term.indexed else term.left
    return (factor != 0).any(3).any(0)


@final
class Expand(Moments):
    """K-FAC "expand": every position of an example is an example (Martens & Grosse, 2015).

    Positions whose left factor is 0, as of padding, are none.
    """

    def add(self, draws: Sequence[Draw]) -> None:
        """What all draws were given is multiplied once."""
        shares = [share for _, share in draws]
        for terms in zip(*(terms for terms, _ in draws), strict=True):
            if alike(terms):
                weights = self._add_left(terms[0], shares[0])
                for term, share in zip(terms[1:], shares[1:], strict=True):
                    weights = weights + self._add_left(term, share)
                self._add_side("right", _full(terms[0]).flatten(1, 2), weights)
            else:
                for term, share in zip(terms, shares, strict=True):
                    self._add([term], share)

    def _add(self, terms: Sequence[Outer], share: Tensor) -> None:
        """Σ_n share_n Σ_s of l lᵀ, and of r rᵀ."""
        for term in terms:
            weights = self._add_left(term, share)
            self._add_side("right", _full(term).flatten(1, 2), weights)

    def _add_left(self, term: Outer, share: Tensor) -> Tensor:
        """Add l lᵀ; the weight of every position, ``[n·s]``."""
        weights = (share[:, None] * _used(term)).flatten()
        self.mass += float(weights.sum())
        if term.indexed:
            flat = self.left_diagonal[0]
            flat.index_add_(0, term.left.flatten(), weights.to(flat))
        else:
            self._add_side("left", term.left.flatten(1, 2), weights)
        return weights


@final
class Reduce(Moments):
    """K-FAC "reduce": left factors are summed, right ones averaged (Eschenhagen et al., 2023)."""

    def _add(self, terms: Sequence[Outer], share: Tensor) -> None:
        """Σ_n share_n of (Σ_s l)(Σ_s l)ᵀ, and of (mean_s r)(mean_s r)ᵀ."""
        for term in terms:
            used = _used(term).to(share.dtype)
            mean = used / used.sum(1, keepdim=True).clamp_min(1)
            weights = share[:, None] * mean
            self.mass += float(weights.sum())
            if term.indexed:  # a lookup has no mean of tokens: summed gradients, counted tokens
                flat = self.left_diagonal[0]
                flat.index_add_(0, term.left.flatten(), weights.flatten().to(flat))
                self._add_side("right", term.right.sum(2), share)
                continue
            self._add_side("left", term.left.sum(2), share)
            self._add_side("right", torch.einsum("gnsi,ns->gni", _full(term), mean), share)


@final
class Gradient(Moments):
    """Second moments of the gradient matrices themselves, as in Shampoo (Gupta et al., 2018)."""

    def _add(self, terms: Sequence[Outer], share: Tensor) -> None:
        """Σ_n share_n of G_n G_nᵀ, and of G_nᵀ G_n."""
        if not terms:
            return
        block, item = self.block, self.left_diagonal.element_size()
        self.mass += float(share.sum())
        for piece in pieces(len(share), block.size * item):
            formed = form([term.part(piece) for term in terms], block.outputs).transpose(0, 1)
            weights = share[piece]
            rows = formed.flatten(1, 2)
            self._add_side("right", rows, weights.repeat_interleave(block.outputs))
            columns = formed.mT.reshape(block.groups, -1, block.outputs)
            self._add_side("left", columns, weights.repeat_interleave(block.inputs))

    def product(self, first: Tensor, second: Tensor) -> Tensor:
        """λ_L ⊗ λ_R over the trace, which both share."""
        trace = second.sum(1)[:, None, None].clamp_min(torch.finfo(second.dtype).tiny)
        return first[:, :, None] * second[:, None, :] / trace


@final
class Axes(Moments):
    """No moments: a parameter's own axes, so that the curvature is its diagonal."""

    def _add(self, terms: Sequence[Outer], share: Tensor) -> None:
        """Nothing."""

    def _basis(self, moment: Tensor | None, diagonal: Tensor) -> tuple[Tensor | None, Tensor]:
        """The identity."""
        return None, diagonal


@final
class Whole(Moments):
    """The second moment of a small block's whole gradient: a matrix of its own, without factors."""

    def __init__(self, block: Block, like: Tensor, *, indexed: bool) -> None:
        super().__init__(Block(block.name, 1, 1, block.size, 0), like, indexed=False)
        self.block = block

    def _add(self, terms: Sequence[Outer], share: Tensor) -> None:
        """Σ_n share_n of vec(G_n) vec(G_n)ᵀ."""
        for piece in pieces(len(share) if terms else 0, self.block.size * self.dtype.itemsize):
            formed = form([term.part(piece) for term in terms], self.block.outputs)
            self._add_side("right", formed.flatten(1)[None], share[piece])

    def _made(
        self, left: Tensor | None, right: Tensor | None, spectra: tuple[Tensor, Tensor]
    ) -> Eigenblock:
        values = spectra[1][:, None]
        return Eigenblock(self.block, None, right, values, Spectra(*spectra, 1.0), flat=True)
