"""Solvers that rows of the table bring with them, one file each; common ones are in linalg."""

from upweight.solvers.datainf import DataInf
from upweight.solvers.kronecker import Kronecker
from upweight.solvers.lanczos import Lanczos
from upweight.solvers.lissa import LiSSA
from upweight.solvers.nystrom import Nystrom

__all__ = ["DataInf", "Kronecker", "Lanczos", "LiSSA", "Nystrom"]
