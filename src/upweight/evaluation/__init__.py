"""Evidence: what really happens when examples are removed, and how well it was predicted."""

from upweight.evaluation.agreement import Agreement, agreement, pearson, slope
from upweight.evaluation.refit import Edit, Refits, refit

__all__ = ["Agreement", "Edit", "Refits", "agreement", "pearson", "refit", "slope"]
