"""The task "mlp": MNIST, two hidden layers, 100 queries x 6,000 examples."""

from functools import partial

import torch
from torch import nn

from benchmarks.datasets import digits
from benchmarks.networks import Recipe
from benchmarks.reference import Plan

TITLE = "MNIST perceptron, scores of 100 queries against 6,000 training examples"
ABOUT = {
    "objective": "mean cross-entropy + 0.0005 ||theta||^2",
    "network": "784-256-128-10, ReLU; SGD 0.05, momentum 0.9, batches of 64, 10 epochs",
    "examples": 6_000,
    "parameters": 235_146,
    "queries": 100,
    "score": "(1/n) grad loss(q) . (G + 0.001 I)^-1 . grad loss(i), G the Gauss-Newton matrix",
}


def build() -> nn.Sequential:
    """The untrained network."""
    return nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


RECIPE = Recipe(
    data=partial(digits, "mnist", 6_000, (784,)),
    build=build,
    optimiser=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    l2=1e-3,
    epochs=10,
    batch=64,
    queries=10,
    exact=Plan(dtype=torch.float64, batch=1000),
)
prepare, load = RECIPE.prepare, RECIPE.load
truth, convergence = RECIPE.truth, RECIPE.convergence
