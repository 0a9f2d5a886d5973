"""Solvers that rows of the table bring with them, one file each; common ones are in linalg."""

from upweight.solvers.cg import CG
from upweight.solvers.datainf import DataInf
from upweight.solvers.kronecker import Kronecker
from upweight.solvers.lanczos import Lanczos
from upweight.solvers.lissa import LiSSA
from upweight.solvers.nystrom import Nystrom
from upweight.solvers.settled import Settled
from upweight.solvers.stopping import Budget, Progress, Rule

__all__ = [
    "CG",
    "Budget",
    "DataInf",
    "Kronecker",
    "Lanczos",
    "LiSSA",
    "Nystrom",
    "Progress",
    "Rule",
    "Settled",
]
