"""Changes of the training data and what they predict: remove, relabel, reweight, replace."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from upweight.answers import WhatIf
from upweight.data import Data
from upweight.errors import DataError
from upweight.gradients import per_example
from upweight.meaning import Meaning, meaning_of, removal_gradient_row, removal_score
from upweight.methods import Baseline
from upweight.risk import Risk

__all__ = ["Change", "baseline_meaning", "predict"]


def baseline_meaning(baseline: Baseline) -> Meaning:
    """What a baseline's values say: a similarity, neither helpful nor harmful."""
    return Meaning(f"{baseline.name}_similarity", baseline.unit, 0, change=False)


@final
@dataclass(frozen=True)
class Change:
    """A change of the training data, by id.

    Attributes:
        remove: ids to drop.
        relabel: id to new target.
        reweight: id to a factor on its weight.
        replace: id to a new example (inputs ..., target).
    """

    remove: tuple[Any, ...]
    relabel: Mapping[Any, Any]
    reweight: Mapping[Any, float]
    replace: Mapping[Any, Any]

    def __post_init__(self) -> None:
        named = [*self.remove, *self.relabel, *self.reweight, *self.replace]
        twice = {key for key in named if named.count(key) > 1}
        if twice:
            raise DataError(f"The id {next(iter(twice))!r} is named twice in one change.")
        for key, factor in self.reweight.items():
            if not 0 <= factor < float("inf"):
                raise DataError(f"The weight factor of {key!r} must be finite and ≥ 0: {factor}.")

    def __len__(self) -> int:
        return len(self.remove) + len(self.relabel) + len(self.reweight) + len(self.replace)


def _products(risk: Risk, data: Data, rows: Tensor) -> Tensor:
    """s_q · ∇ℓ(z) for some examples held in memory, ``[q, m]``."""
    objective = risk.objective
    batch = objective.place(data.at(torch.arange(len(data))))
    objective.probe(data)
    objective.loss.check(objective.outputs(objective.space.values(), batch), batch.targets)
    return per_example(objective, batch).dot(rows)


def _relabelled(risk: Risk, relabel: Mapping[Any, Any], positions: Tensor) -> Data:
    here = risk.data.take(positions)
    old = here.at(torch.arange(len(here))).targets
    if not isinstance(old, Tensor):
        raise DataError("The training data has no single tensor of targets to relabel.")
    new = [torch.as_tensor(value, dtype=old.dtype) for value in relabel.values()]
    return here.relabelled(torch.stack(new).reshape(old.shape))


def _exchange(risk: Risk, change: Change, rows: Tensor) -> Tensor:
    """Σ share_i s_q·(∇ℓ(z_i) − ∇ℓ(z_i′)) over exchanged examples, ``[q]``; L2 cancels."""
    total = rows.new_zeros(len(rows))
    if change.relabel:
        positions = risk.data.positions(list(change.relabel))
        old = _products(risk, risk.data.take(positions), rows)
        new = _products(risk, _relabelled(risk, change.relabel, positions), rows)
        total = total + removal_score(old - new, risk.share(positions)).sum(1)
    if change.replace:
        positions = risk.data.positions(list(change.replace))
        old = _products(risk, risk.data.take(positions), rows)
        fresh = Data.of([tuple(example) for example in change.replace.values()])
        total = total + removal_score(
            old - _products(risk, fresh, rows), risk.share(positions)
        ).sum(1)
    return total


def _reweighed(risk: Risk, change: Change, rows: Tensor) -> Tensor:
    """Σ (1 − factor) · score over reweighed and removed examples, ``[q]``."""
    factors = {**dict.fromkeys(change.remove, 0.0), **change.reweight}
    if not factors:
        return rows.new_zeros(len(rows))
    positions = risk.data.positions(list(factors))
    products = _products(risk, risk.data.take(positions), rows)
    products = products + (rows @ removal_gradient_row(risk.objective))[:, None]
    less = 1 - torch.tensor(list(factors.values()), dtype=rows.dtype, device=rows.device)
    return removal_score(products, risk.share(positions)) @ less


def predict(
    risk: Risk, change: Change, queries: Data, rows: Tensor, caveats: tuple[str, ...]
) -> WhatIf:
    """Predicted measures after a change, to first order.

    Args:
        risk: objective and training data.
        change: what is changed.
        queries: whose measures are asked.
        rows: their preconditioned gradients, ``[q, p]``.
        caveats: of the solve.

    Raises:
        DataError: an id is unknown, or new targets do not fit.
    """
    objective = risk.objective
    total = _exchange(risk, change, rows) + _reweighed(risk, change, rows)
    with torch.no_grad():
        batch = objective.place(queries.at(torch.arange(len(queries))))
        before = objective.measured(objective.measure)(objective.space.values(), batch)
    notes = list(caveats)
    if len(change) > 1:
        notes.append(
            f"{len(change)} changes are added up to first order; examples that stand in for each "
            "other make the true change larger."
        )
    if objective.measure == "loss" and bool((before + total < 0).any()):
        notes.append("A predicted loss below 0 shows that the change is too large for first order.")
    return WhatIf(
        queries.ids,
        before.cpu().double().numpy(),
        total.cpu().double().numpy(),
        meaning_of(objective, objective.measure),
        tuple(notes) if notes else (),
    )


def positions_without(count: int, gone: Tensor) -> np.ndarray:
    """All positions but some."""
    kept = np.ones(count, dtype=bool)
    kept[gone.numpy()] = False
    return np.flatnonzero(kept)
