"""What-ifs: to two orders, with intervals from retrained changes, and beside the real thing."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from upweight.answers import WhatIf
from upweight.bars import track
from upweight.calibration import Calibration, Predicted, row_fingerprints
from upweight.changes import ALONE, Change, measured, moved, predict, relabelled
from upweight.data import Data
from upweight.errors import IndefiniteError, InputError, NotConvergedError
from upweight.evaluation import group_effects
from upweight.explanation import Question, explain
from upweight.groups import Groups, effects, second_order
from upweight.linalg import CholeskyInverse, MeanOperator
from upweight.meaning import meaning_of
from upweight.newton import Factorised, kept_share
from upweight.outcomes import Asked, Outcomes
from upweight.prepared import Prepared
from upweight.retraining import How, Relabels, Trials, Truth, retrain, seed_of
from upweight.risk import Risk

__all__ = ["asked_of", "calibrated", "factorised", "really", "whatif"]

# What a solve says where no minimum is near.
NoStep = (IndefiniteError, NotConvergedError)


def factorised(made: Prepared) -> Factorised | None:
    """The factorised curvature, where a group's part can be taken out of it; None elsewhere.

    Raises:
        InputError: a baseline inverts no curvature.
    """
    method = made.fitted
    if not method.fits or not isinstance(made.inverse, CholeskyInverse):
        return None
    if not isinstance(made.curvature, MeanOperator):
        return None
    return Factorised(method.fit, made.inverse, made.shift)


def asked_of(made: Prepared, queries: Data) -> Asked:
    """What a truth must be about, to be of use here."""
    objective = made.objective
    return Asked(
        queries.ids,
        measured(objective, queries),
        meaning_of(objective, objective.measure),
        len(made.data),
    )


def whatif(
    made: Prepared, change: Change, queries: Data, calibration: Calibration | None
) -> WhatIf:
    """Predicted measures after a change, to first order and, where it is cheap, to second.

    Args:
        made: model, data and method.
        change: what is changed.
        queries: whose measures are asked.
        calibration: of this method, for intervals.

    Raises:
        DataError: an id is unknown, or nothing is left to train on.
    """
    rows, caveats = made.rows(queries, made.objective.measure)
    found = predict(made.risk, change, queries, rows, caveats)
    if change.removed:
        kept_share(made.risk, made.data.positions(change.removed))
        if len(change) == len(change.removed):
            found = _with_second(made, change, queries, found)
    if calibration is None:
        return replace(found, notes=(*found.notes, ALONE))
    if not change.drops_and_labels:
        why = "no interval: only removals and new labels can be retrained"
        return replace(found, notes=(*found.notes, why))
    second = None if found.second is None else found.second[:, None]
    counts = (np.array([len(part)]) for part in (change.removed, change.relabel))
    return calibration.judge(found, queries, Predicted(found.change[:, None], second, *counts))


def _with_second(made: Prepared, change: Change, queries: Data, found: WhatIf) -> WhatIf:
    """The same with a Newton step, where the curvature is factorised."""
    cheap = factorised(made)
    if cheap is None:
        return found
    gone = (made.data.positions(change.removed),)
    try:
        second = second_order(
            made.risk, gone, queries, measure=made.objective.measure, step=cheap.step
        )[:, 0]
    except NoStep as error:
        return replace(found, notes=(*found.notes, f"no second order: {error}"))
    notes, size = found.notes, float(np.abs(second).sum())
    if size > 0:
        gap = float(np.abs(found.change - second).sum()) / size
        notes = (*notes, f"First order is off the second by {gap:.1%} of the predicted change.")
    return replace(found, second=second, notes=notes)


def calibrated(made: Prepared, queries: Data, truth: Truth) -> Calibration:
    """Predictions for all changes that were retrained, beside what happened.

    To second order where that is cheap and all of the changes are removals.

    Raises:
        InputError: the truth is of other data, queries, measure or model, or of too few changes.
    """
    cheap = factorised(made)
    asked = asked_of(made, queries)
    outcomes = Outcomes.of(truth, asked)
    trials = outcomes.trials
    first, second = _both_orders(made, queries, trials, cheap)
    changed = np.zeros(len(trials), dtype=np.int64)
    if trials.relabels is not None:
        np.add.at(changed, trials.relabels.trial, 1)
        first = first + _relabelling(made, queries, trials, trials.relabels)
    predicted = Predicted(first, second, trials.gone.sum(1), changed)
    return Calibration(queries.ids, row_fingerprints(queries), predicted, outcomes, asked.meaning)


def _both_orders(
    made: Prepared, queries: Data, trials: Trials, cheap: Factorised | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Predicted effects of what each trial leaves out, ``[q, u]``."""
    measure = made.objective.measure
    if cheap is not None and trials.relabels is None and trials.gone.any(1).all():
        groups = Groups(np.arange(len(trials)), _positions(trials))
        try:
            found = effects(
                made.risk, groups, queries, measure=measure, inverse=made.inverse, step=cheap.step
            )
        except NoStep:
            pass
        else:
            return found.first, found.second
    scores = explain(Question(made, queries, None))
    return group_effects(np.asarray(scores.values), trials.gone), None


def _positions(trials: Trials) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.flatnonzero(gone)) for gone in trials.gone)


def _relabelling(made: Prepared, queries: Data, trials: Trials, new: Relabels) -> np.ndarray:
    """Predicted effects of the new labels of each trial, ``[q, u]``."""
    rows, _ = made.rows(queries, made.objective.measure)
    found = np.zeros((len(queries), len(trials)))
    for trial in track(np.unique(new.trial).tolist(), "new labels", len(np.unique(new.trial))):
        here = new.trial == trial
        ids = made.data.ids[new.position[here]].tolist()
        labels = dict(zip(ids, torch.from_numpy(new.label[here]), strict=True))
        effect = moved(made.risk, Change.of((), labels, None, None), rows)
        found[:, trial] = effect.cpu().double().numpy()
    return found


def really(made: Prepared, change: Change, queries: Data, found: WhatIf, how: How) -> WhatIf:
    """The same what-if beside what happens when the model is trained again.

    With the seed of the model at hand, once with the change and once without.

    Raises:
        InputError: the change is of another kind than what can be retrained.
        NumericalError: a training failed.
    """
    if not change.drops_and_labels:
        raise InputError(
            "retrain= removes examples and gives others new labels. Leave out reweight and "
            "replace, or train on the changed data yourself."
        )
    trial = _trial(made.data, change, seed_of(how))
    truth = retrain(Risk(made.whole, made.data), queries, trial, how)
    if truth.failures:
        raise NotConvergedError(f"Training after the change failed: {truth.failures[0]}")
    notes = [f"actual change: {truth.how}", *truth.notes]
    if truth.reproduced is False:
        notes.append(
            "this training does not give the model at hand, so that the actual change is that of "
            "another training of the same kind"
        )
    return replace(found, actual=truth.changes()[0], notes=(*found.notes, *notes))


def _trial(data: Data, change: Change, seed: int) -> Trials:
    """The change as a trial."""
    gone = np.zeros((1, len(data)), dtype=bool)
    gone[0, data.positions(change.removed).numpy()] = True
    relabels = None
    if change.relabel:
        positions = data.positions(list(change.relabel))
        after = relabelled(data.take(positions), list(change.relabel.values())).rows().targets
        places = positions.numpy()
        relabels = Relabels(np.zeros_like(places), places, after.numpy())
    return Trials("a what-if", gone, np.array([seed]), relabels)
