"""This library, any row of its method table on a network, as a user would ask for it."""

from dataclasses import replace
from typing import Any

import numpy as np

from upweight import METHODS, Influence, Objective


def run(
    problem: Any, *, method: str, damping: float | None = None, rtol: float | None = None
) -> np.ndarray:
    """Fit and score.

    Args:
        problem: the task.
        method: a name in ``upweight.METHODS``.
        damping: λ in all, the task's L2 included; None for the L2 alone, and for what has no λ.
        rtol: where an iterative solver stops; None for its own.
    """
    asked: Any = METHODS[method]
    if rtol is not None:
        asked = replace(asked, solver=replace(asked.solver, rtol=rtol))
    # "sum": scores with the gradient of the loss alone, as the peers define theirs. Of subsets of
    # one size, "mean" ranks alike.
    objective = Objective(problem.model(), "cross_entropy", l2=problem.l2, removal="sum")
    beside = 0.0 if damping is None else max(0.0, damping - problem.l2)
    influence = Influence(objective, (problem.inputs, problem.labels), method=asked, damping=beside)
    return np.asarray(influence.explain((problem.query_inputs, problem.query_labels)))
