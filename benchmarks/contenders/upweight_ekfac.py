"""This library on a network: EK-FAC or the Gauss-Newton matrix, damped as the task's score is."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.measure import Clock
from upweight import CG, Influence, Method, Objective
from upweight.curvature import Leading


def run(
    problem: Any,
    *,
    clock: Clock,
    calls: int = 1,
    rtol: float | None = None,
    layers: Sequence[str] = (),
) -> np.ndarray:
    """Fit and score as a user would.

    Args:
        problem: the task.
        clock: begins with the last of several calls.
        calls: with the same factors.
        rtol: where the Gauss-Newton matrix is solved instead, to this residual.
        layers: classes of modules whose parameters alone are looked at; of all by default.
    """
    method: Any = "ekfac"
    if rtol is not None:
        solver = CG(rtol=rtol, preconditioner=Leading())
        method = Method("ggn_cg", "", curvature="ggn", solver=solver)
    # "sum": scores with the gradient of the loss alone, as the peers define theirs.
    model = problem.model()
    chosen = [
        f"{name}.{part}"
        for name, module in model.named_modules()
        for part, _ in module.named_parameters(recurse=False)
        if type(module).__name__ in layers
    ]
    objective = Objective(
        model, "cross_entropy", l2=problem.l2, removal="sum", parameters=chosen or None
    )
    data, queries = (
        (problem.inputs, problem.labels),
        (problem.query_inputs, problem.query_labels),
    )
    influence = Influence(
        objective, data, method=method, damping=max(0.0, problem.damping - problem.l2)
    )
    for _ in range(calls - 1):
        influence.explain(queries)
        clock.restart()
    return np.asarray(influence.explain(queries))
