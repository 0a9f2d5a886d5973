"""Per-example losses and the names they go by."""

from upweight.losses.base import CustomLoss, Loss, OutputLoss
from upweight.losses.cross_entropy import CrossEntropy
from upweight.losses.elementwise import BinaryCrossEntropy, Hinge, MeanSquaredError, SmoothHinge
from upweight.losses.names import NAMES, resolve

__all__ = [
    "NAMES",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "CustomLoss",
    "Hinge",
    "Loss",
    "MeanSquaredError",
    "OutputLoss",
    "SmoothHinge",
    "resolve",
]
