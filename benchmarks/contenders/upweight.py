"""This library, by the name of a method or with a solver's settings."""

from typing import Any

import numpy as np

from upweight import Influence, Objective
from upweight.curvature import Sketch
from upweight.solvers import CG


def run(
    problem: Any,
    *,
    method: str,
    rtol: float | None = None,
    sample: int | None = None,
    damping: float | None = None,
) -> np.ndarray:
    """Fit and score as a user would; with rtol, conjugate gradients stop there."""
    model = problem.model(problem.dtype)
    # "sum": scores with the gradient of the loss alone, as the peers define theirs.
    objective = Objective(model, "cross_entropy", l2=problem.l2, removal="sum")
    asked: Any = method
    if rtol is not None:
        asked = CG(rtol=rtol, preconditioner=Sketch() if sample is None else Sketch(sample))
    options: dict[str, Any] = {} if damping is None else {"damping": damping}
    data = (problem.inputs, problem.labels)
    influence = Influence(objective, data, method=asked, **options)
    return np.asarray(influence.explain((problem.query_inputs, problem.query_labels)))
