"""Evidence from a budget: which models to train again, and what their outcomes allow."""

from upweight.evidence.gather import (
    MOST_REFIT_PARAMETERS,
    by_halves,
    gather,
    too_large_for_refits,
    trained_again,
)
from upweight.evidence.result import Evidence
from upweight.evidence.spending import kept_in, seconds_of, spoken

__all__ = [
    "MOST_REFIT_PARAMETERS",
    "Evidence",
    "by_halves",
    "gather",
    "kept_in",
    "seconds_of",
    "spoken",
    "too_large_for_refits",
    "trained_again",
]
