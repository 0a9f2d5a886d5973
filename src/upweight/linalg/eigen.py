"""Direct solve by eigendecomposition, for spectra and for many dampings of one operator."""

from typing import final

import torch
from torch import Tensor

from upweight.errors import IndefiniteError
from upweight.linalg.cost import Cost, Load
from upweight.linalg.operator import Operator
from upweight.linalg.solution import Solution, Status, indefinite, relative_residual
from upweight.linalg.solver import Inverse, Solver

__all__ = ["Eigen", "EigenInverse"]

# An eigendecomposition takes the time of so many p³ multiply-adds of a product (measured, p = 600).
EIGH = 4


@final
class Eigen(Solver):
    """A = Q diag(e) Qᵀ in float64; another damping of the same A costs nothing more.

    Raises:
        IndefiniteError: the smallest eigenvalue is not positive.

    Example:
        >>> from upweight.linalg import Dense
        >>> inverse = Eigen().init(Dense(torch.diag(torch.tensor([1.0, 3.0]))))
        >>> inverse.damped(1.0) @ torch.tensor([2.0, 4.0])
        tensor([1., 1.])
    """

    def cost(self, load: Load) -> Cost:
        """The matrix, its eigenvectors and the work space of finding them."""
        p, m = float(load.size), load.rows
        return Cost(matrix=True, operations=EIGH * p**3 + 4 * m * p**2, bytes=32 * p**2)

    def init(self, operator: Operator) -> "EigenInverse":
        """Make A dense and decompose it."""
        values, vectors = torch.linalg.eigh(operator.to_dense().double())
        return EigenInverse(values, vectors, operator.dtype)


@final
class EigenInverse(Inverse):
    """A⁻¹ from eigenvalues and eigenvectors.

    Args:
        values: e, ascending, ``[p]``.
        vectors: Q, ``[p, p]``.
        dtype: of the operator.
    """

    def __init__(self, values: Tensor, vectors: Tensor, dtype: torch.dtype) -> None:
        if not float(values[0]) > len(values) * torch.finfo(torch.float64).eps * float(values[-1]):
            raise IndefiniteError(indefinite(values))
        self.values, self.vectors = values, vectors
        self.size, self.dtype, self.device = len(values), dtype, values.device

    def damped(self, shift: float) -> "EigenInverse":
        """(A + shift I)⁻¹ from the same decomposition."""
        return EigenInverse(self.values + shift, self.vectors, self.dtype)

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """Rotate, divide, rotate back; the residual is against Q diag(e) Qᵀ."""
        rhs = rows.double()
        exact = ((rhs @ self.vectors) / self.values) @ self.vectors.T
        product = ((exact @ self.vectors) * self.values) @ self.vectors.T
        status = (Status.CONVERGED,) * len(rows)
        return Solution(exact.to(rows.dtype), relative_residual(rhs, product), status)

    def quadratic(self, rows: Tensor) -> Tensor:
        """Σ (b Q)² / e of every row."""
        return ((rows.double() @ self.vectors).square() / self.values).sum(1).to(rows.dtype)
