"""Linear support vector machines of the true hinge loss, and of smoothed ones, in float64."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.svm import LinearSVC

import upweight as uw

__all__ = ["LOOSE", "TIGHT", "Machine", "duality_gap", "smooth_minimum"]

# Tolerance and most iterations of liblinear: the paper's, and as tight as it gets.
LOOSE, TIGHT = (1e-6, 5_000), (1e-9, 1_000_000)


@dataclass(frozen=True)
class Machine:
    """Training rows and labels ±1, the query and its label."""

    x: np.ndarray
    y: np.ndarray
    asked: np.ndarray
    label: float
    l2: float

    def fit(
        self, seed: int, limits: tuple[float, int] = TIGHT, gone: int | None = None
    ) -> np.ndarray:
        """Weights ``[p]`` of the true hinge SVM, without one image if asked."""
        keep = np.arange(len(self.x)) != (-1 if gone is None else gone)
        svm = LinearSVC(
            loss="hinge", C=1 / (keep.sum() * self.l2), fit_intercept=False, random_state=seed,
            tol=limits[0], max_iter=limits[1],
        )  # fmt: skip
        return svm.fit(self.x[keep], self.y[keep]).coef_[0]

    def margins(self, weights: np.ndarray) -> np.ndarray:
        """Of the training rows, ``[n]``."""
        return self.y * (self.x @ weights)

    def loss(self, weights: np.ndarray) -> float:
        """True hinge loss of the query."""
        return max(0.0, 1 - self.label * float(self.asked @ weights))

    def influence(self, weights: np.ndarray, temperature: float) -> uw.Influence:
        """Influence at these weights under the smoothed hinge (the hinge itself at 0)."""
        model = torch.nn.Linear(len(weights), 1, bias=False).double()
        model.weight.data = torch.from_numpy(weights)[None].clone()
        loss = uw.SmoothHinge(temperature) if temperature else uw.Hinge()
        train = torch.from_numpy(self.x), torch.from_numpy(self.y)[:, None]
        return uw.Influence(model, train, loss=loss, l2=self.l2)

    def scores(self, weights: np.ndarray, temperature: float) -> np.ndarray:
        """Predicted change of the query's loss on removal, ``[n]``."""
        query = torch.from_numpy(self.asked)[None], torch.tensor([[self.label]]).double()
        return self.influence(weights, temperature).explain(query).values[0]


def duality_gap(task: Machine, weights: np.ndarray) -> float:
    """Primal minus dual objective: how far at most the weights are from the minimum.

    The dual point is 1 below the margin, 0 above, and on it what the weights say they are made of.
    """
    n, margins = len(task.x), task.margins(weights)
    signed = task.x * task.y[:, None]
    on = np.abs(margins - 1) < 1e-4
    below = ((margins < 1) & ~on).astype(float)
    rest = n * task.l2 * weights - below @ signed
    below[on] = np.linalg.lstsq(signed[on].T, rest, rcond=None)[0].clip(0, 1)
    dual_weights = below @ signed / (n * task.l2)
    primal = 0.5 * task.l2 * weights @ weights + np.maximum(0, 1 - margins).mean()
    return float(primal - below.mean() + 0.5 * task.l2 * dual_weights @ dual_weights)


def smooth_minimum(task: Machine, weights: np.ndarray, temperature: float) -> np.ndarray:
    """Weights of the smoothed SVM itself, by Newton's method with halved steps."""
    for _ in range(100):
        inf = task.influence(weights, temperature)
        slope = inf.risk.gradient()
        if slope.norm() < 1e-11:
            break
        step, size, value = inf.inverse.apply(slope[None])[0], 1.0, inf.risk.value()
        while size > 1e-6:
            there = weights - size * step.numpy()
            if task.influence(there, temperature).risk.value() <= value - 1e-4 * size * float(
                slope @ step
            ):
                break
            size /= 2
        weights = there
    return weights
