"""The passes over (a sample of) the data that a Kronecker-factored fit makes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.budget import budget, in_steps
from upweight.checks import refuse_flat
from upweight.curvature.moments import LARGEST_SIDE, Moments, Whole
from upweight.curvature.slopes import Labels, Slopes
from upweight.data import Batch
from upweight.errors import InputError
from upweight.gradients import Layout, Observation, observe, risk_layout
from upweight.linalg import Block, BlockGradients, Eigenblock, KroneckerEigen
from upweight.risk import Risk

__all__ = ["Fitting", "Rows", "fit_batch", "fitted_rows", "fittings", "represented"]

LEAST_ROWS, POSITIONS_PER_SIDE, MARGIN = 128, 16, 8
BATCH_BYTES, LARGE_BATCH = 64 * 2**20, 4096

Rows = int | Literal["auto"] | None
# Gradients of a batch for every slope with their shares, and the number of the batch.
Looked = tuple[list[tuple[BlockGradients, Tensor]], int]


@final
class Fitting:
    """The pass over (a sample of) the data that a fit of some blocks makes, once or twice.

    Gradients are kept from one pass to the next while they fit into a sixteenth of the memory
    budget.

    Args:
        risk: objective and all of its data.
        slopes: that make the gradients.
        sides: of the blocks, by their places; the backward pass goes no further than to them.
        sample: positions of the examples, or None for all.
        exact: blocks of at most so many parameters have a matrix of their own.
    """

    def __init__(
        self,
        risk: Risk,
        slopes: Slopes,
        sides: "Mapping[int, Side]",
        *,
        sample: Tensor | None = None,
        exact: int = 0,
    ) -> None:
        self.whole, self.slopes, self.sides = risk, slopes, sides
        self.places = tuple(sides)
        self.layout: Layout = risk_layout(risk)
        self.sampled = None if sample is None else len(sample)
        self.risk = risk if sample is None else Risk(risk.objective, risk.data.take(sample))
        self.size = fit_batch(risk, len(self.risk.data))
        self.exact = exact
        self._kept: list[Looked] = []

    def kept(self) -> int:
        """Bytes of the gradients that are kept for a second pass, as far as they are."""
        first, _ = self.risk.rows(0, 1)
        one = Observation(self.risk.objective, self.layout, first, self.places).gradients()
        return min(one.bytes() * len(self.risk.data), _room())

    def shortened(self, share: float) -> "Fitting":
        """The same over the first part of the examples alone."""
        rows = max(1, round(share * len(self.risk.data)))
        if rows < len(self.risk.data):
            data = self.risk.data.take(torch.arange(rows, device="cpu"))
            self.risk = Risk(self.risk.objective, data)
        return self

    def batches(self, label: str, *, keep: bool) -> Iterator[Looked]:
        """Every batch, its shares with each slope's weight.

        Args:
            label: of the progress bar.
            keep: whether another pass will follow.
        """
        yield from self._kept
        done = sum(len(slopes[0][1]) for slopes, _ in self._kept)
        left, room = len(self.risk.data) - done, _room()
        steps = in_steps(
            left, self.size, lambda a, b: self._slopes(*self.risk.rows(done + a, done + b))
        )
        if not left:
            return
        steps = track(steps, label, -(-left // self.size))
        for number, slopes in enumerate(steps, len(self._kept)):
            yield slopes, number
            room -= sum(gradients.bytes() for gradients, _ in slopes)
            # The first ones that fit; the others are made again.
            if keep and room >= 0:
                self._kept.append((slopes, number))

    def _slopes(self, batch: Batch, share: Tensor) -> list[tuple[BlockGradients, Tensor]]:
        """Gradients for every slope, with shares times its weight."""
        seen = Observation(self.risk.objective, self.layout, batch, self.places)
        return [(found, share * weight) for found, weight in self.slopes.gradients(seen)]

    def none(self, kind: type[Moments]) -> dict[int, Moments]:
        """Moments of the blocks before anything was added."""
        like, found = self.risk.objective.l2, {}
        for place, side in self.sides.items():
            block = self.layout.blocks[place]
            own = Whole if _flat(block, self.exact) else kind
            found[place] = own(block, like, indexed=side.indexed)
        return found

    def moments(self, kind: type[Moments], *, keep: bool = False) -> dict[int, Moments]:
        """The moments of the blocks."""
        found = self.none(kind)
        for slopes, _ in self.batches("moments", keep=keep):
            for place, part in found.items():
                part.add([(gradients.terms[place], share) for gradients, share in slopes])
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
        return {place: self.undetermined(basis.blocks[place]) for place in self.places}

    def notes(self, error: float | None = None) -> tuple[str, ...]:
        """That a sample was fitted on, and how well it determines the eigenvalues."""
        if self.sampled is None:
            return ()
        size = "unknown" if error == float("inf") else f"{error or 0:.0%}"
        known = "" if error is None else f" (standard error of its eigenvalues {size})"
        count, blocks = len(self.places), len(self.layout.blocks)
        which = "" if count == blocks else f" of {count} of {blocks} blocks"
        return (
            f"curvature{which} fitted on {self.sampled:,} of {len(self.whole.data):,} "
            f"examples{known}",
        )


def fittings(risk: Risk, slopes: Slopes, *, rows: Rows, seed: int, exact: int = 0) -> list[Fitting]:
    """One pass over the data for all blocks; or two, where some need far fewer examples.

    A convolution early in a network has many positions an example, and a part of the examples
    determines its moments amply; the wide layer behind it has one, and needs them all.
    """
    if not isinstance(slopes, Labels):
        refuse_flat(risk.objective, risk.data)
    count, sides = len(risk.data), sides_of(risk)
    fitted = _rows_for(sides, rows, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    blocks = risk_layout(risk).blocks
    few = {
        place: side
        for place, side in enumerate(sides)
        if rows == "auto"
        and side.positions > 1
        and 2 * side.ample <= fitted
        and not _flat(blocks[place], exact)
    }
    if len(few) == len(blocks):
        few = {}
    many = {place: side for place, side in enumerate(sides) if place not in few}
    most = max((side.ample for side in few.values()), default=0)
    return [
        Fitting(
            risk,
            slopes,
            some,
            sample=None if size >= count else order[:size].sort().values,
            exact=exact,
        )
        for some, size in ((few, most), (many, fitted))
        if some
    ]


def represented(
    risk: Risk, blocks: Mapping[int, Eigenblock], notes: tuple[str, ...], mass: float
) -> KroneckerEigen:
    """The operator, with the L2 of each block on its eigenvalues."""
    objective = risk.objective
    added = [
        replace(
            part,
            values=(part.values + float(objective.l2[part.block.weight])).to(objective.l2),
        )
        for _, part in sorted(blocks.items())
    ]
    return KroneckerEigen(added, objective.space.size, notes, mass=mass)


def _flat(block: Block, exact: int) -> bool:
    """Whether a block is small enough for a matrix of its own; vectors have one anyhow."""
    return block.size <= exact and min(block.outputs, block.inputs) > 1


def fitted_rows(risk: Risk, rows: Rows) -> int:
    """Examples that a fit takes: all for None, as many as the moments need for "auto".

    Raises:
        InputError: fewer than one.
    """
    return _rows_for(sides_of(risk) if rows == "auto" else [], rows, len(risk.data))


def _rows_for(sides: Sequence["Side"], rows: Rows, count: int) -> int:
    """The same for known sides."""
    if rows is None:
        return count
    wanted = max(side.needed for side in sides) if rows == "auto" else rows
    if wanted < 1:
        raise InputError(f"A curvature is fitted on at least 1 example, got rows={rows}.")
    return min(wanted, count)


def _room() -> int:
    """Bytes of gradients that are kept from the first pass to the second."""
    return budget() // 16


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

    @property
    def ample(self) -> int:
        """Examples beyond which more of them add little."""
        return MARGIN * self.needed


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
