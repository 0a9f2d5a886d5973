"""Changes of the training data and what they predict: remove, relabel, reweight, replace."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from upweight.answers import WhatIf
from upweight.checks import probe
from upweight.data import Data
from upweight.errors import DataError
from upweight.gradients import batch_rows, per_example
from upweight.meaning import meaning_of, removal_gradient_row, removal_score
from upweight.objective import Objective
from upweight.risk import DEFAULT_BATCH, Risk, checked_targets

__all__ = ["ALONE", "Change", "measured", "moved", "predict", "relabelled"]

ALONE = "no interval: nothing was retrained; inf.calibrate(queries, inf.retrain(...)) makes one"


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
        if not isinstance(self.remove, tuple):
            raise DataError(f"remove takes a list of ids, got {self.remove!r}. Put it in brackets.")
        named = [*self.remove, *self.relabel, *self.reweight, *self.replace]
        twice = next((key for key, times in Counter(named).items() if times > 1), None)
        if twice is not None:
            raise DataError(f"The id {twice!r} is named twice in one change.")
        for key, factor in self.reweight.items():
            if not 0 <= factor < float("inf"):
                raise DataError(f"The weight factor of {key!r} must be finite and ≥ 0: {factor}.")

    @classmethod
    def of(cls, remove: Any, *changed: Mapping[Any, Any] | None) -> "Change":
        """A change from what a user passes: ids to remove, then the three mappings or None."""
        ids: Any = remove if isinstance(remove, (str, Integral)) else tuple(remove)
        return cls(ids, *(part or {} for part in changed))

    def __len__(self) -> int:
        return len(self.remove) + len(self.relabel) + len(self.reweight) + len(self.replace)

    @property
    def removed(self) -> tuple[Any, ...]:
        """Ids of the examples that no longer count."""
        return (*self.remove, *(key for key, factor in self.reweight.items() if not factor))

    @property
    def drops_and_labels(self) -> bool:
        """Whether all that it does is to remove and to relabel."""
        return not self.replace and not any(self.reweight.values())


def _weighed(risk: Risk, data: Data, rows: Tensor, own: Tensor) -> Tensor:
    """Products w · s_q·∇ℓ̃(z) / Σ w of examples in memory, ``[q, m]``; w is of *their* target.

    Args:
        risk: objective and training data.
        data: the examples.
        rows: s, ``[q, p]``.
        own: their sample weights ``[m]``.
    """
    objective = risk.objective
    probe(objective, data, role="changed examples")
    extra, found = (rows @ removal_gradient_row(objective))[:, None], []
    for plain, targets in checked_targets(objective, data, batch_rows(risk)):
        batch, said = objective.place(plain), objective.loss.weights(targets)
        weight = own[batch.positions] if said is None else own[batch.positions] * said.cpu()
        products = per_example(objective, batch).dot(rows) + extra
        found.append(removal_score(products, (weight / risk.total).to(rows)))
    return torch.cat(found, 1)


def relabelled(here: Data, labels: Sequence[Any]) -> Data:
    """Examples in memory with other labels, in the targets' own shape and dtype.

    Raises:
        DataError: a label does not fit.
    """
    old = here.rows().targets
    if not isinstance(old, Tensor):
        raise DataError("The training data has no single tensor of targets to relabel.")
    try:
        new = [torch.as_tensor(label, device="cpu") for label in labels]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"New labels are numbers, as the old ones ({old.dtype}) are: {error}."
        ) from error
    if any(label.numel() != old[0].numel() for label in new):
        raise DataError(
            f"New labels must have the shape of the old ones, {tuple(old.shape[1:])}; got "
            f"{[tuple(label.shape) for label in new]}."
        )
    cast = [label.to(old.dtype) for label in new]
    if any(not torch.allclose(a.double(), b.double()) for a, b in zip(new, cast, strict=True)):
        raise DataError(f"A new label is not a value of the targets' dtype, {old.dtype}.")
    return here.relabelled(torch.stack([label.reshape(old.shape[1:]) for label in cast]))


def moved(risk: Risk, change: Change, rows: Tensor) -> Tensor:
    """Σ (w s_q·∇ℓ̃(z) − w′ s_q·∇ℓ̃(z′)) / Σ w over changed examples, ``[q]``.

    Args:
        risk: objective and training data.
        change: what is changed.
        rows: s_q, ``[q, p]``.

    Raises:
        DataError: an id is unknown, or new targets do not fit.
    """
    total = rows.new_zeros(len(rows))
    factors = {**dict.fromkeys(change.remove, 0.0), **change.reweight}
    for kind, ids in enumerate((list(factors), list(change.relabel), list(change.replace))):
        if not ids:
            continue
        here = risk.data.take(risk.data.positions(ids))
        own = torch.ones(len(here)).double() if here.weights is None else here.weights
        total = total + _weighed(risk, here, rows, own).sum(1)
        after = here
        if kind == 0:
            own = own * torch.tensor(list(factors.values()), dtype=torch.float64)
            if not bool(own.any()):
                continue
        elif kind == 1:
            after = relabelled(here, list(change.relabel.values()))
        else:
            examples = change.replace.values()
            after = Data.of([e if isinstance(e, Mapping) else tuple(e) for e in examples])
        total = total - _weighed(risk, after, rows, own).sum(1)
    return total


def measured(objective: Objective, queries: Data) -> np.ndarray:
    """The objective's measure of every query under the model at hand, ``[q]``, float64."""
    asked, params = objective.measured(objective.measure), objective.space.values()
    with torch.no_grad():
        batches = map(objective.place, queries.batches(queries.batch_size or DEFAULT_BATCH))
        found = torch.cat([asked(params, batch).cpu().double() for batch in batches])
    values: np.ndarray = found.numpy()
    return values


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
    total = moved(risk, change, rows)
    before = measured(objective, queries)
    notes = list(caveats)
    if len(change) > 1:
        notes.append(
            f"{len(change)} changes are added up to first order; examples that stand in for each "
            "other make the true change larger."
        )
    if objective.measure == "loss" and bool((before + total.cpu().numpy() < 0).any()):
        notes.append("A predicted loss below 0 shows that the change is too large for first order.")
    unknown = np.full(len(queries), np.nan)
    return WhatIf(
        query_ids=queries.ids,
        before=before,
        change=total.cpu().double().numpy(),
        meaning=meaning_of(objective, objective.measure),
        notes=tuple(notes),
        second=None,
        low=unknown,
        high=unknown,
        actual=None,
    )
