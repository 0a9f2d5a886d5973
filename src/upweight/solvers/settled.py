"""Ending a solve when the ranking of the training examples has settled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.errors import InputError
from upweight.gradients import per_example
from upweight.linalg import Operator, unshifted
from upweight.risk import OfRisk
from upweight.solvers.stopping import Progress, Rule

__all__ = ["Settled"]


@final
@dataclass(frozen=True)
class Settled(Rule):
    """End when a step no longer changes the order in which training examples are ranked.

    After every step each query's products with the gradients of a seeded sample of the training
    examples are ranked, and compared with the step before by Spearman's correlation. It ends when
    that is at least ``rank`` for every query, ``steps`` times in a row. What has settled in two
    neighbouring steps may still move over many: the residual in the result says how far it was.

    Args:
        rank: Spearman's correlation from which an order is the same.
        steps: in a row.
        examples: of the sample.
        seed: of the sample.

    Raises:
        InputError: rank is not within (0, 1], or a count is not positive; later, the operator is
            no curvature of training data.

    Example:
        >>> from torch import nn
        >>> from upweight import CG, Data, Influence, Method
        >>> rows = torch.randn(30, 5), torch.arange(30) % 3
        >>> rough = Method("rough", "", "ggn", CG(stop=(Settled(rank=0.9, steps=1),)))
        >>> inf = Influence(nn.Linear(5, 3), rows, loss="cross_entropy", l2=0.1, method=rough)
        >>> inf.explain(rows).shape
        (30, 30)
    """

    rank: float = 0.999
    steps: int = 2
    examples: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rank <= 1 or self.steps < 1 or self.examples < 2:
            raise InputError(
                "Ranks settle at a correlation within (0, 1], over at least one step and two "
                f"examples, got rank={self.rank!r}, steps={self.steps!r}, "
                f"examples={self.examples!r}."
            )

    def begin(self, operator: Operator) -> Callable[[Progress], bool]:
        """Draw the sample."""
        base, _ = unshifted(operator)
        if not isinstance(base, OfRisk):
            raise InputError(
                f"Ranks of training examples need a curvature of training data, and "
                f"{type(base).__name__} is none. Use Budget(steps=...) with it."
            )
        risk, generator = base.risk, torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(risk.data), generator=generator)[: self.examples]
        batch, share = risk.at(order.sort().values)
        gradients = per_example(risk.objective, batch)
        before: Tensor | None = None
        count = 0

        def settled(now: Progress) -> bool:
            nonlocal before, count
            ranks = _ranks(gradients.dot(now.rows) * share)
            same = before is not None and float(_correlation(before, ranks).min()) >= self.rank
            before, count = ranks, count + 1 if same else 0
            return count >= self.steps

        return settled


def _ranks(values: Tensor) -> Tensor:
    """Places ``[q, n]`` of every row's values, centred."""
    places = values.argsort(dim=1, stable=True).argsort(dim=1).double()
    centred: Tensor = places - places.mean(1, keepdim=True)
    return centred


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Of centred ranks, row by row ``[q]``: their sum of squares is the same for all."""
    return (one * other).sum(1) / other.square().sum(1)
