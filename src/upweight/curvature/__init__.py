"""Curvature: fitted over the data, represented as a linalg operator."""

from upweight.curvature.linear import LinearCurvature
from upweight.curvature.names import CURVATURES, curvature
from upweight.curvature.preconditioner import Sketch
from upweight.curvature.products import EmpiricalFisher, Fisher, GaussNewton, Hessian

__all__ = [
    "CURVATURES",
    "EmpiricalFisher",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "LinearCurvature",
    "Sketch",
    "curvature",
]
