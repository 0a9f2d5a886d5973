"""What a run will cost: its stages, each in passes, seconds and bytes."""

import math
from dataclasses import dataclass
from typing import final

from upweight.tables import Table

__all__ = ["Plan", "Stage"]

GIB = 2**30


@final
@dataclass(frozen=True)
class Stage:
    """One part of a run; NaN stands for what is not known before it runs.

    Attributes:
        name: what is done.
        passes: forward and backward passes over the training data that it amounts to.
        seconds: estimated wall time.
        bytes: estimated peak memory on top of model and data.
        disk: bytes that are written if its results are stored.
    """

    name: str
    passes: float
    seconds: float
    bytes: float
    disk: float = 0.0

    @property
    def known(self) -> bool:
        """Whether its cost is."""
        return math.isfinite(self.seconds)


@final
@dataclass(frozen=True)
class Plan:
    """Estimated cost of explaining some queries.

    Attributes:
        stages: in order.
        coverage: share of the model's parameters that the scores see.
        floor: seconds of one forward and backward pass over the training data.
        notes: what may yet stop the run.
    """

    stages: tuple[Stage, ...]
    coverage: float
    floor: float
    notes: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether the cost of every stage is."""
        return all(stage.known for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Estimated wall time of all stages that are known."""
        return sum(stage.seconds for stage in self.stages if stage.known)

    @property
    def passes(self) -> float:
        """The same in forward and backward passes over the training data."""
        return self.seconds / max(self.floor, 1e-9)

    @property
    def bytes(self) -> float:
        """Estimated peak memory on top of model and data, of all stages that are known."""
        return max(stage.bytes for stage in self.stages if stage.known)

    def table(self) -> Table:
        """One row per stage."""
        columns = {
            "stage": [s.name for s in self.stages],
            "passes": [_cell(s.passes, 1) for s in self.stages],
            "seconds": [_cell(s.seconds, 2) for s in self.stages],
            "memory_gib": [_cell(s.bytes / GIB, 2) for s in self.stages],
            "disk_gib": [_cell(s.disk / GIB, 2) for s in self.stages],
        }
        says = (
            f"{'About' if self.known else 'At least'} {self.seconds:.1f} s ({self.passes:.0f} x "
            f"one forward and backward pass), {self.bytes / GIB:.2f} GiB at the peak; "
            f"{self.coverage:.1%} of parameters covered. Disk: if results are stored."
        )
        return Table(columns, "\n".join((says, *(f"Note: {note}" for note in self.notes))))

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _cell(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "unknown"
