"""The passes over (a sample of) the data that a Kronecker-factored fit makes."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.budget import budget, in_steps
from upweight.curvature.moments import LARGEST_SIDE, Moments, Whole
from upweight.curvature.slopes import Slopes
from upweight.data import Batch
from upweight.errors import InputError
from upweight.gradients import Layout, Observation, observe, risk_layout
from upweight.linalg import Block, BlockGradients, Eigenblock, KroneckerEigen
from upweight.risk import Risk

__all__ = ["Fitting", "Rows", "fit_batch", "fitted_rows"]

LEAST_ROWS, POSITIONS_PER_SIDE, MARGIN = 128, 16, 4
BATCH_BYTES, LARGE_BATCH = 64 * 2**20, 4096

Rows = int | Literal["auto"] | None
Looked = tuple[BlockGradients, Tensor, int]


@final
class Fitting:
    """The pass over (a sample of) the data that a fit makes, once or twice.

    Gradients are kept from one pass to the next while they fit into a quarter of the memory budget.
    """

    def __init__(
        self, risk: Risk, slopes: Slopes, *, rows: Rows, seed: int, exact: int = 0
    ) -> None:
        count = len(risk.data)
        self.layout: Layout = risk_layout(risk)
        fitted = fitted_rows(risk, rows)
        self.sampled = fitted if fitted < count else None
        self.size = fit_batch(risk, fitted)
        # Where one block needs many examples, others with many positions do not need them all.
        sides = sides_of(risk)
        self.indexed = [side.indexed for side in sides]
        automatic = rows == "auto"
        self.exact = [_flat(block, exact) for block in self.layout.blocks]
        self.every = [
            side.every(fitted) if automatic and not flat else 1
            for side, flat in zip(sides, self.exact, strict=True)
        ]
        self.whole, self.slopes = risk, slopes
        if self.sampled is not None:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(count, generator=generator)[: self.sampled].sort().values
            risk = Risk(risk.objective, risk.data.take(chosen))
        self.risk = risk
        self._kept: list[Looked] | None = None

    def kept(self) -> int:
        """Bytes of the gradients that are kept for a second pass, as far as they are."""
        one = observe(self.risk.objective, self.risk.rows(0, 1)[0]).gradients()
        row = one.without([k for k, every in enumerate(self.every) if every > 1]).bytes()
        return min(row * len(self.risk.data), _room())

    def shortened(self, rows: int) -> "Fitting":
        """The same over the first examples alone."""
        if rows < len(self.risk.data):
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
        steps = in_steps(count, self.size, lambda a, b: self._slopes(*self.risk.rows(a, b)))
        for number, slopes in enumerate(track(steps, label, -(-count // self.size))):
            for gradients, share in slopes:
                yield gradients, share, number
                rest = gradients.without(drop)
                room -= rest.bytes()
                if kept is not None and room >= 0:
                    kept.append((rest, share, number))
                else:
                    kept = None
        self._kept = kept

    def _slopes(self, batch: Batch, share: Tensor) -> list[tuple[BlockGradients, Tensor]]:
        """Gradients for every slope, with shares times its weight."""
        seen = Observation(self.risk.objective, self.layout, batch)
        return [(found, share * weight) for found, weight in self.slopes.gradients(seen)]

    def none(self, kind: type[Moments], places: Collection[int]) -> dict[int, Moments]:
        """Moments of some blocks before anything was added."""
        like = self.risk.objective.l2
        found: dict[int, Moments] = {}
        for place in places:
            block, own = self.layout.blocks[place], Whole if self.exact[place] else kind
            found[place] = own(block, like, indexed=self.indexed[place])
        return found

    def undetermined(self, basis: Eigenblock) -> Eigenblock:
        """A block in a basis, with zeros for Λ of both halves of the data."""
        dtype = torch.promote_types(self.risk.objective.space.dtype, torch.float32)
        values = basis.values.new_zeros(2, *basis.values.shape, dtype=dtype)
        return replace(basis, values=values)

    def based(self, basis: KroneckerEigen) -> dict[int, Eigenblock]:
        """The blocks of an earlier fit, to be determined again.

        Raises:
            InputError: they are of other parameters.
        """
        if tuple(part.block for part in basis.blocks) != self.layout.blocks:
            raise InputError(
                "The basis is of other parameters than this objective's. Fit it on the same model."
            )
        return {place: self.undetermined(part) for place, part in enumerate(basis.blocks)}

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
            replace(
                part,
                values=(part.values + float(objective.l2[part.block.weight])).to(objective.l2),
            )
            for part in blocks
        ]
        return KroneckerEigen(added, objective.space.size, notes, mass=self.risk.total)


def _flat(block: Block, exact: int) -> bool:
    """Whether a block is small enough for a matrix of its own; vectors have one anyhow."""
    return block.size <= exact and min(block.outputs, block.inputs) > 1


def fitted_rows(risk: Risk, rows: Rows) -> int:
    """Examples that a fit takes: all for None, as many as the moments need for "auto".

    Raises:
        InputError: fewer than one.
    """
    count = len(risk.data)
    if rows is None:
        return count
    wanted = max(side.needed for side in sides_of(risk)) if rows == "auto" else rows
    if wanted < 1:
        raise InputError(f"A curvature is fitted on at least 1 example, got rows={rows}.")
    return min(wanted, count)


def _room() -> int:
    """Bytes of gradients that are kept from the first pass to the second."""
    return budget() // 4


def fit_batch(risk: Risk, fitted: int) -> int:
    """Examples looked at together: they stay in the cache, and a sample has halves to compare."""
    row = max(risk_layout(risk).row_bytes, 1)
    most = LARGE_BATCH if fitted == len(risk.data) else -(-fitted // 8)
    return max(1, min(most, min(BATCH_BYTES, budget() // 4) // row))


@final
@dataclass(frozen=True)
class Side:
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


def sides_of(risk: Risk) -> list[Side]:
    """Of every block, from one example."""
    gradients = observe(risk.objective, risk.at(torch.tensor([0], device="cpu"))[0]).gradients()
    found = []
    for block, terms in zip(gradients.blocks, gradients.terms, strict=True):
        indexed = any(term.indexed for term in terms)
        side = min(block.inputs if indexed else max(block.outputs, block.inputs), LARGEST_SIDE)
        # Vectors (scales, shifts) are few, and summed over positions before they are counted.
        largest = side if block.outputs > 1 else 0
        found.append(Side(largest, sum(term.positions for term in terms), indexed))
    return found
