"""The task "cnn": Fashion-MNIST, two convolutions, 100 queries x 5,000 examples."""

from functools import partial

import torch
from torch import nn

from benchmarks.datasets import digits
from benchmarks.networks import Recipe
from benchmarks.reference import Plan

TITLE = "Fashion-MNIST convolutional network, scores of 100 queries against 5,000 examples"
ABOUT = {
    "objective": "mean cross-entropy + 0.0005 ||theta||^2",
    "network": "conv 16 - pool - conv 32 - pool - 1568-64-10, ReLU; SGD 0.05, momentum 0.9, "
    "batches of 64, 10 epochs",
    "examples": 5_000,
    "parameters": 105_866,
    "queries": 100,
    "damping": "0.01 with the L2, as Koh & Liang (2017, 4.2) for a network not at a minimum",
    "score": "(1/n) grad loss(q) . (G + 0.01 I)^-1 . grad loss(i), G the Gauss-Newton matrix",
}


def build() -> nn.Sequential:
    """The untrained network."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


RECIPE = Recipe(
    data=partial(digits, "fashion-mnist", 5_000, (1, 28, 28)),
    build=build,
    optimiser=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    l2=1e-3,
    damping=1e-2,
    epochs=10,
    batch=64,
    queries=10,
    exact=Plan(dtype=torch.float32, batch=50),
)
prepare, load = RECIPE.prepare, RECIPE.load
truth, convergence = RECIPE.truth, RECIPE.convergence
