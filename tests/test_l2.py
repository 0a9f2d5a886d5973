"""The derivative in the L2 strength against the naive file and finite differences of refits."""

import dataclasses

import numpy as np
import pytest
import torch

import upweight as uw
from tests.cases import CASES, LINEAR_CASES, as_reference
from tests.test_influence import fitted, front, measures
from upweight import errors, reference


@pytest.fixture(autouse=True)
def _plain_attention():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_blocks_are_the_reference_ones(case):
    risk = case.risk()
    problem, theta = as_reference(risk)
    queries, damping = risk.data.take(torch.tensor([2, 0, 5])), 20.0
    found = front(risk, damping=damping).l2_derivative(queries)
    matrix = reference.hessian(problem, theta) + damping * torch.eye(len(theta)).double()
    start = 0
    for b, shape in enumerate(risk.objective.space.shapes.values()):
        block = torch.zeros_like(theta)
        block[start : start + shape.numel()] = 1
        start += shape.numel()
        wanted = reference.l2_derivative(theta, matrix, block, measures(risk, queries))
        np.testing.assert_allclose(found.values[:, b], wanted.numpy(), rtol=1e-8, atol=1e-13)
    np.testing.assert_allclose(found.total, found.values.sum(1))


def refits(case, stated, mask, step) -> list[np.ndarray]:
    """The queries' losses at the minima of l2 + step and l2 − step on the masked parameters."""
    risk = fitted(case, l2=stated)
    problem, theta = as_reference(risk)
    asked = measures(risk, risk.data.take(torch.tensor([1, 3])))
    found = []
    for sign in (1, -1):
        moved = dataclasses.replace(problem, l2=problem.l2 + sign * step * mask)
        minimum = reference.train(moved, theta)
        found.append(np.array([float(ask(minimum)) for ask in asked]))
    return found


@pytest.mark.parametrize("name", ["softmax", "logistic", "softmax weighted", "ridge"])
@pytest.mark.parametrize("removal", ["mean", "sum"])
def test_finite_differences_of_real_refits(name, removal):
    """By value: each block and the total, whatever removal means."""
    case, step = next(c for c in LINEAR_CASES if c.name == name), 1e-5
    risk = fitted(case, l2=0.2, removal=removal)
    found = front(risk).l2_derivative(risk.data.take(torch.tensor([1, 3])))
    start = 0
    for b, shape in enumerate(risk.objective.space.shapes.values()):
        mask = torch.zeros_like(risk.objective.l2)
        mask[start : start + shape.numel()] = 1
        start += shape.numel()
        up, down = refits(case, 0.2, mask, step)
        numeric = (up - down) / (2 * step)
        np.testing.assert_allclose(found.values[:, b], numeric, rtol=1e-6, atol=1e-9)
    up, down = refits(case, 0.2, torch.ones_like(risk.objective.l2), step)
    np.testing.assert_allclose(found.total, (up - down) / (2 * step), rtol=1e-6, atol=1e-9)


def test_patterns_sum_their_blocks_and_unstated_blocks_stand_apart():
    case = next(c for c in CASES if c.name == "mlp")
    stated = {"0.*": 0.1, "2.weight": 0.3}
    risk = case.risk(l2=stated)
    found = front(risk, damping=5.0).l2_derivative(risk.data)
    assert found.blocks == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert found.patterns == ("0.*", "0.*", "2.weight", None)
    by_pattern = found.by_pattern()
    np.testing.assert_allclose(by_pattern["0.*"], found.values[:, :2].sum(1))
    np.testing.assert_allclose(by_pattern["2.weight"], found.values[:, 2])
    np.testing.assert_allclose(found.total, found.values[:, :3].sum(1))
    assert list(found.table().columns) == ["query", "total", *found.blocks]
    assert "nats per unit of l2" in repr(found)


def test_no_l2_at_all_has_a_derivative_at_zero():
    """Ridge without ridge: Λ = 0 is a point like any other."""
    x, y = torch.randn(20, 3).double(), torch.randn(20).double()
    share = torch.full((20,), 1 / 20, dtype=torch.float64)
    model = torch.nn.Linear(3, 1, bias=False).double()
    model.weight.data = reference.ridge(x, y, 0.0, share)[None]
    found = uw.Influence(model, (x, y), loss="mean_squared_error").l2_derivative((x[:4], y[:4]))
    step = 1e-6
    up, down = ((x[:4] @ reference.ridge(x, y, s, share) - y[:4]) ** 2 for s in (step, -step))
    np.testing.assert_allclose(
        found.total, ((up - down) / (2 * step)).numpy(), rtol=1e-6, atol=1e-9
    )


def test_another_measure_by_conjugate_gradients():
    risk = LINEAR_CASES[0].risk()
    exact = front(risk).l2_derivative(risk.data, measure="margin")
    by_cg = front(risk, uw.CG(rtol=1e-11)).l2_derivative(risk.data, measure="margin")
    np.testing.assert_allclose(by_cg.values, exact.values, rtol=1e-7)
    assert exact.meaning.measure == "margin"


def test_what_has_no_derivative():
    risk = LINEAR_CASES[0].risk()
    for method, message in (("euclidean", "baseline"), ("neither", "ablation")):
        with pytest.raises(errors.InputError, match=message):
            front(risk, method).l2_derivative(risk.data)
