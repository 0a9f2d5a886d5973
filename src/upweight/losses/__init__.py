"""Per-example losses."""

from upweight.losses.base import CustomLoss, Loss, OutputLoss
from upweight.losses.cross_entropy import CrossEntropy
from upweight.losses.elementwise import BinaryCrossEntropy, Hinge, MeanSquaredError, SmoothHinge

__all__ = [
    "BinaryCrossEntropy",
    "CrossEntropy",
    "CustomLoss",
    "Hinge",
    "Loss",
    "MeanSquaredError",
    "OutputLoss",
    "SmoothHinge",
]
