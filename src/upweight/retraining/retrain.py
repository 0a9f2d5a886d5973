"""Retraining: every trial really trained, its queries measured, one truth."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upweight.data import Data
from upweight.errors import InputError, NumericalError
from upweight.fingerprints import fingerprint
from upweight.forms import form_of
from upweight.meaning import meaning_of
from upweight.objective import Objective
from upweight.retraining.functions import ByFunction, Own
from upweight.retraining.journal import Journal
from upweight.retraining.recipes import ByRecipe
from upweight.retraining.refits import ByRefit, Refit
from upweight.retraining.runs import ROWS, Asked, Run
from upweight.retraining.training import Training
from upweight.retraining.trials import Relabels, Trials
from upweight.retraining.truth import Truth
from upweight.risk import Risk

__all__ = ["How", "retrain", "seed_of"]

How = Training | Refit | Own | Callable[[np.ndarray, int], Any]


def seed_of(how: How) -> int:
    """The seed with which a way of training makes the model at hand; 0 where it says none.

    Example:
        >>> from upweight.retraining.optimisers import SGD
        >>> seed_of(Training(epochs=1, batch_size=4, optimiser=SGD(0.1), seed=3)), seed_of(Refit())
        (3, 0)
    """
    return how.seed if isinstance(how, (Training, Own)) else 0


def _run(risk: Risk, asked: Asked, how: How) -> Run:
    if isinstance(how, Training):
        return ByRecipe(risk, asked, how)
    if isinstance(how, Refit):
        return ByRefit(risk, asked, how)
    return ByFunction(asked, how if isinstance(how, Own) else Own(how))


def _check_labels(risk: Risk, new: Relabels) -> None:
    """Ask the loss whether it knows the new labels, before anything is trained."""
    objective = risk.objective
    for rows in torch.arange(len(new.trial)).split(ROWS):
        batch = objective.place(risk.data.at(torch.from_numpy(new.position)[rows]))
        if not isinstance(batch.targets, Tensor):
            raise InputError("New labels take targets of one tensor, a row for each example.")
        labels = new.like(batch.targets)
        with torch.no_grad():
            outputs = objective.outputs(objective.space.values(), batch)
        objective.loss.check(outputs, labels[rows.to(labels.device)])


def _identity(objective: Objective, data: Data, queries: Data, run: Run) -> str:
    """Hash of everything that outcomes rest on, but for the trials."""
    asked = (objective.loss, objective.l2, objective.removal, objective.measure)
    form = (form_of(objective.model), objective.space.shapes, objective.precision)
    return fingerprint((form, asked, data.fingerprint(), queries.fingerprint(), run.identity()))


def retrain(
    risk: Risk,
    queries: Data,
    trials: Trials,
    how: How,
    path: str | os.PathLike[str] | None = None,
) -> Truth:
    """Train a model for every trial, and for all of the data with every seed.

    Args:
        risk: objective and data.
        queries: whose measure is asked of every model.
        trials: what to leave out or relabel, and with which seeds.
        how: a Training; ``Refit()`` for convex objectives; or your own function (kept positions
            ``[n]``, seed) -> model, or an ``Own`` that says more about it.
        path: a directory that keeps every outcome as soon as it is there. A run that was stopped
            goes on from it, and one with other trials takes from it what it has. One run at a time.

    Raises:
        InputError: the trials are of other data, or have labels that the loss does not know.
        NumericalError: training on all of the data failed, so that nothing can be compared.
        StoreError: the directory is of another model, data, queries or recipe, or in use.

    Example:
        >>> import torch, upweight as uw
        >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
        >>> objective = uw.Objective(torch.nn.Linear(3, 2), "cross_entropy", l2=0.1)
        >>> risk, queries = uw.Risk(objective, uw.Data.of((x, y))), uw.Data.of((x[:2], y[:2]))
        >>> trials = Trials.without([[0], [1]], 20, seeds=[0])
        >>> retrain(risk, queries, trials, Training(2, 5, uw.SGD(0.1))).changes().shape
        (2, 2)
    """
    if trials.gone.shape[1] != len(risk.data):
        raise InputError(
            f"The trials are of {trials.gone.shape[1]} examples, the training data has "
            f"{len(risk.data)}. Make them with examples=len(data)."
        )
    if trials.relabels is not None:
        _check_labels(risk, trials.relabels)
    objective, asked = risk.objective, Asked(risk.objective, queries)
    run, seeds, at_hand = _run(risk, asked, how), np.unique(trials.seeds), asked.of(objective.model)
    everything = Trials.whole(len(risk.data), seeds.tolist()).then(trials)
    keys = everything.keys().tolist()
    identity = "" if path is None else _identity(objective, risk.data, queries, run)
    with Journal(path, identity, len(queries)) as journal:
        # Outcomes of a recipe serve any model of this form, but how far they are from it does not.
        ours = journal.claimed(fingerprint(dict(objective.space.values())))
        failures = _fill(journal, run, (everything, keys), np.isfinite(at_hand))
        notes = journal.notes(keys)
    blank = np.full(len(queries) + 1, np.nan)
    rows, count = np.stack([journal.known.get(key, blank) for key in keys]), len(seeds)
    lost = [failures[number] for number in range(count) if number in failures]
    if lost:
        raise NumericalError(
            f"Training on all of the data failed, so that no change can be measured: {lost[0]}"
        )
    return Truth(
        trials=trials,
        query_ids=queries.ids,
        measured=rows[count:, :-1],
        whole=rows[:count, :-1],
        seeds=seeds,
        meaning=meaning_of(objective, objective.measure),
        how=run.words,
        failures={number - count: said for number, said in failures.items()},
        own=run.own,
        at_hand=at_hand,
        drift=rows[:count, -1] if ours else np.full(count, np.nan),
        notes=notes,
    )


def _fill(
    journal: Journal, run: Run, asked: tuple[Trials, list[str]], known: np.ndarray
) -> dict[int, str]:
    """Run the trials that are not in the journal, each once; what failed, and why.

    Args:
        journal: of the outcomes.
        run: how.
        asked: trials and their keys.
        known: which queries ``[q]`` have a measure under the model at hand.
    """
    trials, keys = asked
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    failed: dict[str, str] = {}
    journal.expect(list(dict.fromkeys(keys)))
    # What was asked for together is run together, so that a killed run ends as it would have.
    for time, batch in journal.unfinished(list(first)).items():
        numbers = np.array([first[key] for key in batch])
        wanted = np.array([place for place, key in enumerate(batch) if key not in journal.known])
        some = trials.take(numbers)
        plan = run.plan(some, journal.plan(time))
        said = run.notes
        journal.note(time, plan)
        for outcome in run.outcomes(some, wanted, plan):
            key = batch[outcome.number]
            if outcome.measured is None:
                failed[key] = outcome.failure or "no outcome"
            elif not np.isfinite(outcome.measured[known]).all():
                failed[key] = "the measures are not finite: the training diverged"
            elif key not in journal.known:
                journal.put(key, outcome.measured, outcome.moved)
            if run.notes != said:
                said = run.notes
                journal.note(time, plan, said)
        journal.note(time, plan, run.notes)
    return {number: failed[key] for number, key in enumerate(keys) if key in failed}
