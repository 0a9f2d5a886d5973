"""Removing groups: first and second order against the naive file, ridge, and real refits."""

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from tests.cases import CASES, LINEAR_CASES, as_reference
from tests.test_influence import fitted, front, measures, ridge_problem
from upweight import errors, reference
from upweight.data import Data
from upweight.groups import refitted
from upweight.newton import Factorised

GROUPS = {"three": [0, 2, 5], "one": [3], "overlapping": [2, 3, 6]}
both_removals = pytest.mark.parametrize("removal", ["mean", "sum"])


@pytest.fixture(autouse=True)
def _plain_attention():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@pytest.mark.parametrize(
    ("case", "removal"),
    [(case, "mean") for case in CASES] + [(case, "sum") for case in LINEAR_CASES],
    ids=lambda value: getattr(value, "name", value),
)
def test_both_orders_are_the_reference_ones(case, removal):
    """With the damping of the full problem, written as an L2 towards where the model stands."""
    risk = case.risk(removal=removal)
    problem, theta = as_reference(risk)
    damping, queries = 60.0, risk.data.take(torch.tensor([2, 0, 5]))
    found = front(risk, damping=damping).group_effects(GROUPS, on=queries)
    asked = measures(risk, queries)
    scores = front(risk, damping=damping).explain(queries)
    for g, ids in enumerate(GROUPS.values()):
        np.testing.assert_allclose(found.first[:, g], scores.group(ids), rtol=1e-8, atol=1e-13)
        moved = theta + reference.newton_step(problem, theta, ids, damping)
        wanted = [float(ask(moved) - ask(theta)) for ask in asked]
        np.testing.assert_allclose(found.second[:, g], wanted, rtol=1e-7, atol=1e-12)


@both_removals
def test_a_group_out_of_a_ridge_fit_is_exact(removal):
    """The law: for a quadratic objective the second order is the refit, to 1e-10."""
    x, y, model = ridge_problem()
    objective = uw.Objective(model, "mean_squared_error", l2=0.1, removal=removal)
    inf = uw.Influence(objective, (x, y))
    asked = (x[:5] + 1, y[:5])
    groups = [list(range(12)), [3], list(range(5, 30))]
    found = inf.group_effects(groups, on=asked)
    before = (asked[0] @ model.weight[0].detach() - asked[1]) ** 2
    for g, gone in enumerate(groups):
        share = torch.full((30,), 1 / 30, dtype=torch.float64)
        share[gone] = 0
        share = share / share.sum() if removal == "mean" else share
        after = (asked[0] @ reference.ridge(x, y, 0.1, share) - asked[1]) ** 2
        np.testing.assert_allclose(found.second[:, g], after - before, rtol=1e-10, atol=1e-12)
        assert np.abs(found.first[:, g] - found.second[:, g]).max() > 1e-5


@both_removals
@pytest.mark.parametrize(
    "name", ["softmax", "logistic", "softmax weighted", "softmax class weights"]
)
def test_second_order_is_nearer_to_really_removing(name, removal):
    case = next(c for c in LINEAR_CASES if c.name == name)
    risk = fitted(case, removal=removal, l2=0.3)
    problem, theta = as_reference(risk)
    queries = risk.data.take(torch.tensor([1, 3, 4]))
    found = front(risk).group_effects(GROUPS, on=queries)
    actual = np.zeros((3, 3))
    for g, ids in enumerate(GROUPS.values()):
        refitted = reference.train(problem.without(ids), theta)
        for q, ask in enumerate(measures(risk, queries)):
            actual[q, g] = ask(refitted) - ask(theta)
    error = [
        np.abs(part - actual).sum() / np.abs(actual).sum() for part in (found.first, found.second)
    ]
    assert error[1] < 0.1
    assert error[1] < 0.3 * error[0]


