"""Gradients of all training examples, a batch at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.budget import budget, in_steps
from upweight.data import Batch
from upweight.gradients.capture import Layout, layout_of
from upweight.gradients.linear import linear_form
from upweight.gradients.provide import per_example
from upweight.keepers import Keeper, MemoryKeeper
from upweight.linalg.blocks import BlockGradients
from upweight.linalg.values import Gradients
from upweight.risk import Risk

__all__ = ["Compression", "Seen", "TrainingGradients", "batch_rows", "risk_layout"]

Result = TypeVar("Result")
LARGE_BATCH = 4096
# Small batches stay in the cache; below FEW rows the products with queries are slow instead.
BATCH_BYTES, FEW = 64 * 2**20, 32


def risk_layout(risk: Risk) -> Layout:
    """The layout of a risk's objective, proved on its first examples."""
    return layout_of(
        risk.objective, risk.at(torch.arange(min(16, len(risk.data)), device="cpu"))[0]
    )


def batch_rows(risk: Risk) -> int:
    """Training examples looked at together: what the user's loader says, or as memory allows."""
    if risk.data.batch_size is not None:
        return risk.data.batch_size
    form = linear_form(risk.objective, risk.at(torch.tensor([0], device="cpu"))[0])
    if form is not None:
        return form.together(LARGE_BATCH)
    row = max(risk_layout(risk).row_bytes, 1)
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


class Compression(ABC):
    """What is kept of training gradients in their place, and what is looked at instead of them."""

    @abstractmethod
    def compress(self, gradients: Gradients) -> BlockGradients:
        """What is kept."""

    @abstractmethod
    def restore(self, kept: BlockGradients) -> Gradients:
        """Gradients in the same parameters, of what was kept."""


@final
class TrainingGradients:
    """Gradients of the training examples in order, made once if they can be kept.

    Args:
        risk: objective and training data.
        keeper: where they stay; in memory by default, if they fit.
        compression: what stays of them; all by default.

    Example:
        >>> from torch import nn
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.eye(3), torch.tensor([0, 1, 1])))
        >>> training = TrainingGradients(Risk(Objective(nn.Linear(3, 2), "cross_entropy"), data))
        >>> next(training.each(lambda seen: seen.gradients.dense().shape, "shapes"))
        torch.Size([3, 8])
    """

    def __init__(
        self, risk: Risk, keeper: Keeper | None = None, compression: Compression | None = None
    ) -> None:
        self.risk, self.compression = risk, compression
        self.keeper = MemoryKeeper(len(risk.data)) if keeper is None else keeper

    def each(
        self, work: Callable[[Seen], Result], label: str, *, first: int = 0
    ) -> Iterator[Result]:
        """Results of some work on every batch, which is asked again for less if memory runs out.

        Args:
            work: changes nothing but what it returns.
            label: of the progress bar.
            first: place of the first example.
        """
        count, size = len(self.risk.data) - first, batch_rows(self.risk)

        def step(start: int, stop: int) -> Result:
            return work(self._seen(first + start, first + stop))

        yield from track(in_steps(count, size, step), label, -(-count // size))

    def _seen(self, start: int, stop: int) -> Seen:
        kept = self.keeper.get(start, stop)
        if kept is not None:
            share = self.risk.share(torch.arange(start, stop))
            return Seen(self._restored(kept), share, start, self.risk)
        batch, share = self.risk.rows(start, stop)
        found = per_example(self.risk.objective, batch)
        kept = found if self.compression is None else self.compression.compress(found)
        self.keeper.put(start, stop, kept)
        return Seen(self._restored(kept), share, start, self.risk)

    def _restored(self, kept: Gradients) -> Gradients:
        if self.compression is None:
            return kept
        assert isinstance(kept, BlockGradients)
        return self.compression.restore(kept)
