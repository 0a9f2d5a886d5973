"""A curvature inverted on the directions in which it is largest, found in a Krylov space."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.errors import IndefiniteError, InputError, NonFiniteError
from upweight.linalg.cost import Cost, Load
from upweight.linalg.operator import Operator, unshifted
from upweight.linalg.solution import Solution, Status, relative_residual
from upweight.linalg.solver import Inverse, Solver
from upweight.linalg.values import Gradients

__all__ = ["Lanczos"]


@final
@dataclass(frozen=True)
class Lanczos(Solver):
    """Σ_k y_kᵀ y_k / (e_k + λ) over Ritz pairs (e_k, y_k) of largest |e| (Schioppa et al., 2022).

    The Krylov space of A from a random start is the same for every damping, so that another one
    costs no product. Every direction is orthogonalised twice against all before it; where the space
    closes early, it goes on from a fresh draw, so that repeated eigenvalues are found as often as
    they occur. With steps = rank = p the inverse is exact.

    As in the paper, **outside of the Ritz vectors nothing is answered**: that part of a query is
    dropped, also where λ would bound it, and its length is what the residual says. The paper
    inverts negative eigenvalues too, which no removal answers to: pairs with e + λ ≤ 0 are left
    out here, and a note counts them.

    Args:
        rank: pairs kept.
        steps: products with A, each of one row; memory is ``steps · p`` numbers.
        seed: of the start.

    Raises:
        InputError: rank is not within 1 and steps.
        IndefiniteError: A is zero, or e + λ ≤ 0 for every pair.
        NonFiniteError: a product is NaN or infinite.

    Example:
        >>> from upweight.linalg import Dense
        >>> A = Dense(torch.diag(torch.tensor([4.0, 2.0, 1.0])))
        >>> (Lanczos(rank=2, steps=3).init(A) @ torch.ones(3)).round(decimals=4).abs()
        tensor([0.2500, 0.5000, 0.0000])
    """

    rank: int = 50
    steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= self.steps:
            raise InputError(
                f"As many pairs are kept as there are steps at most: 1 ≤ rank ≤ steps, got "
                f"rank={self.rank!r}, steps={self.steps!r}."
            )

    def prepared(self, operator: Operator) -> "Ritz":
        """The Ritz pairs of A."""
        if isinstance(operator, Ritz):
            return operator
        basis, projected, rest = _krylov(operator, self)
        values, mixed = torch.linalg.eigh(projected, UPLO="U")
        chosen = values.abs().argsort(descending=True)[: self.rank]
        mixed = mixed[:, chosen].T.to(basis)
        return Ritz(values[chosen], mixed @ basis, mixed[:, -1], rest)

    def init(self, operator: Operator) -> "LanczosInverse":
        """Find the pairs, unless they are known, and add the damping."""
        base, shift = unshifted(operator)
        return LanczosInverse(self.prepared(base), shift)

    def cost(self, load: Load) -> Cost:
        """One product a step, whatever the number of rows."""
        steps = min(self.steps, load.size)
        held = (steps + self.rank) * float(load.size) * load.item
        return Cost(single=steps, operations=2.0 * steps**2 * load.size, bytes=held)


def _krylov(operator: Operator, solver: Lanczos) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis ``[k, p]``, A within it (upper triangle), and what its last row leaves.

    A times a row of the basis stays in the space, except for the last row's rest ``[p]``.
    """
    count = min(solver.steps, operator.size)
    basis = torch.zeros(count, operator.size, dtype=operator.dtype, device=operator.device)
    projected = torch.zeros(count, count, dtype=torch.float64, device=operator.device)
    generator = torch.Generator().manual_seed(solver.seed)

    def outside(row: Tensor, known: Tensor) -> Tensor:
        for _ in range(2):
            row = row - known.T @ (known @ row)
        return row

    def draw(known: Tensor) -> Tensor:
        start = torch.randn(operator.size, generator=generator, dtype=torch.float64, device="cpu")
        row = outside(start.to(basis), known)
        unit: Tensor = row / row.norm()
        return unit

    largest, rest = 0.0, torch.zeros_like(basis[0])
    fresh = draw(basis[:0])
    for step in track(range(count), "Lanczos"):
        basis[step] = fresh
        known = basis[: step + 1]
        product = operator.apply(known[-1:])[0]
        if not bool(torch.isfinite(product.sum())):
            raise NonFiniteError("A product with the curvature is NaN or infinite.")
        largest = max(largest, float(product.norm()))
        projected[: step + 1, step] = (known @ product).double()
        rest = outside(product, known)
        left = float(rest.norm())
        if left > 10 * count**0.5 * torch.finfo(basis.dtype).eps * largest:
            fresh = rest / left
        else:
            rest = torch.zeros_like(rest)
            fresh = draw(known) if step + 1 < count else fresh
    return basis, projected, rest


