"""Solvers: work that depends on the operator is done once, then many rows are solved."""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from upweight.linalg.blocks import pieces
from upweight.linalg.cost import Cost, Load
from upweight.linalg.operator import Operator
from upweight.linalg.solution import Solution
from upweight.linalg.values import Gradients, RowValues

__all__ = ["Inverse", "Solver"]


class Solver(ABC):
    """A way to invert operators.

    ``init(A)`` does the work that depends on A alone and returns an Inverse; a stochastic solver
    asks A for more than its product and raises InputError when A cannot give it.
    """

    @abstractmethod
    def init(self, operator: Operator) -> "Inverse":
        """The inverse of an operator, which is an operator again."""

    def prepared(self, operator: Operator) -> Operator:
        """The operator in a form that costs no pass over data when another λ is added to it."""
        return operator

    def cost(self, load: Load) -> Cost | None:
        """What inverting a curvature and solving takes; None where that is not known before.

        Raises:
            InputError: there is more of it than the solver takes.
        """
        del load
        return None


class Inverse(Operator):
    """A⁻¹ as an operator; ``solve`` tells how well each row was solved.

    Attributes:
        notes: what a reader of results must know of it.
    """

    notes: tuple[str, ...] = ()

    @abstractmethod
    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """Rows X ``[m, p]`` with X A = rows."""

    def quadratic(self, rows: Tensor) -> Tensor:
        """B A⁻¹ b of every row, ``[m]``: by a solve, where there is no cheaper way."""
        return (rows * self.apply(rows)).sum(1)

    def precondition(self, gradients: Gradients) -> Solution[Tensor] | Solution[RowValues]:
        """Rows G A⁻¹ of gradients, in whatever form serves products with other gradients best."""
        return self.solve(gradients.dense())

    def self_products(self, gradients: Gradients) -> Tensor:
        """G A⁻¹ g of every gradient, ``[n]``."""
        rows = pieces(gradients.count, self.size * self.dtype.itemsize)
        return torch.cat([self.quadratic(gradients.part(piece).dense()) for piece in rows])

    @final
    def apply(self, rows: Tensor) -> Tensor:
        """Rows times A⁻¹; raises when a row was not solved."""
        return self.solve(rows).require()
