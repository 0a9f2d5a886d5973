"""Directions of conjugate gradients and their products, for one λ or for several."""

from typing import final

import torch
from torch import Tensor

__all__ = ["Directions"]

MOST = 1024  # directions, whose matrix S A Sᵀ is decomposed after every step


@final
class Directions:
    """S and A S, from which Galerkin's answer for any A + λ costs no product.

    The best x in the span of S solves S (A + λ) xᵀ = S bᵀ; S (A + λ) Sᵀ = S A Sᵀ + λ S Sᵀ.

    Args:
        room: bytes of what is kept; the last step's directions are kept in any case.
    """

    def __init__(self, room: int) -> None:
        self.room, self.fixed, self.shift = room, 0, 0.0
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.bend = self.gram = self.inverse = torch.zeros(0, 0, dtype=torch.float64)
        self.steepest = 0.0

    def keep(self, directions: Tensor, products: Tensor) -> None:
        """Take the directions ``[k, p]`` of a step and their products with A."""
        self.pairs = self.pairs[: self.fixed]
        size = sum(len(part) for part, _ in self.pairs)
        self.bend, self.gram = self.bend[:size, :size], self.gram[:size, :size]
        self.pairs.append((directions, products))
        self.bend = _bordered(self.bend, self._cross(products), products @ directions.T)
        self.gram = _bordered(self.gram, self._cross(directions), directions @ directions.T)
        taken = directions.nbytes + products.nbytes
        if taken <= self.room and len(self.gram) <= MOST:
            self.room, self.fixed = self.room - taken, len(self.pairs)

    def _cross(self, rows: Tensor) -> Tensor:
        """Rows times all directions but the last step's."""
        parts = [rows @ part.T for part, _ in self.pairs[:-1]]
        return torch.cat(parts, 1) if parts else rows.new_zeros(len(rows), 0)

    def project(self, shift: float) -> tuple[Tensor, float]:
        """Invert S (A + λ) Sᵀ, but for its null directions.

        Returns:
            The combination of S that A + λ bends down most, as weights of a unit row ``[k]``, and
            by how much: the curvature along it, 0 where it is positive up to rounding.
        """
        self.shift = shift
        eps = torch.finfo(self.pairs[0][0].dtype).eps
        matrix = self.bend + shift * self.gram
        # Scaled to a diagonal of 1: flat directions are as well determined as steep ones.
        size = matrix.diagonal().abs()
        self.steepest = max(self.steepest, float(size.max()))
        scale = torch.where(size > 0, size, 1.0).rsqrt()
        values, vectors = torch.linalg.eigh(matrix * scale * scale[:, None])
        rounding = 10 * len(values) ** 0.5 * eps
        kept = values > rounding * float(values.abs().max())
        vectors = vectors * scale[:, None]
        self.inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
        lowest = (
            vectors[:, 0] / (vectors[:, 0] @ self.gram @ vectors[:, 0]).clamp_min(1e-300).sqrt()
        )
        curvature = float(lowest @ matrix @ lowest)
        return lowest, curvature if curvature < -rounding * self.steepest else 0.0

    def advance(self, rows: Tensor, residual: Tensor) -> None:
        """Add the best combination of S to every row, in place, and take it from its residual."""
        found = torch.cat([residual @ part.T for part, _ in self.pairs], 1)
        weights = (found.double() @ self.inverse).to(rows.dtype)
        for (directions, products), some in zip(self.pairs, self._split(weights), strict=True):
            rows.addmm_(some, directions)
            residual.addmm_(some, products, alpha=-1).addmm_(some, directions, alpha=-self.shift)

    def conjugate(self, rows: Tensor) -> Tensor:
        """Rows without their parts along S in the inner product of A + λ."""
        found = [rows @ products.T + self.shift * (rows @ part.T) for part, products in self.pairs]
        if not found:
            return rows
        weights = (torch.cat(found, 1).double() @ self.inverse).to(rows.dtype)
        for (directions, _), some in zip(self.pairs, self._split(weights), strict=True):
            rows = torch.addmm(rows, some, directions, alpha=-1)
        return rows

    def combination(self, weights: Tensor) -> Tensor:
        """The row ``[p]`` of weights ``[k]``."""
        parts = self._split(weights.to(self.pairs[0][0].dtype)[None])
        rows = [some @ part for (part, _), some in zip(self.pairs, parts, strict=True)]
        return torch.stack(rows).sum(0)[0]

    def _split(self, weights: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = weights.split([len(part) for part, _ in self.pairs], 1)
        return parts


def _bordered(matrix: Tensor, cross: Tensor, corner: Tensor) -> Tensor:
    """A symmetric matrix ``[k, k]`` with rows and columns added, in float64."""
    cross, corner = cross.double(), corner.double()
    upper = torch.cat([matrix.to(cross), cross.T], 1)
    return torch.cat([upper, torch.cat([cross, (corner + corner.T) / 2], 1)])
