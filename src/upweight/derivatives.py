"""First derivatives in training examples: of the parameters, and along the examples' inputs."""

from collections.abc import Sequence
from typing import Any

from upweight.answers import ParameterChange, Perturbation
from upweight.data import Data
from upweight.gradients import dense_gradients, mixed_derivative
from upweight.meaning import removal_gradient_row
from upweight.prepared import Prepared

__all__ = ["parameter_change", "perturbation"]


def parameter_change(made: Prepared, ids: Sequence[Any], *, accept: bool) -> ParameterChange:
    """Predicted change of the parameters if each of the examples is removed.

    Raises:
        DataError: an id is unknown.
        NotConvergedError, IndefiniteError: a solve failed.
    """
    positions = made.data.positions(ids)
    made.refuse_ablation()
    batch, share = made.risk.at(positions)
    rows = dense_gradients(made.objective, batch) + removal_gradient_row(made.objective)
    solution = made.inverse.solve(rows)
    value = solution.value if accept else solution.require()
    named = made.data.ids[positions.numpy()]
    return ParameterChange(named, -value, share, made.objective.space)


def perturbation(
    made: Prepared, queries: Data, ids: Sequence[Any], *, accept: bool
) -> Perturbation:
    """Predicted change of each query's measure per unit change of training inputs.

    Raises:
        DataError: an id is unknown.
        InputError: the inputs are integers.
    """
    positions = made.data.positions(ids)
    rows, _ = made.rows(queries, made.objective.measure, accept=accept)
    batch, share = made.risk.at(positions)
    mixed = mixed_derivative(made.objective, batch, rows)
    return Perturbation(queries.ids, made.data.ids[positions.numpy()], -mixed, share)
