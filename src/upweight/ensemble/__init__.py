"""Several models of the same training data as one: means over seeds, sums over checkpoints."""

from upweight.ensemble.checkpoints import TracIn, tracin
from upweight.ensemble.combined import Combined
from upweight.ensemble.mean import Ensemble

__all__ = ["Combined", "Ensemble", "TracIn", "tracin"]
