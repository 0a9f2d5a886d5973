"""When an iterative solve ends before its tolerance is met: rules asked after every step."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from upweight.errors import InputError
from upweight.linalg.operator import Operator

__all__ = ["Budget", "Progress", "Rule"]


@final
@dataclass(frozen=True)
class Progress:
    """How far the solve of some rows is.

    Attributes:
        steps: products so far.
        rows: the answers so far, ``[m, p]``.
        residual: their relative residuals, ``[m]``.
        seconds: since the solve of all rows began.
        pace: seconds of the last step.
        share: of all rows that will be solved when these are.
    """

    steps: int
    rows: Tensor
    residual: Tensor
    seconds: float
    pace: float
    share: float


class Rule(ABC):
    """A reason to end a solve that a user named: what is there by then is the answer.

    It is then no failure that a row misses its tolerance; the scores say why it ended, and every
    row's residual.
    """

    @abstractmethod
    def begin(self, operator: Operator) -> Callable[[Progress], bool]:
        """For rows that are solved together: whether to end, asked after every step."""


@final
@dataclass(frozen=True)
class Budget(Rule):
    """End after so many products or seconds, whichever is first, and answer with what is there.

    Seconds are those of all queries, the preconditioner included, and no step is begun that would
    last longer than is left; the first is always made.

    Args:
        steps: products at most.
        seconds: of wall time.

    Raises:
        InputError: neither is given, or one is not positive.

    Example:
        >>> import torch
        >>> from upweight.linalg import Dense
        >>> from upweight.solvers import CG
        >>> matrix = Dense(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        >>> solution = CG(stop=(Budget(steps=1),)).init(matrix).solve(torch.ones(1, 3))
        >>> solution.status[0], round(float(solution.residual[0]), 4)
        (<Status.ENDED: 'ended as asked'>, 0.5345)
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [limit for limit in (self.steps, self.seconds) if limit is not None]
        if not given or not all(limit > 0 for limit in given):
            raise InputError(
                f"A budget is a positive number of steps or seconds, got steps={self.steps!r}, "
                f"seconds={self.seconds!r}."
            )

    def begin(self, operator: Operator) -> Callable[[Progress], bool]:
        """Spent when the next step does not fit."""
        del operator
        return self._spent

    def _spent(self, now: Progress) -> bool:
        late = self.seconds is not None and now.seconds + now.pace > self.seconds * now.share
        return late or (self.steps is not None and now.steps >= self.steps)
