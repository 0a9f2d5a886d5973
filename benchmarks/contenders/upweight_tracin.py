"""This library's TracIn over the checkpoints of the run that is explained."""

from typing import Any

import numpy as np

from benchmarks.measure import Clock
from upweight import Influence, Objective, tracin


def run(problem: Any, *, clock: Clock, epochs: tuple[int, ...], rates: tuple[float, ...]) -> Any:
    """Scores over checkpoints.

    Args:
        problem: the task.
        clock: begins when the checkpoints are there.
        epochs: of the checkpoints.
        rates: the sum of the step sizes that each stands for.
    """
    states = [problem.again(0, epoch) for epoch in epochs]
    clock.restart()
    objective = Objective(problem.model(), "cross_entropy", l2=problem.l2, removal="sum")
    data = (problem.inputs, problem.labels)
    influence = Influence(objective, data, method="no_hessian")
    asked = (problem.query_inputs, problem.query_labels)
    return np.asarray(tracin(influence, states, rates).explain(asked))
