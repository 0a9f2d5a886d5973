"""What a solve takes, said by the solver before anything runs: for plans."""

from dataclasses import dataclass
from typing import final

__all__ = ["Cost", "Load"]


@final
@dataclass(frozen=True)
class Load:
    """What is to be solved.

    Attributes:
        size: parameters, p.
        rows: right-hand sides, m.
        examples: that the curvature is a mean over, N.
        item: bytes of a number.
    """

    size: int
    rows: int
    examples: int
    item: int = 4

    @property
    def bytes(self) -> float:
        """Of all rows ``[m, p]``."""
        return float(self.rows) * self.size * self.item


@final
@dataclass(frozen=True)
class Cost:
    """What making an inverse and solving with it takes, in units that a plan can time.

    All of it 0 says that the data are not needed again: the time is then that of the solver itself
    on a curvature of a few examples.

    Attributes:
        products: of all rows with the curvature, a usual number where it depends on the curvature.
        single: products of one row, whatever the number of rows.
        steps: of a random series, each a product of all rows with a few examples' part of it.
        drawn: examples of a step.
        passes: over the data, forward and back, beside those of the products.
        matrix: whether the curvature is made a matrix ``[p, p]`` in float64.
        operations: multiply-adds of the solver's own.
        bytes: held at a time, beside what a product takes.
        without: in words, what it takes besides and cannot say.

    Example:
        >>> from upweight.linalg import Cholesky
        >>> Cholesky().cost(Load(size=1000, rows=10, examples=500)).bytes
        16000000.0
    """

    products: float = 0.0
    single: float = 0.0
    steps: float = 0.0
    drawn: int = 0
    passes: float = 0.0
    matrix: bool = False
    operations: float = 0.0
    bytes: float = 0.0
    without: str = ""