@final
class Ritz(Operator):
    """Σ_k e_k y_kᵀ y_k: a curvature as far as its Ritz pairs go.

    Args:
        values: e, by falling magnitude, ``[k]`` in float64.
        vectors: y, orthonormal, ``[k, p]``.
        last: of each y, the part of the basis's last row, ``[k]``.
        rest: what A times that row has outside of the space, ``[p]``.
    """

    def __init__(self, values: Tensor, vectors: Tensor, last: Tensor, rest: Tensor) -> None:
        self.values, self.vectors, self.last, self.rest = values, vectors, last, rest
        self.size, self.dtype, self.device = vectors.shape[1], vectors.dtype, vectors.device

    def apply(self, rows: Tensor) -> Tensor:
        """Project, scale, expand."""
        rows = rows.to(self.dtype)
        return (rows @ self.vectors.T * self.values.to(self.dtype)) @ self.vectors

    def trace(self) -> float:
        """The sum of e."""
        return float(self.values.sum())


@final
class LanczosInverse(Inverse):
    """(A + λ)⁻¹ on those Ritz vectors where it is positive, 0 outside of them.

    Args:
        pairs: of A.
        shift: λ.

    Raises:
        IndefiniteError: A is zero, or e + λ ≤ 0 for every pair.
    """

    def __init__(self, pairs: Ritz, shift: float) -> None:
        self.size, self.dtype, self.device = pairs.size, pairs.dtype, pairs.device
        values, size = pairs.values + shift, float(pairs.values.abs().max())
        kept = values > 10 * torch.finfo(pairs.dtype).eps * size
        if size == 0 or not bool(kept.any()):
            what = "zero" if size == 0 else f"not positive on any of {len(values)} Ritz vectors"
            raise IndefiniteError(
                f"The curvature is {what}, so there is no direction to invert it on. Check the "
                "losses, use a positive curvature (curvature='ggn'), or add damping above "
                f"{max(-float(pairs.values.max()), 0.0):.1e}."
            )
        self.vectors, self.last, self.rest = pairs.vectors[kept], pairs.last[kept], pairs.rest
        self.inverses = (1 / values[kept]).to(self.dtype)
        self.notes = (
            f"inverted on {int(kept.sum())} of {self.size:,} directions, and nothing outside of "
            "them: the residual is what a query has there",
        )
        if not bool(kept.all()):
            self.notes += (
                f"{int((~kept).sum())} of {len(values)} Ritz values are not positive with the "
                f"damping (least {float(values.min()):.1e}) and were left out; curvature='ggn' has "
                "none that are negative",
            )

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """Project, divide, expand; the residual follows from the products that made the space."""
        rhs = rows.to(self.dtype)
        inside = rhs @ self.vectors.T
        value = inside * self.inverses
        product = inside @ self.vectors + (value @ self.last)[:, None] * self.rest
        status = (Status.CONVERGED,) * len(rhs)
        return Solution(value @ self.vectors, relative_residual(rhs, product), status)

    def quadratic(self, rows: Tensor) -> Tensor:
        """Σ_k (b y_k)² / (e_k + λ) of every row."""
        squares: Tensor = (rows.to(self.dtype) @ self.vectors.T).square() @ self.inverses
        return squares

    def self_products(self, gradients: Gradients) -> Tensor:
        """The same from products with the Ritz vectors, without forming a gradient."""
        return self.inverses @ gradients.dot(self.vectors).square()
