"""Curvature: fitted over the data, represented as a linalg operator."""

from upweight.curvature.kronecker import EKFAC, KFAC
from upweight.curvature.leading import Leading
from upweight.curvature.linear import LinearCurvature
from upweight.curvature.merging import merged
from upweight.curvature.moments import Axes, Expand, Gradient, Moments, Reduce
from upweight.curvature.names import CURVATURES, Fit, curvature, kronecker_fit
from upweight.curvature.preconditioner import FirstOf, Sketch
from upweight.curvature.products import EmpiricalFisher, Fisher, GaussNewton, Hessian
from upweight.curvature.ridge import ridge
from upweight.curvature.slopes import Columns, Draws, Labels, Slopes

__all__ = [
    "CURVATURES",
    "EKFAC",
    "KFAC",
    "Axes",
    "Columns",
    "Draws",
    "EmpiricalFisher",
    "Expand",
    "FirstOf",
    "Fisher",
    "Fit",
    "GaussNewton",
    "Gradient",
    "Hessian",
    "Labels",
    "Leading",
    "LinearCurvature",
    "Moments",
    "Reduce",
    "Sketch",
    "Slopes",
    "curvature",
    "kronecker_fit",
    "merged",
    "ridge",
]
