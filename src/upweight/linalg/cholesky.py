"""Direct solve by Cholesky factorisation."""

from typing import final

import torch
from torch import Tensor

from upweight.errors import IndefiniteError, InputError, NonFiniteError
from upweight.linalg.cost import Cost, Load
from upweight.linalg.operator import Dense, Operator
from upweight.linalg.solution import Solution, Status, indefinite, relative_residual
from upweight.linalg.solver import Inverse, Solver

__all__ = ["Cholesky", "CholeskyInverse"]


LARGEST_RESIDUAL = 1e-2


@final
class Cholesky(Solver):
    """A = L Lᵀ in float64, then two triangular solves per row.

    Exact up to rounding; needs 8 p² bytes twice, and about p³/3 operations once.

    Args:
        largest: refuse operators of more than this many parameters.

    Raises:
        IndefiniteError: A is not positive definite; the message gives its smallest eigenvalue and
            the damping that would do.
        InputError: A is larger than ``largest``.

    Example:
        >>> from upweight.linalg import Dense
        >>> Cholesky().init(Dense(2.0 * torch.eye(2))) @ torch.tensor([2.0, 4.0])
        tensor([1., 2.])
    """

    def __init__(self, *, largest: int = 20_000) -> None:
        self.largest = largest

    def _check_size(self, p: int) -> None:
        if p > self.largest:
            raise InputError(
                f"A dense solve of {p:,} parameters needs {2 * 8 * p * p / 2**30:,.1f} GiB. "
                "Use method='cg', choose fewer parameters, or raise Cholesky(largest=...)."
            )

    def cost(self, load: Load) -> Cost:
        """The matrix and its factor; a product measures the residuals."""
        self._check_size(load.size)
        p, m = float(load.size), load.rows
        return Cost(products=1, matrix=True, operations=p**3 / 3 + m * p**2, bytes=16 * p**2)

    def prepared(self, operator: Operator) -> Operator:
        """The matrix itself."""
        self._check_size(operator.size)
        return Dense(operator.to_dense())

    def init(self, operator: Operator) -> "CholeskyInverse":
        """Make A dense and factorise it."""
        p = operator.size
        self._check_size(p)
        dense = operator.to_dense()
        # A sum is finite only if all terms are, and needs no mask of the size of the matrix.
        if not bool(torch.isfinite(dense.sum())):
            raise NonFiniteError("The curvature has NaN or infinite entries. Check the losses.")
        dense = dense.double()
        factor, info = torch.linalg.cholesky_ex(dense)
        diagonal = factor.diagonal()
        # A factor of a singular matrix may exist by rounding alone.
        flat = (diagonal.min() / diagonal.max()) ** 2 < p * torch.finfo(torch.float64).eps
        if int(info) or bool(flat):
            raise IndefiniteError(indefinite(torch.linalg.eigvalsh(dense)))
        return CholeskyInverse(operator, factor)


@final
class CholeskyInverse(Inverse):
    """A⁻¹ from A = L Lᵀ.

    Args:
        operator: A.
        factor: L, ``[p, p]`` in float64.
    """

    def __init__(self, operator: Operator, factor: Tensor) -> None:
        self.operator, self.factor = operator, factor
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """Two triangular solves; the residual is measured against the operator itself."""
        exact = torch.cholesky_solve(rows.double().T, self.factor).T.to(rows.dtype)
        residual = relative_residual(rows, self.operator.apply(exact))
        status = tuple(
            Status.CONVERGED if r <= LARGEST_RESIDUAL else Status.NOT_CONVERGED
            for r in residual.tolist()
        )
        return Solution(exact, residual, status)

    def quadratic(self, rows: Tensor) -> Tensor:
        """‖L⁻¹ b‖² of every row: one triangular solve."""
        half = torch.linalg.solve_triangular(self.factor, rows.double().T, upper=False)
        squared: Tensor = half.square().sum(0).to(rows.dtype)
        return squared
