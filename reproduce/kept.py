"""Long trainings in steps that are kept: one model, many copies of it, refits."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reproduce.copies import Copies, kept_shares, train_copies
from reproduce.experiment import Steps
from reproduce.network import refitted
from upweight.linalg import CholeskyInverse
from upweight.risk import Risk

__all__ = ["Progress", "left_out", "minibatches", "refits", "retrained", "trained"]

CHUNK, SHARD = 500, 8
Plan = list[tuple[Tensor, float]]


@dataclass
class Progress:
    """Says how far a long stage is, and how long the rest will take.

    Attributes:
        name: of the stage.
        total: parts of it.
        done: so far.
    """

    name: str
    total: int
    done: int = 0
    begun: float = field(default_factory=time.perf_counter)

    def add(self, count: int) -> None:
        """Count parts that were done, and print a line."""
        self.done += count
        left = (time.perf_counter() - self.begun) / self.done * (self.total - self.done) / 60
        print(f"{self.name}: {self.done} of {self.total}, {left:.1f} minutes left", flush=True)


def minibatches(n: int, size: int, rates: Sequence[float], *, seed: int) -> Plan:
    """Positions and learning rate of every step: whole epochs in random order, one after another.

    Args:
        n: examples.
        size: of a minibatch.
        rates: of every step.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    while len(parts) < len(rates):
        parts += torch.randperm(n, generator=generator).split(size)
    return list(zip(parts, rates, strict=False))


def _arrays(copies: Copies) -> dict[str, Any]:
    state = {"rows": copies.rows, "first": copies.first, "second": copies.second}
    return {name: value.detach().numpy() for name, value in state.items()} | {"steps": copies.steps}


def _copies(found: Mapping[str, np.ndarray]) -> Copies:
    rows, first, second = (torch.from_numpy(found[key]) for key in ("rows", "first", "second"))
    return Copies(rows, first, second, int(found["steps"]))


def trained(risk: Risk, copies: Copies, plan: Plan, *, steps: Steps, name: str) -> Copies:
    """One model trained with Adam, 500 steps at a time, each a step that is kept."""
    progress = Progress(f"{name}: steps", len(plan))
    for start in range(0, len(plan), CHUNK):
        part = plan[start : start + CHUNK]

        def make(copies: Copies = copies, part: Plan = part) -> dict[str, Any]:
            return _arrays(train_copies(risk, copies, left_out([])[:1], plan=part))

        copies = _copies(steps.once(f"{name}-{start}", make))
        progress.add(len(part))
    return copies


def left_out(removed: Sequence[int] | np.ndarray) -> list[Tensor]:
    """What each copy leaves out: nothing, then one example each."""
    return [torch.tensor([], dtype=torch.long), *(torch.tensor([int(i)]) for i in removed)]


def _shards(gone: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [gone[i : i + SHARD] for i in range(0, len(gone), SHARD)]


def retrained(
    risk: Risk, copies: Copies, gone: Sequence[Tensor], *, plan: Plan, steps: Steps
) -> Tensor:
    """Rows ``[m, p]`` of copies trained on; every shard of copies is a step that is kept.

    All copies meet the same minibatches, and Adam goes on with the moments of the checkpoint.
    """
    progress, found = Progress("copies retrained", len(gone)), []
    for k, shard in enumerate(_shards(gone)):

        def make(shard: Sequence[Tensor] = shard) -> dict[str, Any]:
            return _arrays(train_copies(risk, copies.repeat(len(shard)), shard, plan=plan))

        found.append(_copies(steps.once(f"retrained-{k}", make)).rows)
        progress.add(len(shard))
    return torch.cat(found)


def refits(
    risk: Risk,
    row: Tensor,
    gone: Sequence[Tensor],
    *,
    near: tuple[CholeskyInverse, float],
    steps: Steps,
    part: float = 1.0,
) -> Tensor:
    """Rows of refits near a row, and what is left of their slopes in the last column.

    Args:
        risk: the objective there.
        row: the point.
        gone: what each copy leaves out.
        near: a damped inverse curvature, and its damping.
        steps: kept on disk.
        part: of each removal that is made: (1 − part) R + part R without the example.
    """
    progress, found = Progress(f"copies refitted ({part:g} of a removal)", len(gone)), []
    everything = torch.arange(len(risk.data))
    for k, shard in enumerate(_shards(gone)):
        removed, whole = (kept_shares(risk, everything, s) for s in (shard, [everything[:0]]))
        shares = part * removed + (1 - part) * whole

        def make(shares: Tensor = shares) -> dict[str, Any]:
            return {"rows": refitted(risk, row, shares, near).numpy()}

        found.append(torch.from_numpy(steps.once(f"refitted-{part:g}-{k}", make)["rows"]))
        progress.add(len(shard))
    return torch.cat(found)
