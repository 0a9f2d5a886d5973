"""Models whose training was stopped early, one Newton step from there, and descent that goes on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import upweight as uw
from reproduce.datasets import ones_and_sevens
from upweight.bars import track
from upweight.curvature import curvature
from upweight.gradients import stacked_gradient, stacked_measure

__all__ = ["Case", "Stopped", "after_descent", "descend", "newton", "stop"]

# Weights of N at ±1 and ±2 small steps: its derivative up to the fourth order of the step.
STENCIL = ((1, 8 / 12), (-1, -8 / 12), (2, -1 / 12), (-2, 1 / 12))


@dataclass(frozen=True)
class Stopped:
    """A model, its data and when training stops.

    ``every`` thins images, ``pool`` averages pixels in squares; damping is of the Newton step.
    """

    hidden: int
    every: int
    pool: int
    l2: float
    rate: float
    damping: float
    steps: int = 300
    others: tuple[int, ...] = (30, 2000)


@dataclass(frozen=True)
class Case:
    """A stopped model: objective with its training data, queries, removed positions."""

    risk: uw.Risk
    queries: uw.Data
    gone: np.ndarray
    stopped: Stopped

    def influence(self, method: object = "exact", damping: float = 0.0) -> uw.Influence:
        """At the stopped weights."""
        objective, data = self.risk.objective, self.risk.data
        return uw.Influence(objective, data, method=method, damping=damping)

    def losses(self, rows: Tensor) -> np.ndarray:
        """Losses of the queries at parameter rows ``[m, p]``, ``[q, m]``."""
        objective = self.risk.objective
        batch = objective.place(self.queries.rows())
        return stacked_measure(objective, batch, rows, "loss").T.numpy()

    def slopes(self, row: Tensor) -> Tensor:
        """Gradients of the queries' losses at a parameter row, ``[q, p]``."""
        objective, batch = self.risk.objective, self.queries.rows()
        losses = lambda at: objective.losses(objective.space.unflatten(at), batch)  # noqa: E731
        return torch.func.jacrev(losses)(row)  # type: ignore[no-any-return]

    def derivatives(self, position: int) -> tuple[Tensor, Tensor]:
        """∇ℓ̃ ``[p]`` and ∇²ℓ̃ ``[p, p]`` of one example: those of a risk over it alone."""
        alone = uw.Risk(self.risk.objective, self.risk.data.take(torch.tensor([position])))
        return alone.gradient().detach(), curvature("hessian", alone).to_dense()


def _rows(images: np.ndarray, labels: np.ndarray, pool: int) -> tuple[Tensor, Tensor]:
    side = 28 // pool
    x = torch.from_numpy(images).double().reshape(-1, side, pool, side, pool).mean((2, 4))
    return x.flatten(1), torch.from_numpy((labels > 0).astype(float))[:, None]


