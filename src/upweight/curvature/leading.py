"""A preconditioner for networks: the rows that make up most of a Gauss-Newton matrix, exactly."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from upweight.budget import budget
from upweight.curvature.products import GaussNewton
from upweight.curvature.slopes import principal
from upweight.data import Batch
from upweight.errors import LossError
from upweight.gradients import Observation, batch_rows, observe, risk_layout
from upweight.linalg import BlockGradients, Operator, Woodbury, unshifted
from upweight.linalg.rows import RowPart, rows_of
from upweight.risk import Risk

__all__ = ["Leading"]

# Rows are found once for all dampings of a matrix.
_FOUND: WeakKeyDictionary[Operator, "dict[Leading, Woodbury]"] = WeakKeyDictionary()


@final
@dataclass(frozen=True)
class Leading:
    """(λ + Σ_k v_k v_kᵀ)⁻¹ over the m longest of the rows v that add up to the Gauss-Newton matrix.

    The matrix is Σ_i share_i J_iᵀ B_i B_iᵀ J_i + Λ with roots B_i of the loss's curvature at the
    outputs: rows v = √share_i J_iᵀ b for every example and column b. Of a trained network a few of
    them hold most of its trace. Conjugate gradients correct for the others, so the choice decides
    the number of steps and not the answer.

    Args:
        rows: m at most; fewer where they would take more than a quarter of the memory budget.

    Example:
        >>> from torch import nn
        >>> from upweight import Data, Objective
        >>> from upweight.solvers import CG
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
        >>> data = Data.of((torch.eye(3), torch.tensor([0, 1, 1])))
        >>> matrix = GaussNewton(Risk(Objective(model, "cross_entropy", l2=0.1), data))
        >>> CG(preconditioner=Leading()).init(matrix).solve(torch.ones(1, 14)).steps
        1
    """

    rows: int = 4000

    def __call__(self, operator: Operator, rows: int) -> Operator | None:
        """The preconditioner of a Gauss-Newton matrix, or None of anything else."""
        base, shift = unshifted(operator)
        if not isinstance(base, GaussNewton):
            return None
        risk = base.risk
        layout = risk_layout(risk)
        l2 = risk.objective.l2
        diagonal = [float(l2[block.weight]) for block in layout.blocks]
        if min(diagonal) + shift <= 0 or layout.general:
            return None
        known = _FOUND.setdefault(base, {})
        if self not in known:
            try:
                chosen = _Chosen(risk, self._most(risk)).rows()
            except LossError:  # a loss without roots
                return None
            known[self] = Woodbury(layout.blocks, chosen, diagonal, shift=shift)
        found = known[self]
        return found if found.shift == shift else found.damped(shift)

    def _most(self, risk: Risk) -> int:
        """Rows that fit, with the kernel between them, into a quarter of the budget."""
        one = observe(risk.objective, risk.rows(0, 1)[0]).gradients()
        parts = [rows_of(b, [terms]) for b, terms in zip(one.blocks, one.terms, strict=True)]
        row = float(sum(part.bytes() for part in parts if part is not None))
        room, item = budget() // 4, one.like.element_size()
        most = ((row**2 + 4 * item * room) ** 0.5 - row) / (2 * item)
        return max(1, min(self.rows, int(most)))


@final
class _Chosen:
    """The longest rows of a risk's Gauss-Newton matrix.

    Args:
        risk: objective and data.
        most: how many.
    """

    def __init__(self, risk: Risk, most: int) -> None:
        self.risk, self.size = risk, batch_rows(risk)
        lengths = torch.cat([self._lengths(*part) for part in risk.batches(self.size)])
        self.columns = lengths.shape[1]
        most = min(most, lengths.numel())
        self.places = lengths.flatten().topk(most).indices.sort().values.cpu()

    def _lengths(self, batch: Batch, share: Tensor) -> Tensor:
        """‖v‖² of every example and column, ``[b, c]``."""
        seen = observe(self.risk.objective, batch)
        columns = _columns(seen)
        found = [
            seen.pulled(column, keep=number + 1 < len(columns)).squared_norms()
            for number, column in enumerate(columns)
        ]
        return torch.stack(found, 1) * share[:, None]

    def _parts(self) -> Iterator[BlockGradients]:
        for places in self.places.split(self.size):
            batch, share = self.risk.at(places // self.columns)
            seen = observe(self.risk.objective, batch)
            stacked = torch.stack(_columns(seen))
            slope = stacked[places % self.columns, torch.arange(len(places))]
            root = share.sqrt().view(-1, *[1] * (slope.dim() - 1))
            yield seen.pulled(slope * root)

    def rows(self) -> list[RowPart | None]:
        """All of them, block by block."""
        found = [
            [rows_of(block, [terms]) for block, terms in zip(part.blocks, part.terms, strict=True)]
            for part in self._parts()
        ]
        return [_joined(parts) for parts in zip(*found, strict=True)]


def _columns(seen: Observation) -> list[Tensor]:
    """Orthogonal columns of the loss's root, as many as it has: some examples' last are 0."""
    columns = seen.objective.loss.columns(seen.outputs, seen.batch.targets)
    found = principal(columns)
    return found + [torch.zeros_like(columns[0])] * (len(columns) - len(found))


def _joined(parts: Sequence[RowPart | None]) -> RowPart | None:
    """The rows of all batches in one block."""
    known = [part for part in parts if part is not None]
    return known[0].joined(known[1:]) if known else None
