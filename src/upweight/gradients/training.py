"""Gradients of all training examples, a batch at a time, and kept where memory allows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.budget import budget, in_steps
from upweight.data import Batch
from upweight.gradients.capture import layout_of
from upweight.gradients.linear import linear_form
from upweight.gradients.provide import per_example
from upweight.linalg import BlockGradients
from upweight.linalg.values import Gradients
from upweight.risk import Risk

__all__ = ["Seen", "TrainingGradients", "batch_rows"]

Result = TypeVar("Result")
LARGE_BATCH = 4096
# Small batches stay in the cache; below FEW rows the products with queries are slow instead.
BATCH_BYTES, FEW = 64 * 2**20, 64


def batch_rows(risk: Risk) -> int:
    """Training examples looked at together: what the user's loader says, or as memory allows."""
    if risk.data.batch_size is not None:
        return risk.data.batch_size
    batch, _ = risk.at(torch.arange(min(16, len(risk.data)), device="cpu"))
    if linear_form(risk.objective, batch) is not None:
        return LARGE_BATCH
    row = max(layout_of(risk.objective, batch).row_bytes, 1)
    most = budget() // 4 // row
    return max(1, min(LARGE_BATCH, most, max(BATCH_BYTES // row, min(FEW, most))))


@final
@dataclass(frozen=True)
class Seen:
    """Some training examples with their gradients.

    Attributes:
        gradients: of the loss, without L2.
        share: w_i / Σ w, ``[b]``.
        start: the first one's place in the data.
        risk: what they are examples of.
    """

    gradients: Gradients
    share: Tensor
    start: int
    risk: Risk

    def batch(self) -> Batch:
        """The examples themselves, fetched again."""
        return self.risk.rows(self.start, self.start + len(self.share))[0]


@final
class TrainingGradients:
    """Gradients of the training examples in order.

    Those of networks are kept from the first pass on if all of them fit into a quarter of the
    memory budget; then no further pass is made.

    Args:
        risk: objective and training data.

    Example:
        >>> from torch import nn
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.eye(3), torch.tensor([0, 1, 1])))
        >>> training = TrainingGradients(Risk(Objective(nn.Linear(3, 2), "cross_entropy"), data))
        >>> next(training.each(lambda seen: seen.gradients.dense().shape, "shapes"))
        torch.Size([3, 8])
    """

    def __init__(self, risk: Risk) -> None:
        self.risk = risk
        self._kept: dict[tuple[int, int], Seen] = {}
        self._keeps: bool | None = None

    def each(
        self,
        work: Callable[[Seen], Result],
        label: str,
        *,
        first: int = 0,
        most: int | None = None,
    ) -> Iterator[Result]:
        """Results of some work on every batch, which is asked again for less if memory runs out.

        Args:
            work: changes nothing but what it returns.
            label: of the progress bar.
            first: place of the first example.
            most: examples at a time, at most.
        """
        count, size = len(self.risk.data) - first, batch_rows(self.risk)
        size = size if most is None else max(1, min(size, most))

        def step(start: int, stop: int) -> Result:
            return work(self._seen(first + start, first + stop))

        yield from track(in_steps(count, size, step), label, -(-count // size))

    def _seen(self, start: int, stop: int) -> Seen:
        if (start, stop) in self._kept:
            return self._kept[start, stop]
        batch, share = self.risk.rows(start, stop)
        seen = Seen(per_example(self.risk.objective, batch), share, start, self.risk)
        if self._keeps is None:
            self._keeps = self._fit(seen)
        if self._keeps:
            self._kept[start, stop] = seen
        return seen

    def _fit(self, seen: Seen) -> bool:
        """Whether gradients like these of all examples fit into a quarter of the budget."""
        if not isinstance(seen.gradients, BlockGradients):
            return False
        row = seen.gradients.bytes() / len(seen.share)
        return row * len(self.risk.data) <= budget() // 4
