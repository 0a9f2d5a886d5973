"""The table of methods: each is curvature x inverse x gradients, and one row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from upweight.bm25 import bm25
from upweight.curvature import FirstOf, Fit, Leading, Sketch, curvature
from upweight.data import Batch, Data
from upweight.engine import Rescaling
from upweight.errors import InputError
from upweight.gradients import last_layer
from upweight.linalg import (
    CG,
    Cholesky,
    Identity,
    Inverse,
    LiSSA,
    MeanOperator,
    Operator,
    Solution,
    Solver,
    Spectral,
    Status,
)
from upweight.neighbours import (
    Likeness,
    cosine,
    embedding,
    gradient_norm,
    negative_distance,
    negative_margin,
    random,
    training_loss,
)
from upweight.objective import Measure, Objective
from upweight.risk import Risk
from upweight.weighing import per_parameter_change, per_self_influence, without_loss

__all__ = ["METHODS", "Baseline", "Method", "resolve_method"]


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

    Example:
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

    def quadratic(self, rows: Tensor) -> Tensor:
        """B A⁻¹ b by the product."""
        return (rows * self.product(rows)).sum(1)


@final
@dataclass(frozen=True)
class GivenInverse(Solver):
    """A ready inverse curvature in place of a solver."""

    inverse: Any

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


_CG = CG(preconditioner=FirstOf((Sketch(), Leading())))

METHODS: dict[str, Method | Baseline] = {
    row.name: row
    for row in (
        Method("exact", "Hessian, Cholesky factorisation; small models", "hessian", Cholesky()),
        Method("cg", "Hessian, conjugate gradients; residual per query", "hessian", _CG),
        Method("lissa", "Hessian, the paper's stochastic series", "hessian", LiSSA()),
        Method("ggn", "Gauss-Newton, Cholesky; positive for any network", "ggn", Cholesky()),
        Method("ggn_cg", "Gauss-Newton, conjugate gradients", "ggn", _CG),
        Method("fisher", "true Fisher, Cholesky", "fisher", Cholesky()),
        Method("empirical_fisher", "empirical Fisher, Cholesky", "empirical_fisher", Cholesky()),
        Method("ekfac", "Gauss-Newton, eigenvalue-corrected K-FAC", "ekfac", Spectral()),
        Method("kfac", "Gauss-Newton, Kronecker factors", "kfac", Spectral()),
        Method("kfac_reduce", "the same, positions averaged", "kfac_reduce", Spectral()),
        Method("eshampoo", "Gauss-Newton, eigenvalue-corrected Shampoo", "eshampoo", Spectral()),
        Method("diagonal", "Gauss-Newton, its diagonal", "diagonal", Spectral()),
        Method(
            "empirical_ekfac", "empirical Fisher, corrected K-FAC", "empirical_ekfac", Spectral()
        ),
        Method(
            "last_layer",
            "Gauss-Newton of the last layer alone, Cholesky",
            "ggn",
            Cholesky(),
            part=last_layer,
        ),
        Method("no_hessian", "gradient dot product: identity for H⁻¹"),
        Method(
            "no_train_loss",
            "exact, each gradient divided by its misfit (ablation)",
            "hessian",
            Cholesky(),
            without_loss,
        ),
        Method("neither", "no Hessian and no train loss (ablation)", rescale=without_loss),
        Method(
            "relatif",
            "ekfac, per parameter change of each example: outliers no longer lead",
            "ekfac",
            Spectral(),
            per_parameter_change,
            "‖H⁻¹∇ℓ‖",
        ),
        Method(
            "l_relatif",
            "ekfac, per root of each example's self-influence",
            "ekfac",
            Spectral(),
            per_self_influence,
            "√(∇ℓH⁻¹∇ℓ)",
        ),
        Baseline("cosine", "cosine of gradients", "gradient_similarity", "cosine", cosine),
        Baseline(
            "embedding",
            "cosine of the last layer's inputs",
            "embedding_similarity",
            "cosine",
            embedding,
        ),
        Baseline(
            "euclidean",
            "minus the distance between inputs",
            "euclidean_similarity",
            "minus input distance",
            negative_distance,
        ),
        Baseline("bm25", "shared tokens, rare ones first", "bm25_similarity", "BM25", bm25),
        Baseline(
            "loss", "training loss, alike for all queries", "training_loss", "loss", training_loss
        ),
        Baseline(
            "gradient_norm",
            "length of training gradients, alike for all queries",
            "training_gradient_norm",
            "loss per parameter",
            gradient_norm,
        ),
        Baseline(
            "margin",
            "minus the training margin, alike for all queries",
            "minus_training_margin",
            "logits",
            negative_margin,
        ),
        Baseline("random", "random numbers, seeded", "random_number", "0 to 1", random),
    )
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
