"""A preconditioner for networks: few rows that hold most of a Gauss-Newton matrix."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from upweight.bars import track
from upweight.budget import budget
from upweight.curvature.products import Fisher, GaussNewton, Hessian
from upweight.curvature.slopes import MOST_TURNED, Draws, principal
from upweight.data import Batch
from upweight.errors import LossError
from upweight.gradients import batch_rows, observe, risk_layout
from upweight.linalg import BlockGradients, Operator, Woodbury, unshifted
from upweight.linalg.blocks import pieces
from upweight.linalg.rows import FormedRows, ProductRows, RowPart, rows_of
from upweight.objective import Objective
from upweight.risk import Risk

__all__ = ["Leading"]

# Rows are found once for all dampings of a matrix.
_FOUND: WeakKeyDictionary[Operator, "dict[Leading, Woodbury]"] = WeakKeyDictionary()
# Draws for each direction that is kept, and from one example at most: few are noise.
DRAWN, MOST_DRAWN = 32, 64
# Rows themselves are kept where they take less than this part of what a direction does.
FEWER = 4


@final
@dataclass(frozen=True)
class Leading:
    """(λ + Vᵀ V)⁻¹ with few rows V that hold most of the Gauss-Newton matrix.

    The matrix is Σ_i share_i J_iᵀ B_i B_iᵀ J_i + Λ with roots B_i of the loss's curvature at the
    outputs: rows v = √share_i J_iᵀ b for every example and column b. Where layers are used at one
    position of an example, rows are outer products, and thousands fit: V are the longest, exactly.
    Elsewhere, as in convolutions and language models, a row is as large as the parameters: V are
    the principal directions of rows with random b (``Draws``), of which few hold more than many
    rows do. The Fisher matrix and the Hessian resemble it, and take the same V. Conjugate gradients
    correct for the rest, so the choice decides the number of steps and not the answer.

    Args:
        rows: of V at most; fewer where they would take more than a quarter of the memory budget.
        seed: of the draws.

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
    seed: int = 0

    def __call__(self, operator: Operator, rows: int) -> Operator | None:
        """The preconditioner of a matrix that is, or resembles, a Gauss-Newton matrix, or None."""
        base, shift = unshifted(operator)
        if not isinstance(base, (Fisher, GaussNewton, Hessian)):
            return None
        risk = base.risk
        layout = risk_layout(risk)
        l2 = risk.objective.l2
        diagonal = [float(l2[block.weight]) for block in layout.blocks]
        if min(diagonal) + shift <= 0:
            return None
        known = _FOUND.setdefault(base, {})
        if self not in known:
            try:
                parts = self._parts(risk)
            except LossError:  # neither roots nor draws
                return None
            known[self] = Woodbury(layout.blocks, parts, diagonal, shift=shift)
        found = known[self]
        return found if found.shift == shift else found.damped(shift)

    def _parts(self, risk: Risk) -> list[RowPart | None]:
        """V, block by block."""
        one = observe(risk.objective, risk.rows(0, 1)[0]).gradients()
        parts = [rows_of(b, [terms]) for b, terms in zip(one.blocks, one.terms, strict=True)]
        row = float(sum(part.bytes() for part in parts if part is not None))
        item, size, columns = one.like.element_size(), one.size, _columns_of(risk)
        # So many of these rows fit, with two kernels: for all dampings, and for the present one.
        most = min(self.rows, int(((row**2 + 2 * item * budget()) ** 0.5 - row) / (4 * item)))
        if columns and (FEWER * row < size * item or most >= columns * len(risk.data)):
            return _Longest(risk, max(1, most)).rows()
        most = max(1, min(self.rows, budget() // (4 * size * item)))
        directions = _drawn(risk, most, self.seed)
        return [FormedRows(*block.views(directions)) for block in one.blocks]


def _columns_of(risk: Risk) -> int:
    """Columns of the loss's root; 0 where they are many or unknown."""
    batch, _ = risk.rows(0, 1)
    with torch.no_grad():
        outputs = risk.objective.call(batch)
    try:
        count = len(risk.objective.loss.columns(outputs, batch.targets))
    except LossError:
        return 0
    return count if count <= MOST_TURNED else 0


def _drawn(risk: Risk, most: int, seed: int) -> Tensor:
    """Principal directions ``[m, p]`` of random rows whose second moment is the matrix."""
    count, wanted = len(risk.data), DRAWN * most
    if wanted < count:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(count, generator=generator)[:wanted].sort().values
    else:
        chosen = torch.arange(count)
    slopes = Draws(min(MOST_DRAWN, -(-wanted // count)), seed)
    found = _Principal(most, risk.objective.l2)
    for places in track(chosen.split(batch_rows(risk)), "directions"):
        batch, share = risk.at(places)
        for gradients, weight in slopes.gradients(observe(risk.objective, batch)):
            root = (share * (weight * count / len(chosen))).sqrt()
            for piece in pieces(gradients.count, gradients.size * root.element_size()):
                found.add(gradients.part(piece).dense() * root[piece, None])
    return found.directions()


@final
class _Principal:
    """The m rows V whose VᵀV is closest to that of all rows so far, in twice their room.

    Args:
        most: m.
        like: a row of the same length, dtype and device.
    """

    def __init__(self, most: int, like: Tensor) -> None:
        self.most, self.filled = most, 0
        self.rows = like.new_empty(2 * most, len(like))

    def add(self, rows: Tensor) -> None:
        """Take rows ``[n, p]``."""
        while len(rows):
            some = rows[: len(self.rows) - self.filled]
            self.rows[self.filled : self.filled + len(some)] = some
            self.filled, rows = self.filled + len(some), rows[len(some) :]
            if self.filled == len(self.rows):
                self._cut()

    def _cut(self) -> None:
        """Turn to principal directions, and keep the first."""
        whole = self.rows[: self.filled]
        _, turn = torch.linalg.eigh((whole @ whole.T).double())
        turn = turn[:, -self.most :].T.to(whole.dtype)
        for piece in pieces(whole.shape[1], len(whole) * whole.element_size()):
            self.rows[: len(turn), piece] = turn @ whole[:, piece]
        self.filled = len(turn)

    def directions(self) -> Tensor:
        """V, ``[m, p]``."""
        if self.filled > self.most:
            self._cut()
        return self.rows[: self.filled].clone()


@final
class _Longest:
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
        columns = _columns(seen.objective, seen.outputs, seen.batch)
        found = [
            seen.pulled(column, keep=number + 1 < len(columns)).squared_norms()
            for number, column in enumerate(columns)
        ]
        return torch.stack(found, 1) * share[:, None]

    def _parts(self) -> Iterator[BlockGradients]:
        for places in self.places.split(self.size):
            owners = places // self.columns
            batch, share = self.risk.at(owners)
            slope = self._stacked(owners)[places % self.columns, torch.arange(len(places))]
            root = share.sqrt().view(-1, *[1] * (slope.dim() - 1))
            yield observe(self.risk.objective, batch).pulled(slope * root)

    def _stacked(self, owners: Tensor) -> Tensor:
        """Columns of every row's example, ``[c, m, ...]``.

        They are found once for an example: where lengths are equal any turn of them is as good, and
        rows of different turns would not belong together.
        """
        examples, place = owners.unique(return_inverse=True)
        objective, (batch, _) = self.risk.objective, self.risk.at(examples)
        with torch.no_grad():
            outputs = objective.call(batch)
        return torch.stack(_columns(objective, outputs, batch))[:, place]

    def rows(self) -> list[RowPart | None]:
        """All of them, block by block."""
        found = [
            [rows_of(block, [terms]) for block, terms in zip(part.blocks, part.terms, strict=True)]
            for part in self._parts()
        ]
        return [self._joined(parts) for parts in zip(*found, strict=True)]

    def _joined(self, parts: Sequence[RowPart | None]) -> RowPart | None:
        """The rows of all batches in one block, those of an example side by side."""
        known = [part for part in parts if part is not None]
        if not known:
            return None
        whole = known[0].joined(known[1:])
        if isinstance(whole, ProductRows):
            return whole.grouped(self.places.to(whole.left.device) // self.columns)
        return whole


def _columns(objective: Objective, outputs: Any, batch: Batch) -> list[Tensor]:
    """Orthogonal columns of the loss's root, as many as it has: some examples' last are 0."""
    columns = objective.loss.columns(outputs, batch.targets)
    found = principal(columns)
    return found + [torch.zeros_like(columns[0])] * (len(columns) - len(found))
