"""Ground truth: models really trained again on changed data."""

from upweight.retraining.functions import Own
from upweight.retraining.optimisers import SGD, Adam, AdamW, Optimiser
from upweight.retraining.recipes import fit
from upweight.retraining.refits import Refit
from upweight.retraining.retrain import How, retrain, seed_of
from upweight.retraining.schedules import Constant, Cosine, Drops, Linear
from upweight.retraining.starts import Fresh, Trained
from upweight.retraining.training import Training, shuffled
from upweight.retraining.trials import Relabels, Trials
from upweight.retraining.truth import Truth

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Constant",
    "Cosine",
    "Drops",
    "Fresh",
    "How",
    "Linear",
    "Optimiser",
    "Own",
    "Refit",
    "Relabels",
    "Trained",
    "Training",
    "Trials",
    "Truth",
    "fit",
    "retrain",
    "seed_of",
    "shuffled",
]
