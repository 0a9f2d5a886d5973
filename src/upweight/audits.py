"""The audit of a training set: which labels look wrong, from one trained model or several."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from upweight.errors import LossError
from upweight.risk import Risk
from upweight.tables import Table

__all__ = ["audit", "listed", "pooled", "survey"]

Survey = Mapping[str, np.ndarray]


def survey(risk: Risk) -> dict[str, np.ndarray]:
    """Loss, and where the loss says them margin and predicted label, of every example."""
    objective, found = risk.objective, {}
    params = objective.space.values()
    parts: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch, _ in risk.batches(4096):
            outputs = objective.outputs(params, batch)
            values = {"loss": objective.loss(outputs, batch.targets)}
            with suppress(LossError):
                values["margin"] = objective.loss.margin(outputs, batch.targets)
            predicted = objective.loss.predict(outputs)
            if predicted is not None:
                values["predicted_label"] = predicted
            if isinstance(batch.targets, Tensor) and batch.targets.dim() == 1:
                values["given_label"] = batch.targets
            for name, value in values.items():
                parts.setdefault(name, []).append(value)
    for name, pieces in parts.items():
        found[name] = torch.cat(pieces).cpu().numpy()
    return found


def pooled(surveys: Sequence[Survey], weights: Sequence[float]) -> dict[str, np.ndarray]:
    """One survey of several models: weighted means of numbers, and the label that most predict.

    Args:
        surveys: of the same examples.
        weights: of the models; they sum to 1. Among labels of equal weight the smallest counts.

    Example:
        >>> one, other = ({"loss": np.array([x]), "predicted_label": np.array([k])}
        ...               for x, k in ((1.0, 2), (3.0, 0)))
        >>> pooled([one, other], [0.75, 0.25])
        {'loss': array([1.5]), 'predicted_label': array([2])}
    """
    found: dict[str, np.ndarray] = {}
    for name in surveys[0]:
        values = np.stack([values[name] for values in surveys])
        if name == "given_label":
            found[name] = values[0]
        elif name == "predicted_label":
            labels = np.unique(values)
            votes = np.tensordot(np.asarray(weights), values[..., None] == labels, 1)
            found[name] = labels[votes.argmax(-1)]
        else:
            found[name] = np.tensordot(np.asarray(weights), values, 1)
    return found


def audit(risk: Risk, self_influence: np.ndarray) -> Table:
    """Examples by self-influence, largest first, with loss and margin beside it.

    ``label_quality`` is the rank of the self-influence turned into 0 (worst) to 1;
    ``is_label_issue`` says that the model predicts another label than the given one. The other
    names are cleanlab's too.

    Args:
        risk: objective and training data.
        self_influence: ``[N]``.
    """
    return listed(risk.data.ids, self_influence, survey(risk), unit=risk.objective.loss.unit)


def listed(ids: np.ndarray, self_influence: np.ndarray, values: Survey, *, unit: str) -> Table:
    """The table of an audit.

    Args:
        ids: ``[N]``.
        self_influence: ``[N]``.
        values: what else is known of each example.
        unit: of the self-influence.
    """
    order = np.argsort(-self_influence, kind="stable")
    quality = np.empty(len(order))
    quality[order] = np.linspace(0, 1, len(order)) if len(order) > 1 else 0.0
    columns: dict[str, np.ndarray] = {"id": ids, "label_quality": quality}
    if {"given_label", "predicted_label"} <= values.keys():
        differs = values["given_label"] != values["predicted_label"]
        # An ignored label claims nothing, so it cannot be wrong.
        columns["is_label_issue"] = differs & ~np.isnan(values.get("margin", np.zeros(len(order))))
        columns["given_label"] = values["given_label"]
        columns["predicted_label"] = values["predicted_label"]
    columns["self_influence"] = self_influence
    columns["loss"] = values["loss"]
    if "margin" in values:
        columns["margin"] = values["margin"]
    return Table(
        {name: column[order] for name, column in columns.items()},
        f"{_heading(columns)} self_influence: predicted rise of the example's own loss ({unit}) "
        "if it is removed.",
    )


def _heading(columns: Mapping[str, np.ndarray]) -> str:
    """What a table lists; where no label differs from the model's, none is called suspicious."""
    issues = columns.get("is_label_issue")
    if issues is None or bool(issues.any()):
        return "Suspicious labels, worst first."
    return (
        "Most influential on themselves, largest first; no label differs from what the model says."
    )
