"""Proof by removal: choose examples, really leave each out, compare."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import nn

from upweight.answers import Validation
from upweight.bars import track
from upweight.curvature import curvature
from upweight.data import Data
from upweight.errors import IndefiniteError, InputError, NotConvergedError
from upweight.evaluation import Agreement, Edit, agreement, refit
from upweight.linalg import Cholesky
from upweight.objective import Objective
from upweight.refusals import refuse_train_mode
from upweight.retraining.runs import Asked
from upweight.risk import Risk
from upweight.scores import Scores

__all__ = ["Removals", "by_refit", "by_retraining", "removals"]

MOST, DRAWN = "most influential", "random"


@final
@dataclass(frozen=True)
class Removals:
    """Examples to leave out one at a time.

    Attributes:
        positions: in the training data, ``[m]``.
        chosen: how each was chosen, ``[m]``.
    """

    positions: np.ndarray
    chosen: np.ndarray


def removals(scores: Scores, top: int, random: int, seed: int) -> Removals:
    """The largest scores (over the queries in turn) and a random draw from the rest.

    Selection by size leaves a gap around zero that flatters r, so the random ones are shown beside.

    Raises:
        InputError: more removals than examples, or fewer than three of a kind, or similarities.
    """
    if not scores.meaning.change:
        raise InputError("Similarities predict no change, so there is nothing to validate.")
    count = scores.shape[1]
    if top + random > count or min(top, random) < 0 or any(0 < k < 3 for k in (top, random)):
        raise InputError(
            f"Cannot remove {top} influential and {random} random of {count} examples. Ask for 0 "
            f"or at least 3 of each kind, {count} together at most."
        )
    ranked = np.argsort(-np.abs(scores.values), axis=1, kind="stable").T.ravel()
    _, first = np.unique(ranked, return_index=True)
    most = ranked[np.sort(first)][:top]
    rest = np.setdiff1d(np.arange(count), most)
    drawn = np.random.default_rng(seed).choice(rest, random, replace=False)
    return Removals(
        np.concatenate([most, drawn]), np.array([MOST] * len(most) + [DRAWN] * len(drawn))
    )


def _compare(
    queries: Data, scores: Scores, asked: Removals, actual: np.ndarray, truth: str
) -> Validation:
    predicted = scores.values[:, asked.positions].astype(np.float64)
    agreements = {
        kind: agreement(predicted[:, asked.chosen == kind], actual[:, asked.chosen == kind])
        for kind in (MOST, DRAWN)
        if (asked.chosen == kind).any()
    }
    if scores.meaning.per:
        agreements = {kind: _unsized(found) for kind, found in agreements.items()}
    return Validation(
        query_ids=queries.ids,
        removed=scores.train_ids[asked.positions],
        chosen=asked.chosen,
        predicted=predicted,
        actual=actual,
        agreements=agreements,
        meaning=scores.meaning,
        truth=truth,
    )


def _unsized(found: Agreement) -> Agreement:
    """Without the slope, which between two units says nothing."""
    return replace(found, slope=np.nan, slope_interval=(np.nan, np.nan))


def by_refit(risk: Risk, queries: Data, scores: Scores, asked: Removals) -> Validation:
    """Refit without each example from the present minimum, in float64, all at once.

    The baseline is a refit of the full objective, so that a model a little off its minimum does
    not shift the comparison.

    Raises:
        IndefiniteError, NotConvergedError: the model is not at a minimum.
    """
    twin = Risk(risk.objective.in_double(), risk.data)
    gone = [torch.tensor([], dtype=torch.long), *torch.from_numpy(asked.positions)[:, None]]
    try:
        inverse = Cholesky().init(curvature("hessian", twin))
        fits = refit(twin, inverse, [Edit(positions) for positions in gone])
    except IndefiniteError as error:
        raise IndefiniteError(_no_minimum(twin, "its Hessian is not positive definite")) from error
    except NotConvergedError as error:
        raise NotConvergedError(_no_minimum(twin, "refits do not converge")) from error
    if not bool(fits.met[0]):
        raise NotConvergedError(_no_minimum(twin, "a refit of all data does not converge"))
    measured = fits.measure(twin, queries, risk.objective.measure)
    met = fits.met[1:].cpu().numpy()
    actual = (measured[1:] - measured[0]).T.cpu().numpy()[:, met]
    truth = (
        f"leave-one-out refits to a gradient of {float(fits.slope[fits.met].max()):.0e} "
        f"({fits.steps} iterations, float64, warm start)"
    )
    if not met.all():
        truth += (
            f"; {int((~met).sum())} of {len(met)} left the minimum's basin and are not compared"
        )
    asked = Removals(asked.positions[met], asked.chosen[met])
    return _compare(queries, scores, asked, actual, truth)


def _no_minimum(risk: Risk, sign: str) -> str:
    """What to say where removals cannot be refitted from where the model stands."""
    return (
        "The model is at no minimum of its objective that removals can be refitted from: gradient "
        f"norm {float(risk.gradient().norm()):.1e}, and {sign} there, whatever curvature the "
        "scores are from. Train it to the end or state its l2; or have it trained again instead, "
        "by 'upweight validate RECIPE.py', or validate(queries, budget='10 min', how=training) or "
        "validate(queries, retrain=...) in Python."
    )


def _all_but(count: int, gone: int) -> np.ndarray:
    """Positions ``[count − 1]`` without one."""
    return np.delete(np.arange(count), gone)


def by_retraining(
    objective: Objective,
    queries: Data,
    scores: Scores,
    plan: tuple[Removals, Callable[[np.ndarray], nn.Module]],
) -> Validation:
    """Call the user's training function without each example, and once with all of them."""
    asked, retrain = plan
    count, known = scores.shape[1], Asked(objective, queries)

    def measure(model: nn.Module) -> np.ndarray:
        if not isinstance(model, nn.Module):
            raise InputError(f"retrain must return a torch.nn.Module, got {type(model).__name__}.")
        refuse_train_mode(model)
        # The whole model answers as it was returned, chosen parameters or not.
        return known.of(model)

    base = measure(retrain(np.arange(count)))
    changes = [
        measure(retrain(_all_but(count, gone))) - base
        for gone in track(asked.positions.tolist(), "retraining", len(asked.positions))
    ]
    truth = f"{len(changes)} retrainings by the given function"
    return _compare(queries, scores, asked, np.stack(changes, axis=1), truth)
