"""Removing whole groups: to first order, and by a Newton step on the data that remains.

A group holds the share s of the training mean. Its removal leaves the objective

    R_rest = R − Σ_group share_i ℓ̃(z_i),   divided by 1 − s when removal is "mean",

whose minimiser the division does not move. With g = Σ_group share_i ∇ℓ̃(z_i) and ∇R(θ̂) = 0 the
Newton step from θ̂ is

    Δθ = (H − H_group + λ)⁻¹ g                 H_group = Σ_group share_i ∇²ℓ̃(z_i)

and first order is H in place of H − H_group, the sum of the scores. So no factor n/(n − k) belongs
to first order: it is part of what the curvature loses. The step is exact for a quadratic
objective, and the measure is evaluated at θ̂ + Δθ, not linearised. What is left is the change of the
curvature along the step. Setting: Koh, Ang, Teo & Liang (2019), "On the Accuracy of Influence
Functions for Measuring Group Effects".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from upweight.answers import GroupEffects
from upweight.bars import track
from upweight.data import Data
from upweight.engine import query_batches, query_products
from upweight.errors import DataError
from upweight.gradients import per_example, stacked_measure
from upweight.linalg import Inverse
from upweight.meaning import meaning_of, removal_gradient_row
from upweight.newton import kept_share
from upweight.objective import Measure
from upweight.risk import Risk

__all__ = ["Groups", "Step", "effects", "refitted", "second_order"]

BATCH_ROWS = 4096
Newton = Callable[[Risk, float], Inverse]
# (risk, positions of a group, what it pulls with [p]) -> where the minimum moves without it, [p].
Step = Callable[[Risk, Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True)
class Groups:
    """Named groups of training examples, which may overlap.

    Attributes:
        names: ``[m]``.
        positions: of each group's examples in the data.
    """

    names: np.ndarray
    positions: tuple[Tensor, ...]

    @classmethod
    def of(cls, data: Data, groups: Any) -> "Groups":
        """Groups from a mapping of names to ids, or a sequence of lists of ids.

        Raises:
            DataError: no group, an empty one, all of the data, an id unknown or named twice.

        Example:
            >>> data = Data.of((np.eye(3), np.arange(3)), ids=["a", "b", "c"])
            >>> Groups.of(data, {"first two": ["a", "b"]}).positions
            (tensor([0, 1]),)
        """
        named = dict(groups) if isinstance(groups, Mapping) else dict(enumerate(groups))
        if not named:
            raise DataError("There is no group. Pass a list of lists of ids, or a dict of them.")
        found = tuple(_positions(data, name, ids) for name, ids in named.items())
        return cls(np.asarray(list(named)), found)


def _positions(data: Data, name: Any, ids: Any) -> Tensor:
    if not isinstance(ids, (Sequence, np.ndarray)) or isinstance(ids, str):
        raise DataError(
            f"Group {name!r} is {ids!r}, not a list of ids. One group is [[17, 42]]: a list in a "
            "list."
        )
    places = data.positions(np.asarray(ids))
    if not 0 < len(places) < len(data):
        raise DataError(
            f"Group {name!r} has {len(places)} of {len(data)} examples. Removing needs at least "
            "one, and one that stays."
        )
    if len(places.unique()) < len(places):
        raise DataError(f"Group {name!r} names an example twice. Name each once.")
    return places


def _slope(risk: Risk, gone: Tensor) -> Tensor:
    """Σ share_i ∇ℓ̃(z_i) over a group, ``[p]``."""
    total = removal_gradient_row(risk.objective) * float(risk.weights[gone].sum() / risk.total)
    for part in gone.split(BATCH_ROWS):
        batch, share = risk.at(part)
        total = total + per_example(risk.objective, batch).combine(share[None])[0]
    return total


def refitted(newton: Newton) -> Step:
    """Steps from a curvature that is fitted anew to the examples that remain.

    The curvature is that of their own mean, 1/(1 − s) of what is left of H: L2 (and damping) that
    keeps its size against the sum of the losses grows by the same factor, and so does the slope.

    Args:
        newton: (risk of the rest, factor on the damping) -> its inverse curvature.
    """

    def step(risk: Risk, gone: Tensor, slope: Tensor) -> Tensor:
        kept = torch.ones(len(risk.data), dtype=torch.bool, device="cpu")
        kept[gone] = False
        share = kept_share(risk, gone)
        growth = 1.0 if risk.objective.removal == "mean" else 1 / share
        data = risk.data.take(kept.nonzero()[:, 0])
        rest = Risk(risk.objective.with_l2(risk.objective.l2 * growth), data)
        return newton(rest, growth).apply(slope[None] / share)[0]

    return step


def second_order(
    risk: Risk, groups: Sequence[Tensor], queries: Data, *, measure: Measure, step: Step
) -> np.ndarray:
    """Change of each query's measure by a Newton step without each group, ``[q, m]``.

    Args:
        risk: objective and all training data.
        groups: positions to remove, each by itself.
        queries: whose measures are asked.
        measure: what is asked of them.
        step: the Newton step without a group.

    Raises:
        NotConvergedError, IndefiniteError: a solve failed.
    """
    slopes = torch.stack([_slope(risk, gone) for gone in groups])
    return _after_steps(risk, groups, slopes, queries, measure=measure, step=step)


def _after_steps(
    risk: Risk,
    groups: Sequence[Tensor],
    slopes: Tensor,
    queries: Data,
    *,
    measure: Measure,
    step: Step,
) -> np.ndarray:
    """Change of the measures at θ̂ + Δθ, evaluated there and not linearised, ``[q, m]``."""
    objective, here = risk.objective, risk.objective.space.row()
    pairs = zip(groups, slopes, strict=True)
    steps = [step(risk, gone, slope) for gone, slope in track(pairs, "groups", len(slopes))]
    rows = torch.cat([here[None], here + torch.stack(steps)])
    batches = query_batches(objective, queries, measure)
    found = torch.cat([stacked_measure(objective, b, rows, measure) for b in batches], dim=1)
    values: np.ndarray = found.T.cpu().double().numpy()
    change: np.ndarray = values[:, 1:] - values[:, :1]
    return change


def effects(
    risk: Risk,
    groups: Groups,
    queries: Data,
    *,
    measure: Measure,
    inverse: Inverse,
    step: Step,
) -> GroupEffects:
    """Predicted change of each query's measure if each of the groups is removed.

    Args:
        risk: objective and all training data.
        groups: what to remove, each by itself.
        queries: whose measures are asked.
        measure: what is asked of them.
        inverse: (H + λ)⁻¹ over all training data.
        step: the Newton step without a group.

    Raises:
        NotConvergedError, IndefiniteError: a solve failed.
    """
    objective = risk.objective
    slopes = torch.stack([_slope(risk, gone) for gone in groups.positions])
    first = query_products(objective, queries, measure, inverse.apply(slopes))
    second = _after_steps(risk, groups.positions, slopes, queries, measure=measure, step=step)
    return GroupEffects(
        query_ids=queries.ids,
        groups=groups.names,
        sizes=np.array([len(gone) for gone in groups.positions]),
        first=first.cpu().double().numpy(),
        second=second,
        meaning=meaning_of(objective, measure),
    )