@both_removals
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_from_the_whole_factorisation_is_that_of_a_new_one(case, removal):
    risk, damping = case.risk(removal=removal), 90.0
    whole = front(risk, damping=damping)
    fast = Factorised(whole.method.fit, whole.inverse, damping)
    slow = refitted(lambda rest, grown: front(rest, damping=damping * grown).inverse)
    for ids in ([0], [2, 5, 6], [0, 1, 2, 3, 5]):
        gone = torch.tensor(ids)
        pull = torch.linspace(-1, 1, risk.objective.space.size).double()
        found, wanted = (step(risk, gone, pull) for step in (fast.step, slow))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_group_without_which_no_minimum_is_near_is_refused():
    """One example bends up what the others bend down: −2 + 3 over the two."""
    data = uw.Data.of((torch.tensor([[-4.0], [6.0]]).double(), torch.zeros(2)))

    def loss(outputs, targets):
        return outputs[:, 0] / 2

    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.ones(1).double())

        def forward(self, x):
            return x * self.at**2

    inf = uw.Influence(Bowl(), data, loss=loss)
    with pytest.raises(errors.IndefiniteError, match="bends down"):
        inf.group_effects([[1]], on=data)


def test_conjugate_gradients_and_another_measure_say_the_same():
    risk = LINEAR_CASES[0].risk()
    queries = risk.data.take(torch.arange(3))
    exact = front(risk).group_effects(GROUPS, on=queries, measure="margin")
    by_cg = front(risk, uw.CG(rtol=1e-10)).group_effects(GROUPS, on=queries, measure="margin")
    np.testing.assert_allclose(by_cg.first, exact.first, rtol=1e-7)
    np.testing.assert_allclose(by_cg.second, exact.second, rtol=1e-7)
    assert exact.meaning.measure == "margin"


def test_no_removal_at_the_limit():
    """An example of weight 0 changes nothing, in either order."""
    case = next(c for c in LINEAR_CASES if c.name == "softmax weighted")
    found = front(case.risk()).group_effects([[4]], on=case.risk().data)
    assert np.abs(found.first).max() == 0
    assert np.abs(found.second).max() == 0


def test_batches_of_queries_change_nothing_and_ids_are_ids():
    risk = LINEAR_CASES[0].risk()
    names = list("abcdefg")
    data = Data(risk.data.source, np.array(names), batch_size=2)
    inf = uw.Influence(risk.objective, data)
    found = inf.group_effects({g: [names[i] for i in ids] for g, ids in GROUPS.items()}, on=data)
    wanted = front(risk).group_effects(GROUPS, on=risk.data)
    np.testing.assert_allclose(found.first, wanted.first, rtol=1e-10)
    np.testing.assert_allclose(found.second, wanted.second, rtol=1e-10)
    table = found.table()
    assert table["group"].tolist()[:3] == list(GROUPS)
    assert table["examples"].tolist()[:3] == [3, 1, 3]
    assert "nats" in repr(found)
    assert "First order is off" in repr(found)


def test_groups_that_cannot_be():
    risk = LINEAR_CASES[0].risk()
    inf = front(risk)
    for groups, message in (
        ([], "no group"),
        ([0, 1], "list in a list"),
        ("ab", "list in a list"),
        ([[]], "has 0 of 7"),
        ([list(range(7))], "has 7 of 7"),
        ([[1, 1]], "names an example twice"),
        ([[99]], "not in the data"),
    ):
        with pytest.raises(errors.DataError, match=message):
            inf.group_effects(groups, on=risk.data)
    weighed = uw.Data.of((torch.randn(3, 2), torch.tensor([0, 1, 0])), weights=[1.0, 1.0, 0.0])
    lone = uw.Influence(nn.Linear(2, 2), weighed, loss="cross_entropy", l2=0.1)
    with pytest.raises(errors.DataError, match="all of the weight"):
        lone.group_effects([[0, 1]], on=weighed)
    for method, message in (
        ("no_hessian", "no curvature of the remaining"),
        (inf.inverse.to_dense(), "no curvature of the remaining"),
        ("euclidean", "baseline"),
        ("no_train_loss", "ablation"),
    ):
        with pytest.raises(errors.InputError, match=message):
            front(risk, method).group_effects(GROUPS, on=risk.data)


def test_a_changed_model_is_refused():
    risk = LINEAR_CASES[0].risk()
    inf = front(risk)
    with torch.no_grad():
        next(risk.objective.model.parameters()).add_(1.0)
    for ask in (
        lambda: inf.group_effects(GROUPS, on=risk.data),
        lambda: inf.l2_derivative(risk.data),
    ):
        with pytest.raises(errors.ModelError, match="changed after"):
            ask()
