"""The task "resnet9": CIFAR-10, a ResNet-9 of a quarter of the usual width, 100 queries x 5,000."""

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.datasets import cifar
from benchmarks.networks import Recipe
from benchmarks.reference import Plan

TITLE = "CIFAR-10 ResNet-9, scores of 100 queries against 5,000 training examples"
ABOUT = {
    "objective": "mean cross-entropy + 0.0005 ||theta||^2",
    "network": "ResNet-9, widths 16 to 64, batch norm in evaluation mode; SGD 0.05, momentum 0.9, "
    "batches of 64, 10 epochs",
    "examples": 5_000,
    "parameters": 153_882,
    "queries": 100,
    "damping": "0.01 with the L2, as Koh & Liang (2017, 4.2) for a network not at a minimum",
    "score": "(1/n) grad loss(q) . (G + 0.01 I)^-1 . grad loss(i), G the Gauss-Newton matrix",
}


def conv(narrow: int, wide: int, *, pool: bool = False) -> nn.Sequential:
    """Convolution, norm, ReLU, and perhaps a pool."""
    layers = [nn.Conv2d(narrow, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class Residual(nn.Module):
    """Two convolutions with a shortcut around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(conv(width, width), conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c, h, w]`` to the same."""
        return x + self.inner(x)


def build() -> nn.Sequential:
    """The untrained network."""
    return nn.Sequential(
        *(conv(3, 16), conv(16, 32, pool=True), Residual(32)),
        *(conv(32, 64, pool=True), conv(64, 64, pool=True), Residual(64)),
        *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


RECIPE = Recipe(
    data=partial(cifar, 5_000),
    build=build,
    optimiser=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    l2=1e-3,
    damping=1e-2,
    epochs=10,
    batch=64,
    queries=4,
    exact=Plan(dtype=torch.float32, batch=100, together=4),
)
prepare, load = RECIPE.prepare, RECIPE.load
truth, convergence = RECIPE.truth, RECIPE.convergence
