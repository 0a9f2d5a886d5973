"""A positive curvature sketched in one pass of products, and its inverse by Woodbury's identity."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.errors import IndefiniteError, InputError, NonFiniteError
from upweight.linalg.blocks import pieces
from upweight.linalg.cost import Cost, Load
from upweight.linalg.operator import MeanOperator, Operator, unshifted
from upweight.linalg.solution import Solution, Status, relative_residual
from upweight.linalg.solver import Inverse, Solver
from upweight.linalg.values import Gradients

__all__ = ["Nystrom"]

PROBES = 8


@final
@dataclass(frozen=True)
class Nystrom(Solver):
    """(Λ + λ + VᵀV)⁻¹, VᵀV = B Ω (Ωᵀ B Ω)⁺ Ωᵀ B a randomised Nyström approximation of B = A − Λ.

    Ω are k random orthonormal rows (Frangella, Tropp & Udell, 2023). B is what the data add to the
    objective's L2: Λ is known exactly, and a sketch of A would lose it in all directions but k,
    where nothing but L2 is left to divide by. B has to be positive semidefinite. An approximation
    never exceeds it, so that no direction is answered with too little. Another damping costs no
    product, and its residual is then not measured.

    Args:
        rank: k, test rows; memory is ``k · p`` numbers.
        seed: of the rows.

    Raises:
        InputError: rank is less than 1.
        IndefiniteError: A bends down within the test rows, or there is neither L2 nor damping.
        NonFiniteError: a product is NaN or infinite.

    Example:
        >>> from upweight.linalg import Dense
        >>> A = Dense(torch.diag(torch.tensor([3.0, 0.0])))
        >>> (Nystrom(rank=1).init(A + 1.0) @ torch.ones(2)).round(decimals=4)
        tensor([0.2500, 1.0000])
    """

    rank: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rank >= 1:
            raise InputError(f"A sketch has at least one test row, got rank={self.rank!r}.")

    def prepared(self, operator: Operator) -> "Sketched":
        """V, from one product with all test rows."""
        if isinstance(operator, Sketched):
            return operator
        l2 = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
        l2 = operator.l2 if isinstance(operator, MeanOperator) else l2
        tests, signs = self._rows(operator)
        rows = torch.cat([tests, signs])
        product = operator.apply(rows) - rows * l2
        if not bool(torch.isfinite(product.sum())):
            raise NonFiniteError("A product with the curvature is NaN or infinite.")
        roots = _roots(tests, product[: len(tests)])
        # Random signs see the whole trace, of which the sketch holds its part.
        whole = (signs * product[len(tests) :]).sum(1)
        missed = float((whole - (signs @ roots.T).square().sum(1)).mean())
        return Sketched(roots, l2, max(missed, 0.0))

    def _rows(self, operator: Operator) -> tuple[Tensor, Tensor]:
        """Test rows ``[k, p]``, and signs to judge them by."""
        generator = torch.Generator().manual_seed(self.seed)
        p, k = operator.size, min(self.rank, operator.size)
        drawn = torch.randn(p, k, generator=generator, dtype=torch.float64, device="cpu")
        signs = torch.randint(2, (PROBES, p), generator=generator, device="cpu") * 2 - 1
        tests = torch.linalg.qr(drawn)[0].T.to(operator.device, operator.dtype)
        return tests, signs.to(tests)

    def init(self, operator: Operator) -> "NystromInverse":
        """Make the sketch, unless it is there, and add the damping."""
        base, shift = unshifted(operator)
        against = None if isinstance(base, Sketched) else operator
        return NystromInverse(self.prepared(base), shift, against)

    def cost(self, load: Load) -> Cost:
        """A product of the test rows together, and one of all rows for their residuals."""
        k, p = min(self.rank, load.size), float(load.size)
        products = 1 + (k + PROBES) / max(load.rows, 1)
        return Cost(products=products, operations=3 * k**2 * p, bytes=24 * k * p)


def _roots(tests: Tensor, product: Tensor) -> Tensor:
    """V with VᵀV = Bᵀ(Ω B)⁺B, ``[r, p]``, from test rows Ω and Ω B ``[k, p]``."""
    core = (tests @ product.T).double()
    values, mixed = torch.linalg.eigh((core + core.T) / 2)
    noise = 10 * len(values) ** 0.5 * torch.finfo(product.dtype).eps * float(values.abs().max())
    if float(values[0]) < -noise:
        raise IndefiniteError(
            f"The curvature bends down within the sketch (to {float(values[0]):.1e}), which has a "
            "root only where it is positive. Use the Gauss-Newton matrix (curvature='ggn'), or "
            "'exact' and 'cg' for a Hessian."
        )
    kept = values > noise
    roots: Tensor = (mixed[:, kept] / values[kept].sqrt()).T.to(product) @ product
    return roots


@final
class Sketched(Operator):
    """Λ + VᵀV.

    Args:
        rows: V, ``[k, p]``.
        l2: Λ, ``[p]``.
        missed: of the trace of what it approximates, estimated.
    """

    def __init__(self, rows: Tensor, l2: Tensor, missed: float) -> None:
        self.rows, self.l2, self.missed = rows, l2, missed
        self.size, self.dtype, self.device = rows.shape[1], rows.dtype, rows.device
        self.held = float(rows.square().sum(dtype=torch.float64))

    def apply(self, rows: Tensor) -> Tensor:
        """Two products with V."""
        rows = rows.to(self.dtype)
        return rows * self.l2 + (rows @ self.rows.T) @ self.rows

    def trace(self) -> float:
        """‖V‖² and the sum of Λ."""
        return self.held + float(self.l2.sum())


@final
class NystromInverse(Inverse):
    """D⁻¹ − D⁻¹ Vᵀ (1 + V D⁻¹ Vᵀ)⁻¹ V D⁻¹, D = Λ + λ (Woodbury, 1950).

    Args:
        sketch: Λ + VᵀV.
        shift: λ.
        against: A + λ, to measure residuals with; they are unknown without it.

    Raises:
        IndefiniteError: D is not positive.
    """

    def __init__(self, sketch: Sketched, shift: float, against: Operator | None = None) -> None:
        self.sketch, self.against = sketch, against
        self.size, self.dtype, self.device = sketch.size, sketch.dtype, sketch.device
        self.diagonal = sketch.l2 + shift
        if not bool((self.diagonal > 0).all()):
            raise IndefiniteError(
                "Outside of its sketch the curvature counts as L2 and damping alone, and some "
                "parameter has neither. Add damping (damping='auto' is a start), or state the l2 "
                "that the model was trained with."
            )
        kernel = torch.eye(len(sketch.rows), dtype=torch.float64, device=self.device)
        for piece in pieces(self.size, 8 * len(kernel)):
            some = sketch.rows[:, piece].double()
            kernel += (some / self.diagonal[piece]) @ some.T
        self.factor = torch.linalg.cholesky(kernel)
        self.scaled = sketch.rows / self.diagonal
        share = sketch.held / max(sketch.held + sketch.missed, 1e-300)
        self.notes = (
            f"sketch of {len(kernel)} directions holds about {share:.0%} of the trace of the "
            "curvature without L2",
        )

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """Exact for the sketch; the residual is against the curvature itself."""
        rhs = rows.to(self.dtype)
        weights = torch.cholesky_solve((self.scaled @ rhs.T).double(), self.factor)
        value = rhs / self.diagonal - weights.T.to(self.dtype) @ self.scaled
        residual = torch.full_like(rhs[:, 0], torch.nan)
        if self.against is not None:
            residual = relative_residual(rhs, self.against.apply(value))
        return Solution(value, residual, (Status.CONVERGED,) * len(rhs))

    def quadratic(self, rows: Tensor) -> Tensor:
        """B D⁻¹ b − ‖L⁻¹ V D⁻¹ b‖² of every row, L Lᵀ = 1 + V D⁻¹ Vᵀ."""
        rhs = rows.to(self.dtype)
        return (rhs.square() / self.diagonal).sum(1) - self._taken(self.scaled @ rhs.T)

    def self_products(self, gradients: Gradients) -> Tensor:
        """The same without forming a gradient, where D is a multiple of 1."""
        first = self.diagonal[0]
        if not bool((self.diagonal == first).all()):
            return super().self_products(gradients)
        return gradients.squared_norms() / first - self._taken(gradients.dot(self.scaled))

    def _taken(self, products: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self.factor, products.double(), upper=False)
        taken: Tensor = half.square().sum(0).to(self.dtype)
        return taken
