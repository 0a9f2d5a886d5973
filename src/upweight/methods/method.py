"""What a row of the table is: curvature x inverse x gradients, or a baseline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from upweight.curvature import Fit, curvature
from upweight.data import Batch, Data
from upweight.engine import Rescaling
from upweight.errors import InputError
from upweight.gradients import Compression
from upweight.linalg import (
    Cost,
    Identity,
    Inverse,
    Load,
    Operator,
    Solution,
    Solver,
    Status,
)
from upweight.neighbours import Likeness
from upweight.objective import Measure, Objective
from upweight.risk import Risk

__all__ = ["Baseline", "GivenInverse", "Method"]


@final
@dataclass(frozen=True)
class Method:
    """How queries are preconditioned and training gradients weighed.

    Attributes:
        name: as in tables and on the command line.
        summary: one line for a person.
        curvature: a name in ``CURVATURES``, or a function that fits one to a Risk.
        solver: how the curvature is inverted; None for the identity in place of H⁻¹.
        rescale: from the inverse and the training data, factors on each training gradient; scores
            then rank, and no longer predict a change.
        per: what the scores are divided by so, in words or as a formula.
        part: names of the parameters that are looked at, from the objective and an example; all of
            them by default.
        compression: from the curvature, what is kept of training gradients in their place; all of
            them by default.
        assumes: what must hold for its scores to be right, in one line.
        when: who should use it, in one line.
        cost: passes over the data and memory before the pass that scores, in one line.

    Example:
        >>> from upweight import CG
        >>> Method("my cg", "tight tolerance", solver=CG(rtol=1e-10)).curvature
        'hessian'
    """

    name: str
    summary: str
    curvature: str | Fit = "hessian"
    solver: Solver | None = None
    rescale: Rescaling | None = None
    per: str = ""
    part: Callable[[Objective, Batch], Sequence[str]] | None = None
    compression: Callable[[Operator], Compression | None] | None = None
    assumes: str = ""
    when: str = ""
    cost: str = ""

    def looks_at(self, objective: Objective, data: Data) -> Objective:
        """The objective as a function of the parameters that the method looks at."""
        if self.part is None:
            return objective
        one = objective.place(data.rows(0, 1))
        return objective.of_part(self.part(objective, one))

    @property
    def fits(self) -> bool:
        """Whether it makes a curvature of given data, and is not an identity or a ready inverse."""
        return self.solver is not None and not isinstance(self.solver, GivenInverse)

    def require_fit(self) -> "Method":
        """The method itself, if it makes a curvature of given data.

        Raises:
            InputError: it does not.
        """
        if not self.fits:
            raise InputError(
                f"{self.name!r} makes no curvature of the remaining data. Use 'exact' or 'cg', or "
                "whatif(remove=...) for first order."
            )
        return self

    def fit(self, risk: Risk) -> Operator:
        """The curvature over the data of a risk, with its L2; the identity where there is none."""
        if self.solver is None:
            space = risk.objective.space
            return Identity(space.size, space.dtype, space.device)
        return curvature(self.curvature, risk)

    def invert(self, operator: Operator, damping: float) -> Inverse:
        """(H + damping)⁻¹ of a fitted curvature, or the identity.

        Raises:
            InputError: damping is asked of a method that has no curvature to add it to.
        """
        if damping and not self.fits:
            raise InputError(
                f"The method {self.name!r} has no curvature of its own, so damping={damping:g} "
                "would be ignored. Leave it out, or put it into the inverse you pass."
            )
        if self.solver is None:
            return _Given(operator.apply, operator)
        return self.solver.init(operator + damping)


@final
@dataclass(frozen=True)
class Baseline:
    """A similarity or a ranking, of no predicted effect: what influence is to be compared with.

    Attributes:
        name: as in tables and on the command line.
        summary: one line for a person.
        quantity: what its values are, as a name of a column.
        unit: of its values.
        likeness: (training data, queries, measure) -> (training batch -> ``[q, b]``), larger =
            first; what depends on queries and on all of the data is done once.
        assumes: what must hold for it to mean anything, in one line.
        when: who should use it, in one line.
        cost: passes over the data and memory, in one line.

    Example:
        >>> def shorter(risk, queries, measure):
        ...     return lambda batch: -batch.inputs[0].norm(dim=1).expand(len(queries), -1)
        >>> Baseline("length", "minus the input's length", "length", "input", shorter).unit
        'input'
    """

    name: str
    summary: str
    quantity: str
    unit: str
    likeness: Callable[[Risk, Data, Measure], Likeness]
    assumes: str = ""
    when: str = ""
    cost: str = ""


@final
class _Given(Inverse):
    """An inverse that somebody else made: any object with ``@`` on columns ``[p, m]``."""

    def __init__(self, product: Callable[[Tensor], Tensor], like: Operator) -> None:
        self.product = product
        self.size, self.dtype, self.device = like.size, like.dtype, like.device

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """The product; its residual is unknown."""
        unknown = torch.full((len(rows),), torch.nan, dtype=rows.dtype, device=rows.device)
        return Solution(self.product(rows), unknown, (Status.CONVERGED,) * len(rows))


@final
@dataclass(frozen=True)
class GivenInverse(Solver):
    """A ready inverse curvature in place of a solver."""

    inverse: Any

    def cost(self, load: Load) -> Cost:
        """No products with a curvature: what it takes shows when it is asked."""
        del load
        return Cost()

    def init(self, operator: Operator) -> Inverse:
        """The given object, asked on columns as SciPy's and curvlinops' operators expect."""

        def product(rows: Tensor) -> Tensor:
            if isinstance(self.inverse, Operator):
                return self.inverse.apply(rows)
            # NumPy's and SciPy's operators take arrays, everybody else's take tensors.
            scipy = isinstance(self.inverse, np.ndarray) or hasattr(self.inverse, "matvec")
            columns = rows.T.cpu().numpy() if scipy else rows.T
            return torch.as_tensor(self.inverse @ columns).T.to(rows)

        return _Given(product, operator)
