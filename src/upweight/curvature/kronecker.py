"""Kronecker-factored curvature: K-FAC, EK-FAC, their Shampoo relatives and the diagonal.

For a block with gradient matrices G_n = Σ_s l_ns r_nsᵀ the curvature Σ_n share_n E[vec G vec Gᵀ] is
taken to be diagonal in the basis Q_L ⊗ Q_R of eigenvectors of two moments. K-FAC puts products of
their eigenvalues on the diagonal; the corrected form its true values there,

    Λ_jk = Σ_n share_n E[(Q_Lᵀ G_n Q_R)²_jk]        (George et al., 2018).
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.budget import budget, in_steps
from upweight.curvature.moments import LARGEST_SIDE, Expand, Moments
from upweight.curvature.slopes import Draws, Slopes
from upweight.data import Batch
from upweight.errors import InputError
from upweight.gradients import Layout, Observation, layout_of, observe
from upweight.linalg import Block, BlockGradients, Eigenblock, KroneckerEigen, Outer
from upweight.linalg.blocks import form, pieces
from upweight.risk import Risk

__all__ = ["EKFAC", "KFAC"]

LEAST_ROWS, POSITIONS_PER_SIDE, MARGIN = 128, 16, 4
BATCH_BYTES, LARGE_BATCH = 64 * 2**20, 4096

Rows = int | Literal["auto"] | None
Looked = tuple[BlockGradients, Tensor, int]


@final
@dataclass(frozen=True)
class KFAC:
    """Products of the moments' eigenvalues (Martens & Grosse, 2015).

    Args:
        moments: ``Expand`` or ``Reduce`` for weights that are used at many positions; ``Gradient``
            for Shampoo's.
        slopes: ``Draws(count)`` or ``Columns()`` for the Gauss-Newton matrix, ``Labels()`` for the
            empirical Fisher.
        rows: examples to fit on; all by default, or "auto" for as many as the moments need.
        seed: of the choice of rows.
    """

    moments: type[Moments] = Expand
    slopes: Slopes = field(default_factory=Draws)
    rows: Rows = None
    seed: int = 0

    def fitted(self, risk: Risk) -> int:
        """How many of the examples it is fitted on."""
        return _fitted(risk, self.rows)

    def batch(self, risk: Risk) -> int:
        """How many of them it looks at together."""
        return _batch(risk, _fitted(risk, self.rows))

    def trial(self, risk: Risk, rows: int) -> KroneckerEigen:
        """A fit to a few of the examples, made as the whole one will be: to see what it costs."""
        return self._fit(_Fit(risk, self.slopes, rows=self.rows, seed=self.seed).shortened(rows))

    def __call__(self, risk: Risk) -> KroneckerEigen:
        """Fit over the training data."""
        return self._fit(_Fit(risk, self.slopes, rows=self.rows, seed=self.seed))

    def _fit(self, fit: "_Fit") -> KroneckerEigen:
        moments = fit.moments(self.moments)
        blocks = []
        for part in moments:
            left, right = part.bases()
            blocks.append(Eigenblock(part.block, left, right, part.product(left, right)))
        return fit.represented(blocks, fit.notes())


@final
@dataclass(frozen=True)
class EKFAC:
    """The curvature's own diagonal in the basis of the moments (George et al., 2018).

    Args:
        moments: that make the basis: ``Expand``, ``Reduce``, ``Gradient``, or ``Axes`` for the
            plain diagonal.
        slopes: ``Draws(count)`` or ``Columns()`` for the Gauss-Newton matrix, ``Labels()`` for the
            empirical Fisher.
        rows: examples to fit on; all by default, or "auto" for as many as the moments need: 16
            positions per side of the largest block, and 128 examples. With fewer than all, the
            standard error of Λ is reported.
        seed: of the choice of rows.

    Example:
        >>> from torch import nn
        >>> from upweight import Data, Objective
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
        >>> data = Data.of((torch.eye(3), torch.tensor([0, 1, 1])))
        >>> EKFAC()(Risk(Objective(model, "cross_entropy"), data)).size
        14
    """

    moments: type[Moments] = Expand
    slopes: Slopes = field(default_factory=Draws)
    rows: Rows = None
    seed: int = 0

    def fitted(self, risk: Risk) -> int:
        """How many of the examples it is fitted on."""
        return _fitted(risk, self.rows)

    def batch(self, risk: Risk) -> int:
        """How many of them it looks at together."""
        return _batch(risk, _fitted(risk, self.rows))

    def trial(self, risk: Risk, rows: int) -> KroneckerEigen:
        """A fit to a few of the examples, made as the whole one will be: to see what it costs."""
        return self._fit(_Fit(risk, self.slopes, rows=self.rows, seed=self.seed).shortened(rows))

    def __call__(self, risk: Risk) -> KroneckerEigen:
        """Fit over the training data: moments first, then the diagonal in their basis.

        A block whose moments a part of the examples determines has its basis before the pass over
        all of them, which then gives its diagonal at once.
        """
        return self._fit(_Fit(risk, self.slopes, rows=self.rows, seed=self.seed))

    def _fit(self, fit: "_Fit") -> KroneckerEigen:
        blocks = {
            place: fit.undetermined(place, part) for place, part in fit.early(self.moments).items()
        }
        early, masses = frozenset(blocks), [0.0, 0.0]
        late = fit.none(self.moments, frozenset(range(len(fit.layout.blocks))) - early)
        for gradients, share, number in fit.batches("moments", drop=early):
            masses[number % 2] += float(share.sum())
            for place, part in late.items():
                part.add(gradients.terms[place], share)
            _add_squares(blocks, gradients, share, number)
        rest = {place: fit.undetermined(place, part) for place, part in late.items()}
        for gradients, share, number in fit.batches("eigenvalues", drop=early) if rest else ():
            _add_squares(rest, gradients, share, number)
        halves = [part for _, part in sorted({**blocks, **rest}.items())]
        summed = [
            Eigenblock(part.block, part.left, part.right, part.values.sum(0)) for part in halves
        ]
        error = None
        if fit.sampled is not None:
            error = _standard_error([part.values for part in halves], masses)
        return fit.represented(summed, fit.notes(error))


@final
class _Fit:
    """The pass over (a sample of) the data that a fit makes, once or twice.

    Gradients are kept from one pass to the next while they fit into a quarter of the memory budget.
    """

    def __init__(self, risk: Risk, slopes: Slopes, *, rows: Rows, seed: int) -> None:
        count = len(risk.data)
        first = risk.at(torch.arange(min(16, count), device="cpu"))[0]
        self.layout: Layout = layout_of(risk.objective, first)
        fitted = _fitted(risk, rows)
        self.sampled = fitted if fitted < count else None
        self.size = _batch(risk, fitted)
        # Where one block needs many examples, others with many positions do not need them all.
        sides = _sides(risk)
        self.indexed = [side.indexed for side in sides]
        automatic = rows == "auto"
        self.every = [side.every(fitted) if automatic else 1 for side in sides]
        self.whole, self.slopes = risk, slopes
        if self.sampled is not None:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(count, generator=generator)[: self.sampled].sort().values
            risk = Risk(risk.objective, risk.data.take(chosen))
        self.risk = risk
        self._kept: list[Looked] | None = None

    def shortened(self, rows: int) -> "_Fit":
        """The same over the first examples alone."""
        rows = min(rows, len(self.risk.data))
        data = self.risk.data.take(torch.arange(rows, device="cpu"))
        self.risk = Risk(self.risk.objective, data)
        return self

    def batches(self, label: str, drop: Collection[int] = ()) -> Iterator[Looked]:
        """Gradients of every batch and slope, shares with its weight, and the batch's number.

        Args:
            label: of the progress bar.
            drop: blocks that need not be kept for another pass.
        """
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Looked] | None = []
        room, count = _room(), len(self.risk.data)
        steps = in_steps(count, self.size, self._look)
        for number, slopes in enumerate(track(steps, label, -(-count // self.size))):
            for gradients, share in slopes:
                looked = gradients, share, number
                yield looked
                rest = looked[0].without(drop)
                room -= rest.bytes()
                if kept is not None and room >= 0:
                    kept.append((rest, *looked[1:]))
                else:
                    kept = None
        self._kept = kept

    def _look(self, start: int, stop: int) -> list[tuple[BlockGradients, Tensor]]:
        return self._slopes(*self.risk.rows(start, stop))

    def _slopes(self, batch: Batch, share: Tensor) -> list[tuple[BlockGradients, Tensor]]:
        """Gradients for every slope, with shares times its weight."""
        seen = Observation(self.risk.objective, self.layout, batch)
        return [(found, share * weight) for found, weight in self.slopes.gradients(seen)]

    def none(self, kind: type[Moments], places: Collection[int]) -> dict[int, Moments]:
        """Moments of some blocks before anything was added."""
        like = self.risk.objective.l2
        return {
            place: kind(self.layout.blocks[place], like, indexed=self.indexed[place])
            for place in places
        }

    def undetermined(self, place: int, moments: Moments) -> Eigenblock:
        """A block in the basis of its moments, with zeros for Λ of both halves of the data."""
        dtype = torch.promote_types(self.risk.objective.space.dtype, torch.float32)
        block = self.layout.blocks[place]
        values = self.risk.objective.l2.new_zeros(2, *block.shape, dtype=dtype)
        return Eigenblock(block, *moments.bases(), values)

    def early(self, kind: type[Moments]) -> dict[int, Moments]:
        """Moments of the blocks that a part of the examples determines."""
        found = self.none(kind, [place for place, every in enumerate(self.every) if every > 1])
        if not found:
            return found
        every = min(self.every[place] for place in found)
        chosen = torch.arange(0, len(self.risk.data), every, device="cpu")
        part = Risk(self.risk.objective, self.risk.data.take(chosen))
        steps = in_steps(len(chosen), self.size, lambda a, b: self._slopes(*part.rows(a, b)))
        for slopes in steps:
            for gradients, weighted in slopes:
                for place, moments in found.items():
                    moments.add(gradients.terms[place], weighted)
        return found

    def moments(self, kind: type[Moments]) -> list[Moments]:
        """The moments of every block."""
        found = self.early(kind)
        late = self.none(kind, set(range(len(self.layout.blocks))) - set(found))
        for gradients, share, _ in self.batches("moments", drop=range(len(self.layout.blocks))):
            for place, part in late.items():
                part.add(gradients.terms[place], share)
        return [part for _, part in sorted({**found, **late}.items())]

    def notes(self, error: float | None = None) -> tuple[str, ...]:
        """That a sample was fitted on, and how well it determines the eigenvalues."""
        if self.sampled is None:
            return ()
        size = "unknown" if error == float("inf") else f"{error or 0:.0%}"
        known = "" if error is None else f" (standard error of its eigenvalues {size})"
        return (
            f"curvature fitted on {self.sampled:,} of {len(self.whole.data):,} examples{known}",
        )

    def represented(self, blocks: list[Eigenblock], notes: tuple[str, ...]) -> KroneckerEigen:
        """The operator, with the L2 of each block on its eigenvalues."""
        objective = self.risk.objective
        added = [
            Eigenblock(
                part.block,
                part.left,
                part.right,
                (part.values + float(objective.l2[part.block.weight])).to(objective.l2),
            )
            for part in blocks
        ]
        return KroneckerEigen(added, objective.space.size, notes)


def _standard_error(halves: list[Tensor], masses: list[float]) -> float:
    """Relative error of the sum of two halves ``[2, ...]`` of the data, from their difference."""
    first, second = (mass / max(sum(masses), 1e-300) for mass in masses)
    gap = sum(float((second * half[0] - first * half[1]).square().sum()) for half in halves)
    size = sum(float(half.sum(0).square().sum()) for half in halves)
    return (gap / max(size * first * second, 1e-300)) ** 0.5 if first * second else float("inf")


def _fitted(risk: Risk, rows: Rows) -> int:
    count = len(risk.data)
    if rows is None:
        return count
    wanted = max(side.needed for side in _sides(risk)) if rows == "auto" else rows
    if wanted < 1:
        raise InputError(f"A curvature is fitted on at least 1 example, got rows={rows}.")
    return min(wanted, count)


def _room() -> int:
    """Bytes of gradients that are kept from the first pass to the second."""
    return budget() // 4


def _batch(risk: Risk, fitted: int) -> int:
    """Examples looked at together: they stay in the cache, and a sample has halves to compare."""
    row = max(layout_of(risk.objective, risk.rows(0, min(16, len(risk.data)))[0]).row_bytes, 1)
    most = LARGE_BATCH if fitted == len(risk.data) else -(-fitted // 8)
    return max(1, min(most, min(BATCH_BYTES, budget() // 4) // row))


@final
@dataclass(frozen=True)
class _Side:
    """What the moments of one block ask of the data."""

    largest: int
    positions: int
    indexed: bool

    @property
    def needed(self) -> int:
        """Examples whose positions determine the moments."""
        spread = -(-POSITIONS_PER_SIDE * self.largest // max(self.positions, 1))
        return max(LEAST_ROWS, spread)

    def every(self, fitted: int) -> int:
        """Where an example has many positions: which part of the examples is enough, amply."""
        return max(1, fitted // (MARGIN * self.needed)) if self.positions > 1 else 1


def _sides(risk: Risk) -> list[_Side]:
    """Of every block, from one example."""
    gradients = observe(risk.objective, risk.at(torch.tensor([0], device="cpu"))[0]).gradients()
    found = []
    for block, terms in zip(gradients.blocks, gradients.terms, strict=True):
        indexed = any(term.indexed for term in terms)
        side = min(block.inputs if indexed else max(block.outputs, block.inputs), LARGEST_SIDE)
        # Vectors (scales, shifts) are few, and summed over positions before they are counted.
        largest = side if block.outputs > 1 else 0
        found.append(_Side(largest, sum(term.positions for term in terms), indexed))
    return found


def _add_squares(
    parts: Mapping[int, Eigenblock], gradients: BlockGradients, share: Tensor, number: int
) -> None:
    """Add a batch to the half of Λ that its number says, in every block."""
    for place, part in parts.items():
        terms = gradients.terms[place]
        if terms:
            _add_block_squares(part, terms, share, part.values[number % 2])


def _add_block_squares(
    part: Eigenblock, terms: tuple[Outer, ...], share: Tensor, total: Tensor
) -> None:
    """Add Σ_n share_n (Q_Lᵀ G_n Q_R)² to ``[g, o, i]``; where G is one outer product, unformed."""
    if len(terms) == 1 and terms[0].positions == 1:
        left, right = (f[:, :, 0].square() for f in part.turned_factors(terms[0]))
        total += (left * share[:, None]).mT @ right
        return
    block = part.block
    turned_first = _turning_first(block, terms)
    for piece in pieces(len(share), 2 * block.size * total.element_size()):
        some = [term.part(piece) for term in terms]
        if turned_first:
            factors = [part.turned_factors(term) for term in some]
            formed = sum(left.mT @ right for left, right in factors)
            assert isinstance(formed, Tensor)
            formed = formed.transpose(0, 1)
        else:
            formed = part.turn(form(some, block.outputs))
        total += (share[piece] @ formed.square_().flatten(1)).view_as(total)


def _turning_first(block: Block, terms: tuple[Outer, ...]) -> bool:
    """Whether turning the factors costs less than turning the formed matrices."""
    _, o, i = block.shape
    if any(term.indexed for term in terms):
        return False
    return sum(term.positions for term in terms) * (o * o + i * i) < o * i * (o + i)
