"""The curvature a name stands for, in closed form where the model has one."""

from collections.abc import Callable

import torch

from upweight.curvature.kronecker import EKFAC, KFAC
from upweight.curvature.linear import LinearCurvature
from upweight.curvature.moments import Axes, Gradient, Reduce
from upweight.curvature.products import EmpiricalFisher, Fisher, GaussNewton, Hessian
from upweight.curvature.ridge import ridge
from upweight.curvature.slopes import Labels
from upweight.errors import InputError
from upweight.gradients import last_linear
from upweight.linalg import Operator
from upweight.risk import Risk

__all__ = ["CURVATURES", "Fit", "curvature", "kronecker_fit"]

Fit = Callable[[Risk], Operator]


CURVATURES: dict[str, Fit] = {
    "hessian": Hessian,
    "ggn": GaussNewton,
    "fisher": Fisher,
    "empirical_fisher": EmpiricalFisher,
    "l2": ridge,
    "ekfac": EKFAC(rows="auto"),
    "kfac": KFAC(rows="auto"),
    "kfac_reduce": KFAC(Reduce, rows="auto"),
    "eshampoo": EKFAC(Gradient, rows="auto"),
    "diagonal": EKFAC(Axes),
    "empirical_ekfac": EKFAC(slopes=Labels()),
}


def kronecker_fit(name: str | Fit) -> KFAC | EKFAC:
    """The Kronecker-factored fit that a name stands for, or that is given.

    Raises:
        InputError: it is another curvature, which has no spectral inverse.
    """
    fit = CURVATURES.get(name) if isinstance(name, str) else name
    if not isinstance(fit, (KFAC, EKFAC)):
        raise InputError(f"{name!r} is no Kronecker-factored curvature. Use 'ekfac' or EKFAC(...).")
    return fit


def curvature(name: str | Fit, risk: Risk) -> Operator:
    """The curvature of a risk by name, or by a function that fits one.

    For a model that is linear in its parameters the Hessian and the GGN are one matrix, taken in
    closed form.

    Raises:
        InputError: the name is unknown.

    Example:
        >>> from torch import nn
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.eye(3), torch.tensor([0, 1, 1])))
        >>> risk = Risk(Objective(nn.Linear(3, 2), "cross_entropy"), data)
        >>> type(curvature("ggn", risk)).__name__
        'LinearCurvature'
    """
    if callable(name):
        return name(risk)
    if name not in CURVATURES:
        raise InputError(f"The curvature {name!r} is unknown. Known: {', '.join(CURVATURES)}.")
    if name in ("hessian", "ggn"):
        batch, _ = risk.at(torch.tensor([0], device="cpu"))
        form = last_linear(risk.objective, batch)
        if form is not None and LinearCurvature.fits(risk, form):
            return LinearCurvature(risk, form)
    return CURVATURES[name](risk)
