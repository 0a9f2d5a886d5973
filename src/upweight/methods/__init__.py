"""The table of methods: each is curvature x inverse x gradients, and one row."""

from upweight.methods.method import Baseline, GivenInverse, Method
from upweight.methods.table import METHODS, resolve_method

__all__ = ["METHODS", "Baseline", "GivenInverse", "Method", "resolve_method"]
