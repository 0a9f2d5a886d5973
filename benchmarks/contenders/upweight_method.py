"""This library, any row of its method table on a network, as a user would ask for it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.measure import Clock
from upweight import METHODS, Ensemble, Influence, Objective
from upweight.curvature import EKFAC


def run(
    problem: Any,
    *,
    clock: Clock,
    method: str,
    damping: float | None = None,
    rtol: float | None = None,
    series: Sequence[int] = (),
    steps: int | None = None,
    epochs: Sequence[int] = (),
    models: int = 1,
    whole: bool = False,
) -> np.ndarray:
    """Fit and score, the mean over models where there are several.

    Args:
        problem: the task.
        clock: begins when the run that is explained is there, with its checkpoints.
        method: a name in ``upweight.METHODS``.
        damping: λ in all, the task's L2 included, or less than that; None for the L2 alone, and for
            what has no λ.
        rtol: where an iterative solver stops; None for its own.
        series: steps, repeats and batch of a random series; none for its own.
        steps: products of a Krylov space, of which half as many directions are kept; None for its
            own.
        epochs: at the checkpoints after so many of the training; at its end without any.
        whole: whether EK-FAC is fitted on all examples, and not on as many as its moments need.
        models: runs of the recipe, each with another seed; those beside the first are timed.
    """
    asked: Any = METHODS[method]
    if rtol is not None:
        asked = replace(asked, solver=replace(asked.solver, rtol=rtol))
    if series:
        depth, repeats, batch = series
        solver = replace(asked.solver, depth=depth, repeats=repeats, batch_size=batch)
        asked = replace(asked, solver=solver)
    if steps is not None:
        asked = replace(asked, solver=replace(asked.solver, rank=steps // 2, steps=steps))
    if whole:
        asked = replace(asked, curvature=EKFAC())
    ends = epochs or (None,)
    states = [problem.again(0, end) for end in ends] if epochs else [problem.weights]
    clock.restart()
    states += [problem.again(seed, end) for seed in range(1, models) for end in ends]
    # "sum": scores with the gradient of the loss alone, as the peers define theirs. Of subsets of
    # one size, "mean" ranks alike.
    model = replace(problem, weights=states[0]).model()
    l2 = problem.l2 if damping is None else min(problem.l2, damping)
    objective = Objective(model, "cross_entropy", l2=l2, removal="sum")
    influence = Influence(
        objective,
        (problem.inputs, problem.labels),
        method=asked,
        damping=0.0 if damping is None else damping - l2,
    )
    asker = influence if len(states) == 1 else Ensemble.of(influence, states)
    return np.asarray(asker.explain((problem.query_inputs, problem.query_labels)))
