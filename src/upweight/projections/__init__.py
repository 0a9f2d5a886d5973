"""Gradients projected to few numbers, curvature there, and its inverse brought back."""

from upweight.projections.entries import GaussianEntries, RademacherEntries, SparseEntries
from upweight.projections.kernel import ProjectedKernel
from upweight.projections.leading import LeadingDirections, LeadingEigenvalues
from upweight.projections.lowrank import LowRankKernel
from upweight.projections.operator import compression_of
from upweight.projections.sides import RandomSides
from upweight.projections.solver import Pulled

__all__ = [
    "GaussianEntries",
    "LeadingDirections",
    "LeadingEigenvalues",
    "LowRankKernel",
    "ProjectedKernel",
    "Pulled",
    "RademacherEntries",
    "RandomSides",
    "SparseEntries",
    "compression_of",
]
