"""All rows by name, and what a user may pass in place of a name."""

from upweight.errors import InputError
from upweight.linalg import MeanOperator, Solver
from upweight.methods import baselines, kronecker, projected, solved
from upweight.methods.method import Baseline, GivenInverse, Method

__all__ = ["METHODS", "resolve_method"]

METHODS: dict[str, Method | Baseline] = {
    row.name: row for row in (*solved.ROWS, *kronecker.ROWS, *projected.ROWS, *baselines.ROWS)
}


def resolve_method(method: object) -> Method | Baseline:
    """A row of the table from its name, a row, a solver, or a ready inverse curvature.

    Raises:
        InputError: the name is unknown or the object has no ``@``.
    """
    if isinstance(method, (Method, Baseline)):
        return method
    if isinstance(method, str):
        if method not in METHODS:
            raise InputError(f"The method {method!r} is unknown. Known: {', '.join(METHODS)}.")
        return METHODS[method]
    if isinstance(method, Solver):
        return Method(type(method).__name__.lower(), "Hessian, given solver", solver=method)
    if isinstance(method, MeanOperator):
        raise InputError(
            f"{type(method).__name__} is a curvature, and method= takes an inverse. Pass a solver "
            "(uw.CG()), or solver.init(curvature)."
        )
    if hasattr(method, "__matmul__"):
        solver = GivenInverse(method)
        return Method(type(method).__name__, "given inverse curvature", solver=solver)
    raise InputError(
        f"method is a name ({', '.join(METHODS)}), a Method, a solver, or an inverse curvature "
        f"with @; got {type(method).__name__}."
    )
