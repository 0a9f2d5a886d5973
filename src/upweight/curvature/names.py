"""The curvature a name stands for, in closed form where the model has one."""

from collections.abc import Callable

import torch

from upweight.curvature.linear import LinearCurvature
from upweight.curvature.products import EmpiricalFisher, Fisher, GaussNewton, Hessian
from upweight.errors import InputError
from upweight.gradients import linear_form
from upweight.linalg import MeanOperator
from upweight.risk import Risk

__all__ = ["CURVATURES", "curvature"]

CURVATURES: dict[str, Callable[[Risk], MeanOperator]] = {
    "hessian": Hessian,
    "ggn": GaussNewton,
    "fisher": Fisher,
    "empirical_fisher": EmpiricalFisher,
}


def curvature(name: str, risk: Risk) -> MeanOperator:
    """The curvature of a risk by name.

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
    if name not in CURVATURES:
        raise InputError(f"The curvature {name!r} is unknown. Known: {', '.join(CURVATURES)}.")
    if name in ("hessian", "ggn"):
        batch, _ = risk.at(torch.tensor([0], device="cpu"))
        form = linear_form(risk.objective, batch)
        if form is not None:
            return LinearCurvature(risk, form)
    return CURVATURES[name](risk)
