"""Curvature matrices of any module, as products that never form the matrix."""

from abc import abstractmethod
from collections.abc import Callable
from copy import copy
from functools import cached_property
from math import isqrt
from typing import Any, final

import torch
from torch import Tensor
from torch.func import grad

from upweight.budget import budget
from upweight.checks import refuse_asymmetric, refuse_flat
from upweight.curvature.slopes import Columns
from upweight.data import Batch
from upweight.errors import LossError
from upweight.gradients import (
    ROW_CHUNK,
    AutogradGradients,
    Layout,
    map_rows,
    math_attention,
    observe,
    pull_back,
    push_forward,
    risk_layout,
)
from upweight.linalg import KroneckerEigen, MeanOperator
from upweight.linalg.rows import rows_of
from upweight.objective import Objective
from upweight.risk import Risk
from upweight.sources import leaves

__all__ = ["EmpiricalFisher", "Fisher", "GaussNewton", "Hessian"]

Product = Callable[[Tensor], Tensor]
PASSES = 5


class _RiskCurvature(MeanOperator):
    """Σ_i share_i A_i + Λ over the training data; a leaf supplies the product of one batch.

    Args:
        risk: the objective and its data.
    """

    def __init__(self, risk: Risk) -> None:
        space = risk.objective.space
        self.risk, self.count = risk, len(risk.data)
        self.size, self.dtype, self.device = space.size, space.dtype, space.device

    @property
    def l2(self) -> Tensor:
        """The objective's."""
        return self.risk.objective.l2

    @abstractmethod
    def product(self, batch: Batch, share: Tensor) -> Product:
        """The map rows ``[m, p]`` -> Σ_i share_i A_i rows of one batch."""

    @final
    def apply(self, rows: Tensor) -> Tensor:
        """One pass over the data for all rows."""
        rows = rows.to(self.dtype)
        total = rows * self.l2
        with math_attention():
            for batch, share in self.risk.batches():
                self._add(batch, share, rows, total)
        return total

    def _add(self, batch: Batch, share: Tensor, rows: Tensor, total: Tensor) -> None:
        """Add the product of one batch to what there is, in place.

        As many examples and rows go together as a quarter of the memory budget takes: at a time,
        each example is there once for each row.
        """
        cells = max(1, budget() // 4 // max(self._layout.row_bytes, 1))
        width = max(1, min(len(rows), ROW_CHUNK, isqrt(cells)))
        size = cells // width
        for start in range(0, len(batch), size):
            some = slice(start, start + size)
            product = self.product(batch.part(some), share[some])
            for part, into in zip(rows.split(width), total.split(width), strict=True):
                into += product(part)

    @cached_property
    def _layout(self) -> Layout:
        return risk_layout(self.risk)

    @final
    def apply_sampled(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Each group of rows times the curvature of its own examples."""
        scale = self.count / positions.shape[1]
        total = rows * self.l2
        with math_attention():
            for group, where in enumerate(positions):
                batch, share = self.risk.at(where)
                self._add(batch, share * scale, rows[group], total[group])
        return total

    @final
    def restrict(self, positions: Tensor) -> "_RiskCurvature":
        """The same curvature over some of the examples."""
        part = copy(self)
        part.risk = Risk(self.risk.objective, self.risk.data.take(positions))
        part.count = len(part.risk.data)
        return part


def _at(objective: Objective, batch: Batch) -> tuple[Callable[[Tensor], Any], Tensor]:
    """Outputs as a function of the parameter row, and the row."""
    space = objective.space
    return lambda row: objective.outputs(space.unflatten(row), batch), space.row()


@final
class Hessian(_RiskCurvature):
    """∇²R = Σ_i share_i ∇²ℓ_i + Λ, by reverse over reverse (Pearlmutter, 1994).

    Args:
        risk: the objective and its data.

    Raises:
        ModelError: torch's second derivatives of the model are not symmetric.
    """

    def __init__(self, risk: Risk) -> None:
        super().__init__(risk)
        with math_attention():
            refuse_asymmetric(risk.objective, risk.data)

    def product(self, batch: Batch, share: Tensor) -> Product:
        """One forward and double backward, shared by all rows."""
        objective = self.risk.objective
        space = objective.space

        def total(row: Tensor) -> Tensor:
            return (objective.losses(space.unflatten(row), batch) * share).sum()

        _, pull = pull_back(grad(total), space.row())
        return lambda rows: map_rows(pull, rows)


@final
class GaussNewton(_RiskCurvature):
    """Generalised Gauss-Newton Σ_i share_i J_iᵀ ∇²_z ℓ_i J_i + Λ (Schraudolph, 2002).

    z are the model's outputs and J_i their derivative; positive semidefinite when the loss is
    convex in the outputs.

    Args:
        risk: the objective and its data.
        basis: Q of a curvature, in whose coordinates rows are: the product is then one with QᵀGQ.

    Raises:
        LossError: the loss has no curvature in the outputs.
    """

    def __init__(self, risk: Risk, basis: KroneckerEigen | None = None) -> None:
        super().__init__(risk)
        refuse_flat(risk.objective, risk.data)
        self.basis = basis
        # Columns of the loss's root by the shape of an example's inputs.
        self._counted: dict[tuple[torch.Size, ...], int | None] = {}

    @property
    def l2(self) -> Tensor:
        """The objective's: alike in a block, it is the same in any basis of that."""
        l2 = self.risk.objective.l2
        if self.basis is None:
            return l2
        return torch.cat([l2[p.block.weight].expand(p.block.size) for p in self.basis.blocks])

    def _add(self, batch: Batch, share: Tensor, rows: Tensor, total: Tensor) -> None:
        """By the layers' factors where that is cheaper, otherwise by both modes of autograd.

        Factors cost a backward pass per column of the loss's root, and hardly more for more rows;
        autograd costs about as much as five of them per row.
        """
        layout = self._layout
        columns = None if layout.general else self._columns(batch)
        if columns is None or columns > PASSES * len(rows):
            if self.basis is None:
                super()._add(batch, share, rows, total)
                return
            plain = torch.zeros_like(rows)
            super()._add(batch, share, self.basis.back(rows), plain)
            total += self.basis.turn(plain)
            return
        # The factors of all columns are there at once.
        size = max(1, budget() // 4 // (max(layout.row_bytes // 2, 1) * (columns + 1)))
        for start in range(0, len(batch), size):
            some = slice(start, start + size)
            self._add_by_factors(batch.part(some), share[some], rows, total)

    def _add_by_factors(self, batch: Batch, share: Tensor, rows: Tensor, total: Tensor) -> None:
        """Add Σ_ib share_i v vᵀ times rows, v = J_iᵀ b of examples i and columns b."""
        seen = observe(self.risk.objective, batch)
        found = [gradients for gradients, _ in Columns().gradients(seen)]
        blocks, columns = found[0].blocks, zip(*(one.terms for one in found), strict=True)
        parts = [rows_of(block, terms) for block, terms in zip(blocks, columns, strict=True)]
        if self.basis is not None:
            turned = zip(parts, self.basis.blocks, strict=True)
            parts = [part and part.turned(basis) for part, basis in turned]
            blocks = self.basis.coordinates
        known = [(block, part) for block, part in zip(blocks, parts, strict=True) if part]
        weights = sum(part.dot(*block.views(rows)) for block, part in known)
        assert isinstance(weights, Tensor)
        weights *= share.repeat_interleave(len(found))[:, None]
        for block, part in known:
            part.add(weights.T, *block.views(total))

    def _columns(self, batch: Batch) -> int | None:
        """Columns of the loss's root at the outputs; None where they are many or unknown."""
        shape = tuple(leaf.shape[1:] for leaf in leaves(batch.inputs))
        if shape not in self._counted:
            self._counted[shape] = self._count(batch)
        return self._counted[shape]

    def _count(self, batch: Batch) -> int | None:
        objective, one = self.risk.objective, batch.part(slice(0, 1))
        try:
            with torch.no_grad():
                outputs = objective.call(one)
            return len(objective.loss.columns(outputs, one.targets))
        except LossError:
            return None

    def product(self, batch: Batch, share: Tensor) -> Product:
        """Forward mode to the outputs, the loss's curvature there, reverse mode back."""
        objective = self.risk.objective
        outputs, row = _at(objective, batch)
        z, back = pull_back(outputs, row)

        def total(values: Any) -> Tensor:
            return (objective.loss(values, batch.targets) * share).sum()

        _, curve = pull_back(grad(total), z)

        def single(direction: Tensor) -> Tensor:
            pushed = push_forward(outputs, row, direction)
            product: Tensor = back(curve(pushed))
            return product

        return lambda rows: map_rows(single, rows)


@final
class Fisher(_RiskCurvature):
    """True Fisher Σ_i share_i E[∇ℓ_i ∇ℓ_iᵀ] + Λ over labels drawn from the model, in closed form.

    Args:
        risk: the objective and its data; the loss must be a negative log-probability.

    Raises:
        LossError: on the first product, when the loss has no likelihood.
    """

    def product(self, batch: Batch, share: Tensor) -> Product:
        """Forward mode to the outputs, the Fisher there, reverse mode back."""
        objective = self.risk.objective
        outputs, row = _at(objective, batch)
        z, back = pull_back(outputs, row)
        spread = share.view(-1, *[1] * (z.dim() - 1))

        def single(direction: Tensor) -> Tensor:
            pushed = push_forward(outputs, row, direction)
            product: Tensor = back(objective.loss.fisher(z, batch.targets, pushed) * spread)
            return product

        return lambda rows: map_rows(single, rows)


@final
class EmpiricalFisher(_RiskCurvature):
    """Empirical Fisher Σ_i share_i ∇ℓ_i ∇ℓ_iᵀ + Λ with the given labels.

    Args:
        risk: the objective and its data.
    """

    def _add(self, batch: Batch, share: Tensor, rows: Tensor, total: Tensor) -> None:
        """All rows at once: gradients are made once for many of them."""
        total += self.product(batch, share)(rows)

    def product(self, batch: Batch, share: Tensor) -> Product:
        """Products with the gradients, weighted, combined again."""
        gradients = AutogradGradients(self.risk.objective, batch)
        return lambda rows: gradients.combine(gradients.dot(rows) * share)
