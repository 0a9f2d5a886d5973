"""Minimising many functions at once by limited-memory BFGS from a good inverse Hessian."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.linalg import Inverse

__all__ = ["Descent", "descend"]

MEMORY = 12
SMALLEST_STEP, OVERSHOOT, GROWTH = 1e-4, 0.5, 10.0

Slope = Callable[[Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True)
class Descent:
    """Where m minimisations ended.

    Attributes:
        rows: ``[m, p]``.
        slope: norm of each gradient there, ``[m]``.
        steps: iterations of the slowest.
    """

    rows: Tensor
    slope: Tensor
    steps: int


@final
class _History:
    """Steps and changes of the gradient, newest last; a pair that curves down counts nothing."""

    def __init__(self) -> None:
        self.pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)

    def add(self, steps: Tensor, changes: Tensor) -> None:
        """Rows ``[m, p]`` of both; zero rows of models that did not move are ignored."""
        product = (steps * changes).sum(1)
        usable = product > 1e-12 * steps.norm(dim=1) * changes.norm(dim=1)
        rho = torch.where(usable, 1 / product, torch.zeros_like(product))
        self.pairs.append((steps, changes, rho))

    def directions(self, slopes: Tensor, active: Tensor, inverse: Inverse) -> Tensor:
        """B ∇f of the active models by the two-loop recursion, B₀ = the given inverse."""
        q, factors = slopes.clone(), []
        for steps, changes, rho in reversed(self.pairs):
            factor = rho[active] * (steps[active] * q).sum(1)
            q -= factor[:, None] * changes[active]
            factors.append(factor)
        r = inverse.apply(q)
        for (steps, changes, rho), factor in zip(self.pairs, reversed(factors), strict=True):
            back = rho[active] * (changes[active] * r).sum(1)
            r += (factor - back)[:, None] * steps[active]
        return r


def descend(
    slope: Slope,
    inverse: Inverse,
    start: Tensor,
    *,
    goal: Tensor,
    max_steps: int,
    known: Tensor | None = None,
) -> Descent:
    """Bring m gradients below their goals.

    A step is taken if the slope along it has not turned upwards by more than half of what it went
    down, which on a convex function means that it lowered the value, and if the gradient has not
    grown tenfold. Otherwise it is tried again, as short as the two slopes say. A model whose steps
    become too short stays where it is.

    Args:
        slope: (rows ``[k, p]``, which of the m models they are ``[k]``) -> gradients ``[k, p]``.
        inverse: close to the inverse Hessian of every function.
        start: ``[m, p]``.
        goal: of each gradient norm, ``[m]``.
        max_steps: of the iteration.
        known: gradients at the start, where they are known already, ``[m, p]``.

    Source: Liu & Nocedal (1989), with all models in one array and a given B₀.
    """
    everyone = torch.arange(len(start), device=start.device)
    rows, history = start.clone(), _History()
    slopes = slope(rows, everyone) if known is None else known.clone()
    norms = slopes.norm(dim=1)
    size = torch.ones_like(norms)
    steps = 0
    for step in range(max_steps):
        active = everyone[(norms > goal) & (size > SMALLEST_STEP)]
        if not len(active):
            break
        steps = step + 1
        moves = -size[active, None] * history.directions(slopes[active], active, inverse)
        found = slope(rows[active] + moves, active)
        before, after = ((grad * moves).sum(1) for grad in (slopes[active], found))
        reached = found.norm(dim=1)
        good = (after <= OVERSHOOT * before.abs()) & (reached <= GROWTH * norms[active])
        size[active[~good]] *= (before.abs() / (before.abs() + after.abs())).clamp(0.1, 0.5)[~good]
        here = active[good]
        moved, changed = torch.zeros_like(rows), torch.zeros_like(rows)
        moved[here], changed[here] = moves[good], found[good] - slopes[here]
        history.add(moved, changed)
        rows[here] += moves[good]
        slopes[here], norms[here] = found[good], reached[good]
        size[here] = 1
    return Descent(rows, norms, steps)
