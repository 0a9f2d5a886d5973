"""This library, any row of its method table on a network, as a user would ask for it."""

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from benchmarks.measure import Clock
from upweight import METHODS, Influence, Objective


def run(
    problem: Any,
    *,
    clock: Clock,
    method: str,
    damping: float | None = None,
    rtol: float | None = None,
    epochs: int | None = None,
    models: int = 1,
) -> np.ndarray:
    """Fit and score.

    Args:
        problem: the task.
        clock: begins when the model that is explained is there.
        method: a name in ``upweight.METHODS``.
        damping: λ in all, the task's L2 included; None for the L2 alone, and for what has no λ.
        rtol: where an iterative solver stops; None for its own.
        epochs: at the checkpoint after so many of the training; None for the end.
        models: trained with as many seeds; their scores are averaged, their training is timed.
    """
    asked: Any = METHODS[method]
    if rtol is not None:
        asked = replace(asked, solver=replace(asked.solver, rtol=rtol))
    beside = 0.0 if damping is None else max(0.0, damping - problem.l2)
    model = problem.model() if epochs is None else _again(problem, 0, epochs)
    clock.restart()
    total = _scores(problem, model, asked, beside)
    for seed in range(1, models):
        total = total + _scores(problem, _again(problem, seed, epochs), asked, beside)
    return total / models


def _again(problem: Any, seed: int, epochs: int | None) -> nn.Module:
    """Another run of the recipe, to the end or to a checkpoint."""
    model: nn.Module = replace(problem, weights=problem.again(seed, epochs)).model()
    return model


def _scores(problem: Any, model: nn.Module, method: Any, damping: float) -> np.ndarray:
    """Of one model."""
    # "sum": scores with the gradient of the loss alone, as the peers define theirs. Of subsets of
    # one size, "mean" ranks alike.
    objective = Objective(model, "cross_entropy", l2=problem.l2, removal="sum")
    data = (problem.inputs, problem.labels)
    influence = Influence(objective, data, method=method, damping=damping)
    return np.asarray(influence.explain((problem.query_inputs, problem.query_labels)))
