"""Evidence: what really happens when examples are removed, and how well it was predicted."""

from upweight.evaluation.agreement import Agreement, agreement, pearson, pooled, slope
from upweight.evaluation.datamodeling import (
    DatamodelingScore,
    datamodeling_score,
    group_effects,
    outcomes,
)
from upweight.evaluation.detection import Detection, detection
from upweight.evaluation.ranks import correlations, midranks, rank_correlations
from upweight.evaluation.refit import Edit, Refits, refit
from upweight.evaluation.removal import (
    RemovalCurve,
    brittleness,
    own_changes,
    removal_curve,
    top_groups,
)
from upweight.evaluation.resampling import Estimate, Resamples, Sampled
from upweight.evaluation.similarity import (
    Similarity,
    Stability,
    similarity,
    stability,
    top_positions,
)

__all__ = [
    "Agreement",
    "DatamodelingScore",
    "Detection",
    "Edit",
    "Estimate",
    "Refits",
    "RemovalCurve",
    "Resamples",
    "Sampled",
    "Similarity",
    "Stability",
    "agreement",
    "brittleness",
    "correlations",
    "datamodeling_score",
    "detection",
    "group_effects",
    "midranks",
    "outcomes",
    "own_changes",
    "pearson",
    "pooled",
    "rank_correlations",
    "refit",
    "removal_curve",
    "similarity",
    "slope",
    "stability",
    "top_groups",
    "top_positions",
]
