"""The demo: handwritten digits with some wrong labels, two models, and what caused what."""

from upweight.demo.digits import Split, pixels_and_labels, split
from upweight.demo.models import MODELS, Model, minimise, one_thread
from upweight.demo.studies import study

__all__ = [
    "MODELS",
    "Model",
    "Split",
    "minimise",
    "one_thread",
    "pixels_and_labels",
    "split",
    "study",
]
