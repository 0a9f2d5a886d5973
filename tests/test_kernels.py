"""Kernel machines are linear models on exact features: against scikit-learn and by law."""

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from torch import nn

import upweight as uw
from upweight.errors import InputError
from upweight.kernels import RBFFeatures


@pytest.fixture
def task():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 2, 3, generator=generator).double()
    y = torch.sin(x.sum((1, 2)))[:, None]
    asked = torch.randn(4, 2, 3, generator=generator).double()
    return x, y, asked


def machine(x, y, l2, gamma=0.3):
    """The minimiser of mean squared error ½(z − y)² or (z − y)², whichever the library states."""
    features = RBFFeatures(x, gamma)
    phi = features(x)
    head = nn.Linear(len(x), 1, bias=False).double()
    # mean (z − y)² + ½ l2 ‖w‖²
    system = 2 * phi.T @ phi / len(x) + l2 * torch.eye(len(x)).double()
    head.weight.data = torch.linalg.solve(system, 2 * phi.T @ y / len(x)).T
    return nn.Sequential(features, head)


def test_inner_products_are_the_kernel(task):
    x, _, asked = task
    features = RBFFeatures(x[:20], 0.3)
    wanted = torch.exp(-0.3 * torch.cdist(asked.flatten(1), x[:20].flatten(1)).square())
    torch.testing.assert_close(features(asked) @ features(x[:20]).T, wanted, rtol=1e-6, atol=1e-8)


def test_ridge_on_the_features_is_kernel_ridge(task):
    x, y, asked = task
    l2 = 0.05
    model = machine(x, y, l2)
    rows = x.flatten(1).numpy()
    known = KernelRidge(alpha=len(x) * l2 / 2, kernel="rbf", gamma=0.3).fit(rows, y.numpy())
    found = model(asked).detach().numpy()
    np.testing.assert_allclose(found, known.predict(asked.flatten(1).numpy()), rtol=1e-6)


def test_removals_are_those_of_the_kernel_machine_itself(task):
    """Predicted against a kernel ridge really refitted without each example."""
    x, y, asked = task
    l2 = 0.05
    model = machine(x, y, l2)
    target = torch.zeros(4, 1).double()
    inf = uw.Influence(model, (x, y), loss="mean_squared_error", l2=l2)
    scores = inf.explain((asked, target)).values
    rows, labels, queries = x.flatten(1).numpy(), y.numpy(), asked.flatten(1).numpy()
    actual = np.empty_like(scores)
    for i in range(len(x)):
        keep = np.arange(len(x)) != i
        there = KernelRidge(alpha=(len(x) - 1) * l2 / 2, kernel="rbf", gamma=0.3)
        there.fit(rows[keep], labels[keep])
        before = model(asked).detach().numpy()[:, 0] ** 2
        actual[:, i] = there.predict(queries)[:, 0] ** 2 - before
    assert np.corrcoef(scores.ravel(), actual.ravel())[0, 1] > 0.97
    proof = inf.validate((asked, target), top=15, random=15)
    np.testing.assert_allclose(proof.actual, actual[:, proof.removed], rtol=1e-4, atol=1e-7)


def test_the_same_scores_from_features_made_before(task):
    x, y, asked = task
    model = machine(x, y, 0.1)
    target = torch.zeros(4, 1).double()
    whole = uw.influence(model, (x, y), (asked, target), loss="mean_squared_error", l2=0.1)
    with torch.no_grad():
        before, query = model[0](x), model[0](asked)
    head = uw.influence(model[1], (before, y), (query, target), loss="mean_squared_error", l2=0.1)
    np.testing.assert_allclose(whole.values, head.values, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("gamma", "repeat", "says"), [
    (0.0, False, "positive number"),
    (1e-14, False, "not positive definite"),
    (0.3, True, "not positive definite"),
])  # fmt: skip
def test_machines_that_are_none_are_refused(task, gamma, repeat, says):
    x = task[0].float()
    with pytest.raises(InputError, match=says):
        RBFFeatures(torch.cat([x, x]) if repeat else x, gamma)


def test_where_the_origin_is_does_not_matter():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    there = (x + 2000).float()
    near = (there - 2000).double()  # what float32 holds of them
    features = RBFFeatures(there, 0.5)
    wanted = torch.exp(-0.5 * torch.cdist(near, near).square()).float()
    torch.testing.assert_close(features(there) @ features(there).T, wanted, rtol=0, atol=1e-4)
