"""Symmetric operators, solvers that turn them into inverses, and solutions that say how well."""

from upweight.linalg.block import Block
from upweight.linalg.blocks import BlockGradients, BlockRows, Outer
from upweight.linalg.cholesky import Cholesky, CholeskyInverse
from upweight.linalg.cost import Cost, Load
from upweight.linalg.eigen import Eigen, EigenInverse
from upweight.linalg.kronecker import (
    Eigenblock,
    KroneckerEigen,
    KroneckerInverse,
    Spectra,
    Spectral,
)
from upweight.linalg.operator import (
    Dense,
    Identity,
    MeanOperator,
    Operator,
    Recycled,
    Shifted,
    unshifted,
)
from upweight.linalg.solution import Solution, Status
from upweight.linalg.solver import Inverse, Solver
from upweight.linalg.values import DenseGradients, FactoredGradients, Gradients, Pieces, RowValues
from upweight.linalg.woodbury import Woodbury

__all__ = [
    "Block",
    "BlockGradients",
    "BlockRows",
    "Cholesky",
    "CholeskyInverse",
    "Cost",
    "Dense",
    "DenseGradients",
    "Eigen",
    "EigenInverse",
    "Eigenblock",
    "FactoredGradients",
    "Gradients",
    "Identity",
    "Inverse",
    "KroneckerEigen",
    "KroneckerInverse",
    "Load",
    "MeanOperator",
    "Operator",
    "Outer",
    "Pieces",
    "Recycled",
    "RowValues",
    "Shifted",
    "Solution",
    "Solver",
    "Spectra",
    "Spectral",
    "Status",
    "Woodbury",
    "unshifted",
]
