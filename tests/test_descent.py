"""Many minimisations at once: quadratics in few steps, logistic refits to the last digit."""

import pytest
import torch

from upweight.evaluation.descent import descend
from upweight.linalg import Cholesky, Dense


@pytest.fixture
def task():
    """Logistic regressions that differ in their labels, with one inverse Hessian for all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator).double()
    signs = torch.randn(5, 60, generator=generator).sign().double()

    def slope(rows, which):
        z = signs[which] * (rows @ x.T)
        return -(signs[which] * torch.sigmoid(-z)) @ x / 60 + 0.05 * rows

    hessian = 0.25 * x.T @ x / 60 + 0.05 * torch.eye(4).double()
    return slope, Cholesky().init(Dense(hessian))


def test_every_gradient_reaches_its_goal(task):
    slope, inverse = task
    goal = torch.tensor([1e-12, 1e-3, 1e-12, 1e-12, 1e-6]).double()
    found = descend(slope, inverse, torch.zeros(5, 4).double(), goal=goal, max_steps=50)
    assert (found.slope <= goal).all()
    torch.testing.assert_close(slope(found.rows, torch.arange(5)).norm(dim=1), found.slope)
    assert found.steps < 15


def test_one_model_is_not_changed_by_the_others(task):
    slope, inverse = task
    goal = torch.full((5,), 1e-13).double()
    together = descend(slope, inverse, torch.zeros(5, 4).double(), goal=goal, max_steps=50)
    for i in range(5):
        alone = descend(
            lambda rows, which, i=i: slope(rows, which + i),
            inverse,
            torch.zeros(1, 4).double(),
            goal=goal[:1],
            max_steps=50,
        )
        torch.testing.assert_close(alone.rows[0], together.rows[i], rtol=1e-10, atol=1e-12)


def test_a_bad_inverse_is_survived_by_shorter_steps(task):
    """B₀ a hundred times too large: full steps overshoot, halved ones do not."""
    slope, _ = task
    wild = Cholesky().init(Dense(1e-2 * torch.eye(4).double()))
    goal = torch.full((5,), 1e-10).double()
    found = descend(slope, wild, torch.zeros(5, 4).double(), goal=goal, max_steps=200)
    assert (found.slope <= goal).all()


def test_known_gradients_save_one_evaluation(task):
    slope, inverse = task
    calls = []

    def counted(rows, which):
        calls.append(len(which))
        return slope(rows, which)

    start, goal = torch.zeros(5, 4).double(), torch.full((5,), 1e-8).double()
    first = descend(counted, inverse, start, goal=goal, max_steps=50)
    count = len(calls)
    known = slope(start, torch.arange(5))
    second = descend(counted, inverse, start, goal=goal, max_steps=50, known=known)
    assert len(calls) == 2 * count - 1
    assert torch.equal(first.rows, second.rows)
