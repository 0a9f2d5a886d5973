"""Symmetric operators, solvers that turn them into inverses, and solutions that say how well."""

from upweight.linalg.cg import CG
from upweight.linalg.cholesky import Cholesky, CholeskyInverse
from upweight.linalg.eigen import Eigen, EigenInverse
from upweight.linalg.lissa import LiSSA
from upweight.linalg.operator import Dense, Identity, MeanOperator, Operator, Shifted
from upweight.linalg.solution import Solution, Status
from upweight.linalg.solver import Inverse, Solver

__all__ = [
    "CG",
    "Cholesky",
    "CholeskyInverse",
    "Dense",
    "Eigen",
    "EigenInverse",
    "Identity",
    "Inverse",
    "LiSSA",
    "MeanOperator",
    "Operator",
    "Shifted",
    "Solution",
    "Solver",
    "Status",
]
