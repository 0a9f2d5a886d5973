"""Training many copies of one model at once, each without its own examples."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.errors import InputError
from upweight.gradients import stacked_gradient
from upweight.risk import Risk

__all__ = ["Adam", "Copies", "kept_shares", "train_copies"]


@final
@dataclass(frozen=True)
class Copies:
    """Models of one form, and where Adam stands in each.

    Attributes:
        rows: parameters, ``[m, p]``.
        first: running means of the gradient, ``[m, p]``.
        second: running means of its square, ``[m, p]``.
        steps: taken so far.
    """

    rows: Tensor
    first: Tensor
    second: Tensor
    steps: int

    @classmethod
    def fresh(cls, row: Tensor) -> "Copies":
        """One copy ``[p]`` that was not trained yet.

        Example:
            >>> Copies.fresh(torch.ones(3)).repeat(2).rows.shape
            torch.Size([2, 3])
        """
        return cls(row[None].clone(), torch.zeros_like(row)[None], torch.zeros_like(row)[None], 0)

    def double(self) -> "Copies":
        """The same in float64.

        Removing one example moves a parameter by less than float32 resolves. Kept in float64,
        copies add up such steps, while gradients may still be those of a float32 model.
        """
        rows, first, second = (t.double() for t in (self.rows, self.first, self.second))
        return Copies(rows, first, second, self.steps)

    def repeat(self, count: int) -> "Copies":
        """One copy as many."""
        rows, first, second = (t.repeat(count, 1) for t in (self.rows, self.first, self.second))
        return Copies(rows, first, second, self.steps)


@final
@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba, 2015) without weight decay, as in torch.

    Attributes:
        betas: decay of the two running means.
        eps: added to the root of the second.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def step(self, copies: Copies, slopes: Tensor, lr: float) -> Copies:
        """All copies after one step along their gradients ``[m, p]``."""
        (one, two), count = self.betas, copies.steps + 1
        first = copies.first.lerp(slopes, 1 - one)
        second = (copies.second * two).addcmul_(slopes, slopes, value=1 - two)
        spread = second.sqrt().div_((1 - two**count) ** 0.5).add_(self.eps)
        rows = copies.rows.addcdiv(first, spread, value=-lr / (1 - one**count))
        return Copies(rows, first, second, count)


def kept_shares(risk: Risk, positions: Tensor, removals: Sequence[Tensor]) -> Tensor:
    """Share ``[m, n]`` of each row of a minibatch in its mean, 0 for what a copy leaves out.

    "mean": the rest is averaged anew. "sum": the rest keeps its share.
    """
    weights = risk.weights[positions]
    kept = torch.stack([~torch.isin(positions, gone) for gone in removals]) * weights
    total = kept.sum(1, keepdim=True) if risk.objective.removal == "mean" else weights.sum()
    space = risk.objective.space
    smallest = torch.finfo(kept.dtype).tiny
    return (kept / torch.clamp(total, min=smallest)).to(space.device, space.dtype)


def train_copies(
    risk: Risk,
    start: Copies,
    removals: Sequence[Tensor],
    *,
    plan: Iterable[tuple[Tensor, float]],
    adam: Adam | None = None,
) -> Copies:
    """Train copies on with Adam, each without its own examples, all on the same minibatches.

    Common minibatches are common random numbers: what the noise of training does to all copies
    alike cancels from their differences. Training may be cut anywhere: going on from the copies
    that come back is the same as never having stopped.

    Args:
        risk: objective and training data. The loss of a minibatch is the mean over those of its
            examples that a copy keeps, plus L2.
        start: where the copies and Adam stand.
        removals: positions each copy leaves out; one tensor per copy, which may be empty.
        plan: positions ``[b]`` of every minibatch, and its learning rate.
        adam: settings of Adam.

    Raises:
        InputError: as many removals as copies are needed.
    """
    if len(removals) != len(start.rows):
        raise InputError(f"{len(removals)} removals for {len(start.rows)} copies. Pass one each.")
    rule, copies, objective = adam or Adam(), start, risk.objective
    for positions, lr in plan:
        batch, _ = risk.at(positions)
        shares = kept_shares(risk, positions, removals)
        rows = copies.rows.to(objective.space.dtype)
        slopes = stacked_gradient(objective, batch, rows, shares)
        copies = rule.step(copies, slopes.to(copies.rows) + copies.rows * objective.l2, lr)
    return copies
