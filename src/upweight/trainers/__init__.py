"""Is the objective the loss a user trained with? Both on the same rows, and why they differ."""

from upweight.trainers.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
