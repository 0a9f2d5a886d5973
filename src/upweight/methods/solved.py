"""Rows that solve with a curvature as it is: directly, by iterations, or by a random series."""

from upweight.curvature import FirstOf, Leading, Sketch
from upweight.gradients import last_layer
from upweight.linalg import CG, Cholesky
from upweight.methods.method import Method
from upweight.solvers import LiSSA
from upweight.weighing import without_loss

__all__ = ["ROWS"]

_CG = CG(preconditioner=FirstOf((Sketch(), Leading())))

ROWS = (
    Method("exact", "Hessian, Cholesky factorisation; small models", "hessian", Cholesky()),
    Method("cg", "Hessian, conjugate gradients; residual per query", "hessian", _CG),
    Method("lissa", "Hessian, the paper's stochastic series", "hessian", LiSSA()),
    Method("ggn", "Gauss-Newton, Cholesky; positive for any network", "ggn", Cholesky()),
    Method("ggn_cg", "Gauss-Newton, conjugate gradients", "ggn", _CG),
    Method("fisher", "true Fisher, Cholesky", "fisher", Cholesky()),
    Method("empirical_fisher", "empirical Fisher, Cholesky", "empirical_fisher", Cholesky()),
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
)
