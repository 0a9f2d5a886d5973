"""Ground truth: models really trained again on changed data."""

from upweight.retraining.trials import Trials
from upweight.retraining.truth import Truth

__all__ = ["Trials", "Truth"]
