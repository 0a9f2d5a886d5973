"""An objective bound to its training data: the weighted mean every curvature is a derivative of."""

from collections.abc import Iterator
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from upweight.checks import probe
from upweight.data import Batch, Data
from upweight.errors import LossError
from upweight.objective import Objective
from upweight.sources import leaves, map_leaves

__all__ = ["OfRisk", "Risk", "checked_targets"]

DEFAULT_BATCH, SURVEY_ROWS = 512, 8192


def _repeated(output: Any, count: int) -> Any:
    """An output of one row in the shape of many, without a copy."""
    return map_leaves(lambda leaf: leaf.expand(count, *leaf.shape[1:]), output)


def _widths(batch: Batch) -> list[torch.Size]:
    return [leaf.shape[1:] for leaf in leaves(batch.inputs)]


def checked_targets(objective: Objective, data: Data, size: int) -> Iterator[tuple[Batch, Any]]:
    """Batches as they are with their targets placed, checked against the shape of the outputs.

    Outputs are computed for one example, and for batches of another width than its. Batches are of
    this size where the data do not say their own.

    Raises:
        LossError: a target cannot be scored, with the rows among which it is.
    """
    first = objective.place(data.at(torch.tensor([0], device="cpu")))
    with torch.no_grad():
        output = objective.outputs(objective.space.values(), first)
    for batch in data.batches(data.batch_size or size):
        if _widths(batch) == _widths(first):
            like = _repeated(output, len(batch))
        else:  # sequences of another length give outputs of another shape
            with torch.no_grad():
                like = objective.outputs(objective.space.values(), objective.place(batch))
        targets = objective.place(Batch((), batch.targets, batch.positions)).targets
        try:
            objective.loss.check(like, targets)
        except LossError as error:
            start, stop = int(batch.positions[0]), int(batch.positions[-1])
            raise LossError(f"Rows {start} to {stop}: {error}") from error
        yield batch, targets


@final
class Risk:
    """R(θ) = Σ_i w_i ℓ(z_i, θ) / Σ_i w_i + ½ θᵀ Λ θ over given data.

    w_i is the example's own weight times what the loss says of its target (class weights, tokens
    that count). Building one checks the objective on a few rows and every label.

    Args:
        objective: what was minimised.
        data: what it was minimised over.

    Raises:
        LossError: a label is unknown, or no example has weight.
    """

    def __init__(self, objective: Objective, data: Data) -> None:
        probe(objective, data, role="training data")
        self.objective = objective
        self.data = data
        self.weights = self._survey()
        self.total = float(self.weights.sum())
        if not self.total > 0:
            raise LossError(
                "No training example has weight: all are ignored, or all weights are 0. Check "
                "ignore_index, the class weights and the sample weights."
            )

    def _survey(self) -> Tensor:
        """Weights ``[N]`` of all examples, whose targets are checked."""
        parts = []
        for batch, targets in checked_targets(self.objective, self.data, SURVEY_ROWS):
            weights = self.objective.loss.weights(targets)
            parts.append(torch.ones(len(batch), device="cpu") if weights is None else weights.cpu())
        found = torch.cat([part.double() for part in parts])
        return found if self.data.weights is None else found * self.data.weights

    def share(self, positions: Tensor) -> Tensor:
        """w_i / Σ w of rows, ``[b]``, on the model's device in its dtype."""
        space = self.objective.space
        return (self.weights[positions] / self.total).to(space.device, space.dtype)

    def batches(self, size: int | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """Placed batches with the share ``[b]`` of each row in the mean."""
        for batch in self.data.batches(size or self.data.batch_size or DEFAULT_BATCH):
            yield self.objective.place(batch), self.share(batch.positions)

    def rows(self, start: int, stop: int) -> tuple[Batch, Tensor]:
        """Placed rows from start to stop with their shares."""
        batch = self.data.rows(start, stop)
        return self.objective.place(batch), self.share(batch.positions)

    def at(self, positions: Tensor) -> tuple[Batch, Tensor]:
        """Placed rows at positions ``[b]`` with their shares."""
        return self.objective.place(self.data.at(positions)), self.share(positions)

    def value(self) -> float:
        """R at the model's parameters, with L2."""
        objective = self.objective
        params, row = objective.space.values(), objective.space.row()
        with torch.no_grad():
            total = 0.5 * float((objective.l2 * row * row).sum(dtype=torch.float64))
            for batch, share in self.batches():
                total += float((objective.losses(params, batch) * share).sum(dtype=torch.float64))
        return total

    def gradient(self) -> Tensor:
        """∇R at the model's parameters, ``[p]``: zero at a minimum."""
        objective = self.objective
        row = objective.space.row().requires_grad_(True)
        total = objective.l2 * row.detach()
        for batch, share in self.batches():
            with torch.enable_grad():
                loss = (objective.losses(objective.space.unflatten(row), batch) * share).sum()
            total = total + torch.autograd.grad(loss, row)[0]
        return total


@runtime_checkable
class OfRisk(Protocol):
    """Something that knows of which risk it is, such as its curvature."""

    risk: Risk
