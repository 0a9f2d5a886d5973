"""Sums of products of rows and columns that stand for a matrix, with the error they make."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["Separable", "separate"]

LARGEST_RANK = 64


@final
@dataclass(frozen=True)
class Separable:
    """D ≈ Σ_r u_r v_rᵀ.

    Attributes:
        rows: u, ``[r, o]``.
        columns: v, ``[r, i]``.
        gap: what is missing, ``[o, i]``.
        error: its weighted norm.
    """

    rows: Tensor
    columns: Tensor
    gap: Tensor
    error: float


def separate(matrix: Tensor, weights: Tensor, allowed: float) -> Separable | None:
    """The least rank whose weighted error ‖weights ∘ (D − Σ u vᵀ)‖ is at most ``allowed``.

    The expansion is best in the norm of the nearest separable weights, which are the roots of the
    squares' marginals (scale, decompose, unscale); its error is measured in the given ones.
    Unweighted it would spend its rank where the weights are small, which is where 1/(Λ + λ) is
    largest and matters least.

    Args:
        matrix: D, ``[o, i]``.
        weights: not negative, ``[o, i]``.
        allowed: largest weighted error.

    Returns:
        The expansion, or None where the largest rank is not enough.

    Example:
        >>> found = separate(torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.ones(2, 2), 1e-3)
        >>> len(found.rows)
        1
    """
    if matrix.shape[0] > matrix.shape[1]:
        turned = separate(matrix.T, weights.T, allowed)
        return turned and Separable(turned.columns, turned.rows, turned.gap.T, turned.error)
    d, w = matrix.double(), weights.double()
    squares = w.square()
    whole = squares.sum().clamp_min(torch.finfo(w.dtype).tiny).sqrt()
    row, column = ((squares.sum(axis) / whole).sqrt() + 1e-6 * whole.sqrt() for axis in (1, 0))
    scaled = row[:, None] * d * column
    basis = torch.linalg.eigh(scaled @ scaled.T)[1].flip(1)[:, :LARGEST_RANK]
    pushed = basis.T @ scaled
    gap = d.clone()
    for rank in range(1, basis.shape[1] + 1):
        gap -= torch.outer(basis[:, rank - 1] / row, pushed[rank - 1] / column)
        error = float((w * gap).norm())
        if error <= allowed:
            u, v = (basis[:, :rank] / row[:, None]).T, pushed[:rank] / column
            return Separable(u.to(matrix.dtype), v.to(matrix.dtype), gap.to(matrix.dtype), error)
    return None