def stop(stopped: Stopped, steps: int, counts: tuple[int, int], seed: int = 0) -> Case:
    """Gradient descent from a seeded start, ended after some steps.

    Args:
        stopped: the model and its data.
        steps: of descent.
        counts: removals, half of the largest losses and half random, and queries, drawn from the
            hardest tenth of the test images.
        seed: of the start and the draws.
    """
    removals, queries = counts
    digits = ones_and_sevens()
    cut = slice(None, None, stopped.every)
    train = _rows(digits.train_x[cut], digits.train_y[cut], stopped.pool)
    test = _rows(digits.test_x, digits.test_y, stopped.pool)
    torch.manual_seed(seed)
    width = train[0].shape[1]
    model: nn.Module = nn.Linear(width, 1, bias=False)
    if stopped.hidden:
        layers = nn.Linear(width, stopped.hidden), nn.Tanh(), nn.Linear(stopped.hidden, 1)
        model = nn.Sequential(*layers)
    model, loss = model.double(), uw.BinaryCrossEntropy()
    # torch's decay adds l2 θ to the gradient, which is the objective's ½ l2 ‖θ‖².
    descent = torch.optim.SGD(model.parameters(), lr=stopped.rate, weight_decay=stopped.l2)
    for _ in range(steps):
        descent.zero_grad()
        loss(model(train[0]), train[1]).mean().backward()
        descent.step()
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        hard = loss(model(test[0]), test[1]).argsort(descending=True)[: len(test[0]) // 10]
        worst = loss(model(train[0]), train[1]).argsort(descending=True).numpy()
    asked = torch.from_numpy(generator.permutation(hard.numpy())[:queries])
    half = removals // 2
    gone = np.concatenate([worst[:half], generator.permutation(worst[half:])[:half]])
    risk = uw.Risk(uw.Objective(model, loss, l2=stopped.l2), uw.Data.of(train))
    return Case(risk, uw.Data.of((test[0][asked], test[1][asked])), gone, stopped)


def newton(case: Case, epsilon: float, removals: np.ndarray) -> dict[str, Any]:
    """The three terms of N(ε), its derivative by differences, and N(−1/n), per example.

    All at the stopped weights, for each removed example.
    """
    risk, n = case.risk, len(case.risk.data)
    damped = curvature("hessian", risk).to_dense()
    lowest = float(torch.linalg.eigvalsh(damped)[0])
    damped.diagonal().add_(case.stopped.damping)
    factor, g = torch.linalg.cholesky(damped), risk.gradient().detach()
    solve = lambda b: torch.cholesky_solve(b[:, None], factor)[:, 0]  # noqa: E731
    constant = -solve(g)
    upweight, third, errors, moved = [], [], [], []
    for position in track(removals, "Newton steps", len(removals)):
        slope, bend = case.derivatives(int(position))

        def step(eps: float, slope: Tensor = slope, bend: Tensor = bend) -> Tensor:
            return -torch.linalg.solve(damped + eps * bend, g + eps * slope)

        upweight.append(-solve(slope))
        third.append(-solve(bend @ constant))
        measured = sum(weight * step(k * epsilon) for k, weight in STENCIL) / epsilon
        formula = upweight[-1] + third[-1]
        errors.append(float((measured - formula).norm() / formula.norm()))
        moved.append(step(-1 / n))
    return {
        "constant": constant, "upweight": torch.stack(upweight), "third": torch.stack(third),
        "moved": torch.stack(moved), "error": max(errors), "gradient_norm": float(g.norm()),
        "lowest": lowest,
    }  # fmt: skip


def after_descent(case: Case) -> Tensor:
    """What k steps of descent put in place of H⁻¹, ``[p, p]``: (1 − (1 − ηh)^k)/h on eigenvalues h.

    With a gradient that changes by a constant c, descent on a quadratic moves by −c times this.
    """
    h, basis = torch.linalg.eigh(curvature("hessian", case.risk).to_dense())
    rate, steps = case.stopped.rate, case.stopped.steps
    return (basis * ((1 - (1 - rate * h) ** steps) / h)) @ basis.T


def descend(case: Case) -> Tensor:
    """Weights after as many further steps of gradient descent as before, ``[1 + m, p]``.

    First with all examples, then without each of the removed.
    """
    risk, stopped = case.risk, case.stopped
    n, m = len(risk.data), len(case.gone)
    rows = risk.objective.space.row().repeat(1 + m, 1)
    shares = torch.full((1 + m, n), 1 / (n - 1), dtype=rows.dtype)
    shares[0] = 1 / n
    shares[torch.arange(1, 1 + m), torch.from_numpy(case.gone)] = 0
    batch, _ = next(iter(risk.batches(n)))
    for _ in track(range(stopped.steps), "descent", stopped.steps):
        slope = stacked_gradient(risk.objective, batch, rows, shares)
        rows = rows - stopped.rate * (slope.detach() + stopped.l2 * rows)
    return rows
