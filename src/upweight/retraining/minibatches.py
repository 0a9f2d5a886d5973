"""What every step of many trainings reads: the same order of examples, without those gone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from upweight.budget import budget
from upweight.data import Batch
from upweight.errors import InputError
from upweight.retraining.training import Training
from upweight.retraining.trials import Relabels, Trials
from upweight.risk import Risk
from upweight.sources import Arrays, leaves, map_leaves

__all__ = ["Minibatch", "Minibatches", "Rows"]

CELLS = 2**21


@final
@dataclass(frozen=True)
class Minibatch:
    """One step of m models with b rows each.

    Attributes:
        batch: rows ``[m · b, ...]``, one model after the other. Where all models see the same
            inputs, these are ``[b, ...]``; targets are ``[m · b, ...]`` all the same.
        shares: of each row in its model's mean, ``[m, b]``; 0 for rows that only fill up.
        together: whether all models see the same inputs.
    """

    batch: Batch
    shares: Tensor
    together: bool

    @property
    def shape(self) -> tuple[int, int]:
        """M and b."""
        return self.shares.shape[0], self.shares.shape[1]

    def of(self, models: Tensor) -> "Minibatch":
        """That of some models, with as many rows as the fullest of them has."""
        shares = self.shares[models]
        width = max(1, int((shares > 0).sum(1).max()))

        def pick(leaf: Tensor) -> Tensor:
            rows: Tensor = leaf.unflatten(0, self.shape)[models.to(leaf.device), :width]
            return rows.flatten(0, 1)

        inputs, targets = (map_leaves(pick, t) for t in (self.batch.inputs, self.batch.targets))
        batch = Batch(inputs, targets, pick(self.batch.positions))
        return Minibatch(batch, shares[:, :width], together=False)


@final
class Rows:
    """Training rows on the model's device, all of them where they fit into half the budget.

    Args:
        risk: objective and data.
    """

    def __init__(self, risk: Risk) -> None:
        self.risk = risk
        self._all: Batch | None = None
        if isinstance(risk.data.source, Arrays):
            few = risk.objective.place(risk.data.rows(0, 1))
            size = sum(leaf.nbytes for leaf in leaves((few.inputs, few.targets)))
            if size * len(risk.data) <= budget() // 2:
                self._all = risk.objective.place(risk.data.rows())

    def at(self, positions: Tensor) -> Batch:
        """Placed rows at positions ``[b]``, which may repeat."""
        if self._all is None:
            return self.risk.objective.place(self.risk.data.at(positions))

        def pick(leaf: Tensor) -> Tensor:
            return leaf.index_select(0, positions.to(leaf.device))

        inputs, targets = (map_leaves(pick, t) for t in (self._all.inputs, self._all.targets))
        return Batch(inputs, targets, positions)


def _padded(new: Relabels | None, m: int, targets: Any) -> tuple[Tensor, Tensor] | None:
    """Positions ``[m, k]`` of the new labels of every model, −1 for none, and labels."""
    if new is None:
        return None
    trial = torch.from_numpy(new.trial)
    label = new.like(targets)
    most = int(trial.bincount().max())
    where, labels = torch.full((m, most), -1), label.new_zeros((m, most, *label.shape[1:]))
    filled = [0] * m
    for row, model in enumerate(trial.tolist()):
        where[model, filled[model]] = int(new.position[row])
        labels[model, filled[model]] = label[row]
        filled[model] += 1
    return where, labels


@final
class Minibatches:
    """The minibatches of m trainings, step by step.

    Args:
        rows: of the training data.
        training: batch size and order.
        trials: what is gone, and new labels.

    Raises:
        InputError: there are new labels, and targets of several tensors.
    """

    def __init__(self, rows: Rows, training: Training, trials: Trials) -> None:
        self._rows, self._training = rows, training
        self._seeds = trials.seeds.tolist()
        risk = rows.risk
        dtype = torch.promote_types(risk.objective.space.dtype, torch.float32)
        self._own = risk.weights.to(dtype)
        self._weights = self._own * torch.from_numpy(~trials.gone)
        self._new = None
        if trials.relabels is not None:
            if not isinstance(rows.at(torch.tensor([0])).targets, Tensor):
                raise InputError("New labels take targets of one tensor, a row for each example.")
            self._new = _padded(trials.relabels, len(trials), rows.at(torch.tensor([0])).targets)
            self._reweigh(trials.relabels)

    def _reweigh(self, new: Relabels) -> None:
        """A label may decide what an example weighs."""
        risk, positions = self._rows.risk, torch.from_numpy(new.position)
        like = self._rows.at(positions).targets
        found = risk.objective.loss.weights(new.like(like))
        weight = torch.ones(len(positions)) if found is None else found.cpu()
        if risk.data.weights is not None:
            weight = weight * risk.data.weights[positions]
        self._weights[torch.from_numpy(new.trial), positions] = weight.to(self._weights)

    def steps(self, *, together: bool) -> Iterator[Minibatch]:
        """All steps of all epochs: packed rows, or the same rows for all models of one seed."""
        for epoch in range(self._training.epochs):
            places = self._places(epoch)
            size = max(1, CELLS // (len(self._weights) * self._training.batch_size))
            for start in range(0, places.shape[1], size):
                piece = places[:, start : start + size]
                yield from self._together(piece) if together else self._packed(piece)

    def _places(self, epoch: int) -> Tensor:
        """Positions ``[u, steps, b]`` of an epoch, −1 after the last; u is 1 for a common seed."""
        count, size = self._weights.shape[1], self._training.batch_size
        known = {seed: row for row, seed in enumerate(dict.fromkeys(self._seeds))}
        orders = [self._training.epoch(seed, epoch, count) for seed in known]
        steps = -(-max(map(len, orders)) // size)
        placed = torch.full((len(known), steps * size), -1)
        for row, order in enumerate(orders):
            placed[row, : len(order)] = order
        found = placed.view(len(known), steps, size)
        return found if len(known) == 1 else found[[known[seed] for seed in self._seeds]]

    def _shares(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Positions ``[m, steps, b]`` and the share of each in its minibatch's mean."""
        there = places >= 0
        at = torch.where(there, places, 0).expand(len(self._weights), *places.shape[1:])
        found = self._weights.gather(1, at.flatten(1)).view_as(at) * there
        if self._rows.risk.objective.removal == "mean":
            total = found.sum(2, keepdim=True)
        else:  # what remains keeps its share
            total = (self._own[at] * there).sum(2, keepdim=True)
        return at, found / total.clamp_min(torch.finfo(found.dtype).tiny)

    def _packed(self, places: Tensor) -> Iterator[Minibatch]:
        """The rows that each model keeps, as many as the fullest has; others count nothing."""
        at, shares = self._shares(places)
        kept = shares > 0
        first = kept.to(torch.uint8).argsort(dim=2, descending=True, stable=True)
        at, shares = at.gather(2, first), shares.gather(2, first)
        for step, width in enumerate(kept.sum(2).amax(0).clamp_min(1).tolist()):
            positions = at[:, step, :width].reshape(-1)
            batch = self._labelled(self._rows.at(positions), len(at))
            yield Minibatch(batch, self._placed(shares[:, step, :width]), together=False)

    def _together(self, places: Tensor) -> Iterator[Minibatch]:
        """All rows of a minibatch, shared; those that a model lost count nothing."""
        at, shares = self._shares(places)
        m = len(at)
        for step, width in enumerate((places[0] >= 0).sum(1).tolist()):
            found = self._rows.at(at[0, step, :width])
            targets = map_leaves(lambda x: x.repeat(m, *[1] * (x.dim() - 1)), found.targets)
            batch = Batch(found.inputs, targets, found.positions.repeat(m))
            share = self._placed(shares[:, step, :width])
            yield Minibatch(self._labelled(batch, m), share, together=True)

    def _labelled(self, batch: Batch, m: int) -> Batch:
        """The batch with the new labels where a model has one."""
        if self._new is None:
            return batch
        where, labels = self._new
        places, targets = batch.positions.view(m, -1), batch.targets.unflatten(0, (m, -1))
        for k in range(where.shape[1]):
            hit = (places == where[:, k, None]).to(targets.device)
            shaped = hit.view(*hit.shape, *[1] * (targets.dim() - 2))
            targets = torch.where(shaped, labels[:, k, None], targets)
        return Batch(batch.inputs, targets.flatten(0, 1), batch.positions)

    def _placed(self, shares: Tensor) -> Tensor:
        space = self._rows.risk.objective.space
        return shares.to(space.device, space.dtype)
