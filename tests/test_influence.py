"""The front against the naive reference: values, signs, conventions, invariances."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from tests.cases import CASES, LINEAR_CASES, as_reference, labels, rows
from upweight import errors, reference
from upweight.data import Data
from upweight.engine import Job, score
from upweight.gradients import (
    AutogradGradients,
    FactoredGradients,
    TrainingGradients,
    mixed_derivative,
    per_example,
)
from upweight.objective import Objective
from upweight.risk import Risk
from upweight.sinks import MatrixSink

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
both_removals = pytest.mark.parametrize("removal", ["mean", "sum"])


@pytest.fixture(autouse=True)
def _plain_attention():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def front(risk: Risk, method="exact", damping=0.0) -> uw.Influence:
    return uw.Influence(risk.objective, risk.data, method=method, damping=damping)


def fitted(case, **settings) -> Risk:
    """The case's problem at its minimum."""
    risk = case.risk(**settings)
    problem, theta = as_reference(risk)
    minimum = reference.train(problem, theta)
    with torch.no_grad():
        named = dict(risk.objective.model.named_parameters())
        for name, value in risk.objective.space.unflatten(minimum).items():
            named[name].copy_(value)
    return Risk(risk.objective, risk.data)


def measures(risk: Risk, queries: Data):
    objective = risk.objective
    batch = objective.place(queries.at(torch.arange(len(queries))))

    def ask(i):
        return lambda theta: objective.losses(
            objective.space.unflatten(theta), batch.part(slice(i, i + 1))
        )[0]

    return [ask(i) for i in range(len(queries))]


@all_cases
@both_removals
def test_scores_are_the_reference_ones(case, removal):
    risk = case.risk(removal=removal)
    problem, theta = as_reference(risk)
    damping = 20.0
    queries = risk.data.take(torch.tensor([2, 0, 5]))
    found = front(risk, damping=damping).explain(queries)
    matrix = reference.hessian(problem, theta) + damping * torch.eye(len(theta)).double()
    wanted = reference.scores(problem, theta, matrix, measures(risk, queries))
    np.testing.assert_allclose(found.values, wanted.numpy(), rtol=1e-8, atol=1e-12)


@all_cases
def test_every_gradient_map_equals_the_loop(case):
    risk = case.risk()
    objective, n = risk.objective, len(risk.data)
    batch, _ = risk.at(torch.arange(n))
    problem, theta = as_reference(risk)
    loop = torch.stack(
        [reference.gradient(lambda t, i=i: problem.loss(t, i), theta) for i in range(n)]
    )
    few, many = torch.randn(2, len(theta)).double(), torch.randn(9, len(theta)).double()
    for gradients in (per_example(objective, batch), AutogradGradients(objective, batch)):
        torch.testing.assert_close(gradients.dense(), loop, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients.dot(few), few @ loop.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients.dot(many), many @ loop.T, rtol=1e-9, atol=1e-12)
        weights = torch.randn(3, n).double()
        torch.testing.assert_close(
            gradients.combine(weights), weights @ loop, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize(
    "case", LINEAR_CASES[:2] + LINEAR_CASES[8:11:2], ids=lambda case: case.name
)
@both_removals
def test_sign_and_size_by_really_removing(case, removal):
    risk = fitted(case, removal=removal)
    problem, theta = as_reference(risk)
    queries = risk.data.take(torch.tensor([1, 3]))
    asked = measures(risk, queries)
    actual = torch.zeros(2, 7)
    for i in range(7):
        refitted = reference.train(problem.without([i]), theta)
        for q, ask in enumerate(asked):
            actual[q, i] = ask(refitted) - ask(theta)
    found = front(risk).explain(queries).values
    assert np.corrcoef(found.ravel(), actual.ravel())[0, 1] > 0.85
    large = np.abs(actual.numpy()) > 0.5 * np.abs(actual.numpy()).max()
    assert (np.sign(found) == np.sign(actual.numpy()))[large].all()


@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.name)
def test_scores_sum_to_zero_at_the_optimum_with_l2_inside(case):
    scores = front(fitted(case)).explain(case.risk().data.take(torch.arange(3)))
    assert np.abs(scores.values.sum(1)).max() < 1e-10 * np.abs(scores.values).sum()


def ridge_problem():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(30, 4, generator=generator).double()
    y = x @ torch.randn(4, generator=generator).double() + torch.randn(30, generator=generator)
    model = nn.Linear(4, 1, bias=False).double()
    share = torch.full((30,), 1 / 30, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(reference.ridge(x, y.double(), 0.1, share)[None])
    return x, y.double(), model


def test_ridge_parameter_change_is_the_derivative_in_the_weight():
    x, y, model = ridge_problem()
    inf = uw.Influence(uw.Objective(model, "mean_squared_error", l2=0.1, removal="sum"), (x, y))
    change = inf.params(range(30))
    step = 1e-5
    for i in range(30):
        up, down = (torch.full((30,), 1 / 30, dtype=torch.float64) for _ in range(2))
        up[i] += step
        down[i] -= step
        numeric = (reference.ridge(x, y, 0.1, up) - reference.ridge(x, y, 0.1, down)) / (2 * step)
        torch.testing.assert_close(change.upweight[i], numeric, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(change.blocks()["weight"][:, 0], change.rows)


def test_ridge_leave_one_out_through_the_leverage():
    x, y, model = ridge_problem()
    inf = uw.Influence(uw.Objective(model, "mean_squared_error", l2=0.1, removal="sum"), (x, y))
    exact, leverage = reference.ridge_leave_one_out(x, y, 0.1)
    predicted = inf.params(range(30)).rows / (1 - leverage)[:, None]
    torch.testing.assert_close(predicted, exact, rtol=1e-10, atol=1e-13)
    for i in (0, 7):
        share = torch.full((30,), 1 / 30, dtype=torch.float64)
        share[i] = 0
        refit = reference.ridge(x, y, 0.1, share) - model.weight[0].detach()
        torch.testing.assert_close(exact[i], refit, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("method", ["cg", "ggn", "ggn_cg", "fisher"])
def test_methods_that_mean_the_same_agree_in_value(method):
    risk = LINEAR_CASES[0].risk()
    queries = risk.data.take(torch.arange(3))
    wanted = front(risk).explain(queries)
    found = front(risk, method).explain(queries)
    np.testing.assert_allclose(found.values, wanted.values, rtol=1e-4, atol=1e-8)


def test_a_ready_inverse_is_used_as_it_is():
    risk = LINEAR_CASES[0].risk()
    queries = risk.data.take(torch.arange(3))
    exact = front(risk)
    inverse = exact.inverse.to_dense().numpy()
    for given in (inverse, torch.from_numpy(inverse), uw.Cholesky()):
        found = front(risk, given).explain(queries)
        np.testing.assert_allclose(found.values, exact.explain(queries).values, rtol=1e-9)


def test_ablations_are_their_definitions():
    """Figure 1: −y x without the train loss, s = g without the Hessian, both."""
    risk = next(c for c in LINEAR_CASES if c.name == "logistic").risk()
    queries = risk.data.take(torch.arange(2))
    x, y = risk.data.at(torch.arange(7)).inputs[0], risk.data.at(torch.arange(7)).targets
    sign = (2 * y - 1).double()
    z = risk.objective.model(x).detach()[:, 0]
    tilde = torch.cat([x, torch.ones(7, 1)], 1).double()
    bare, whole = -sign[:, None] * tilde, -(sign * torch.sigmoid(-sign * z))[:, None] * tilde
    inverse = front(risk).inverse.to_dense()
    asked = whole[:2]
    extra = risk.objective.l2 * risk.objective.space.row()
    wanted = {
        "no_train_loss": asked @ inverse @ bare.T / 7,
        "no_hessian": asked @ (whole + extra).T / 7,
        "neither": asked @ bare.T / 7,
        "euclidean": -torch.cdist(x[:2], x),
    }
    for method, values in wanted.items():
        found = front(risk, method).explain(queries)
        np.testing.assert_allclose(found.values, values.numpy(), rtol=1e-8, atol=1e-12)


@all_cases
def test_self_influence_is_the_diagonal(case):
    inf = front(case.risk(), damping=20.0)
    diagonal = np.diagonal(inf.explain(inf.data).values)
    np.testing.assert_allclose(inf.self_influence(), diagonal, rtol=1e-8, atol=1e-13)


def test_groups_add_up():
    risk = LINEAR_CASES[0].risk()
    scores = front(risk).explain(risk.data)
    np.testing.assert_allclose(scores.group([1, 4]), scores.values[:, [1, 4]].sum(1))


@pytest.mark.parametrize("measure", ["margin", "logit", "log_probability"])
@pytest.mark.parametrize("name", ["softmax", "logistic", "mlp"])
def test_measures_are_their_derivatives(measure, name):
    risk = next(c for c in CASES if c.name == name).risk()
    problem, theta = as_reference(risk)
    objective, queries = risk.objective, risk.data.take(torch.arange(3))
    batch = queries.at(torch.arange(3))
    asked = objective.measured(measure)
    functions = [
        lambda t, i=i: asked(objective.space.unflatten(t), batch.part(slice(i, i + 1)))[0]
        for i in range(3)
    ]
    matrix = reference.hessian(problem, theta) + 2 * torch.eye(len(theta)).double()
    found = front(risk, damping=2.0).explain(queries, measure=measure)
    wanted = reference.scores(problem, theta, matrix, functions)
    np.testing.assert_allclose(found.values, wanted.numpy(), rtol=1e-8, atol=1e-12)
    assert found.meaning.helpful == -1


def test_margin_is_the_log_odds_and_log_probability_minus_the_loss():
    risk = LINEAR_CASES[0].risk()
    objective, params = risk.objective, risk.objective.space.values()
    batch, _ = risk.at(torch.arange(7))
    p = torch.exp(-objective.losses(params, batch))
    margin = objective.measured("margin")(params, batch)
    torch.testing.assert_close(margin, torch.log(p / (1 - p)))
    log_p = objective.measured("log_probability")(params, batch)
    torch.testing.assert_close(log_p, torch.log(p))


@pytest.mark.parametrize("measure", ["margin", "logit", "log_probability"])
def test_measures_of_a_sequence_are_means_over_the_positions_that_count(measure):
    """In both layouts, as of rows one by one."""
    z, y = rows(5, 4), labels(4, 5)
    y[0, 2] = y[1] = -100
    y[1, 4] = 2
    asked = getattr(uw.CrossEntropy(), measure)
    flat = asked(z.view(-1, 4), y.view(-1)).view_as(y)
    counted = y != -100
    wanted = torch.stack(
        [values[known].mean() for values, known in zip(flat, counted, strict=True)]
    )
    for outputs in (z, z.movedim(-1, 1)):
        torch.testing.assert_close(asked(outputs, y), wanted)
    leaf = z.clone().requires_grad_()
    asked(leaf, y).sum().backward()
    assert torch.isfinite(leaf.grad).all()
    assert not leaf.grad[~counted].any()


def test_no_position_that_counts_has_no_margin():
    z, y = rows(3, 4), torch.full((7, 3), -100)
    assert uw.CrossEntropy().margin(z, y).isnan().all()
    with pytest.raises(errors.LossError, match="the targets are probabilities"):
        uw.CrossEntropy().margin(z[0], z[0].softmax(1))


def test_an_own_measure_has_no_helpful_side():
    risk = LINEAR_CASES[0].risk()
    found = front(risk).explain(risk.data, measure=lambda outputs, targets: outputs[:, 0])
    assert found.meaning.helpful == 0
    assert "raises" in set(found.top(0)["effect"].tolist())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("name", ["softmax", "mlp", "tied transformer"])
def test_batch_size_and_query_split_change_nothing(size, name):
    case = next(c for c in CASES if c.name == name)
    risk = case.risk()
    queries = risk.data.take(torch.tensor([0, 3, 6]))
    whole = front(risk, damping=5.0).explain(queries).values
    split = Data(risk.data.source, risk.data.ids, batch_size=size)
    small = uw.Influence(risk.objective, split, damping=5.0)
    one_by_one = [small.explain(queries.take(torch.tensor([q]))).values for q in range(3)]
    np.testing.assert_allclose(np.concatenate(one_by_one), whole, rtol=1e-9, atol=1e-13)


def test_order_of_the_data_permutes_the_scores():
    risk = LINEAR_CASES[0].risk()
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    moved = uw.Influence(risk.objective, risk.data.take(order)).explain(risk.data)
    np.testing.assert_allclose(moved.values, front(risk).explain(risk.data).values[:, order])


def test_padding_changes_nothing():
    case = next(c for c in CASES if c.name == "padded transformer")
    torch.manual_seed(2)
    embed = nn.Embedding(5, 4).double()
    model = nn.Sequential(embed, nn.Tanh(), nn.Linear(4, 5).double())
    tokens, targets = torch.randint(5, (6, 3)), torch.randint(5, (6, 3))
    wide = nn.functional.pad(tokens, (0, 1)), nn.functional.pad(targets, (0, 1), value=-100)
    found = [
        uw.Influence(model, data, loss=case.loss, l2=0.1, damping=1.0).explain(data).values
        for data in ((tokens, targets), wide)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9, atol=1e-13)


def test_sample_weights_count_like_copies():
    x, y = torch.randn(6, 3).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    model, query = nn.Linear(3, 2).double(), (torch.randn(2, 3).double(), torch.tensor([0, 1]))
    weights = [1, 2, 1, 1, 3, 1]
    weighed = uw.Influence(model, Data.of((x, y), weights=weights), loss="cross_entropy", l2=0.1)
    repeat = torch.tensor(weights)
    copied = (x.repeat_interleave(repeat, 0), y.repeat_interleave(repeat))
    copies = uw.Influence(model, copied, loss="cross_entropy", l2=0.1).explain(query).values
    owner = np.repeat(np.arange(6), weights)
    summed = np.stack([copies[:, owner == i].sum(1) for i in range(6)], axis=1)
    np.testing.assert_allclose(weighed.explain(query).values, summed, rtol=1e-9)


def test_whatif_is_made_of_scores_and_exchanges():
    risk = fitted(LINEAR_CASES[0])
    inf, queries = front(risk), risk.data.take(torch.tensor([2, 4]))
    scores = inf.explain(queries)
    removed = inf.whatif(on=queries, remove=[0, 3]).change
    np.testing.assert_allclose(removed, scores.group([0, 3]), rtol=1e-9)
    np.testing.assert_allclose(
        inf.whatif(on=queries, reweight={0: 0.0, 3: 2.0}).change,
        scores.values[:, 0] - scores.values[:, 3],
        rtol=1e-9,
    )
    given = int(risk.data.at(torch.tensor([1])).targets[0])
    same = inf.whatif(on=queries, relabel={1: given}).change
    np.testing.assert_allclose(same, 0, atol=1e-14)
    x = risk.data.at(torch.tensor([1])).inputs[0][0]
    new = (given + 1) % 3
    relabelled = inf.whatif(on=queries, relabel={1: new}).change
    replaced = inf.whatif(on=queries, replace={1: (x, torch.tensor(new))}).change
    np.testing.assert_allclose(relabelled, replaced, rtol=1e-9)


def test_relabelling_is_the_derivative_of_a_mixture():
    """Moving a share ε of the weight from (x, y) to (x, y′) changes θ by ε of the prediction."""
    x, y, model = ridge_problem()
    data = (x, y[:, None])
    inf = uw.Influence(uw.Objective(model, "mean_squared_error", l2=0.1), data)
    query = (x[:3] + 1, y[:3, None])
    predicted = inf.whatif(on=query, relabel={5: 9.0}).change
    step = 1e-6
    both, targets = torch.cat([x, x[5:6]]), torch.cat([y, torch.tensor([9.0]).double()])
    shares = torch.full((31,), 1 / 30, dtype=torch.float64)
    shares[5], shares[30] = (1 - step) / 30, step / 30
    moved = reference.ridge(both, targets, 0.1, shares)
    before, after = (
        (q @ t - r) ** 2
        for t in (model.weight[0].detach(), moved)
        for q, r in [(query[0], query[1][:, 0])]
    )
    np.testing.assert_allclose(predicted, ((after - before) / step).numpy(), rtol=1e-4)


@pytest.mark.parametrize("name", ["softmax", "convolution", "dot product attention", "recurrent"])
def test_perturbation_is_the_mixed_derivative(name):
    case = next(c for c in CASES if c.name == name)
    risk = case.risk()
    objective = risk.objective
    inf, queries = front(risk, damping=2.0), risk.data.take(torch.arange(2))
    found = inf.perturbation(queries, [4, 1, 5])
    rows = inf.inverse @ torch.stack(
        [reference.gradient(ask, objective.space.row()) for ask in measures(risk, queries)]
    )
    for m, i in enumerate([4, 1, 5]):
        batch, share = risk.at(torch.tensor([i]))
        x = batch.inputs[0]

        def example(theta, point, batch=batch):
            changed = type(batch)((point,), batch.targets, batch.positions)
            return objective.losses(objective.space.unflatten(theta), changed)[0]

        for q in range(2):
            wanted = -reference.perturbation(example, objective.space.row(), x, rows[q])[0]
            torch.testing.assert_close(found.paper[q, m], wanted, rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(found.values[q, m], wanted * share[0], rtol=1e-8, atol=1e-12)
    assert found.magnitude().shape == (2, 3)


def test_perturbation_predicts_a_small_change_of_the_input():
    x, y, model = ridge_problem()
    objective = uw.Objective(model, "mean_squared_error", l2=0.1)
    query = (x[:2] + 1, y[:2])
    slope = uw.Influence(objective, (x, y)).perturbation(query, [3]).values[:, 0]
    share = torch.full((30,), 1 / 30, dtype=torch.float64)
    step = 1e-6
    for k in range(4):
        moved = x.clone()
        moved[3, k] += step
        theta = reference.ridge(moved, y, 0.1, share)
        after = (query[0] @ theta - query[1]) ** 2
        before = (query[0] @ model.weight[0].detach() - query[1]) ** 2
        torch.testing.assert_close(slope[:, k], (after - before) / step, rtol=1e-4, atol=1e-7)


def test_the_model_is_bit_identical_afterwards():
    risk = fitted(next(c for c in CASES if c.name == "batch norm in eval mode"))
    model = risk.objective.model
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    inf = front(risk, damping=1.0)
    inf.explain(risk.data), inf.self_influence(), inf.perturbation(risk.data, [0])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_validate_refits_to_the_minimum_and_agrees_with_the_reference():
    risk = fitted(LINEAR_CASES[0], l2=0.3)
    queries = risk.data.take(torch.tensor([0, 2]))
    proof = front(risk).validate(queries, top=4, random=3)
    problem, theta = as_reference(risk)
    asked = measures(risk, queries)
    for m, gone in enumerate(proof.removed):
        refitted = reference.train(problem.without([int(gone)]), theta)
        for q in range(2):
            wanted = float(asked[q](refitted) - asked[q](theta))
            assert proof.actual[q, m] == pytest.approx(wanted, abs=1e-9)
    assert set(proof.chosen) == {"most influential", "random"}
    assert proof.agreements["most influential"].r > 0.9


def test_validate_calls_the_users_training_function():
    x, y, model = ridge_problem()
    calls = []

    def retrain(kept):
        calls.append(len(kept))
        fresh = nn.Linear(4, 1, bias=False).double()
        share = torch.full((len(kept),), 1 / len(kept), dtype=torch.float64)
        with torch.no_grad():
            fresh.weight.copy_(reference.ridge(x[kept], y[kept], 0.1, share)[None])
        return fresh

    objective = uw.Objective(model, "mean_squared_error", l2=0.1)
    inf, queries = uw.Influence(objective, (x, y)), (x[:3], y[:3])
    ours = inf.validate(queries, top=3, random=3)
    theirs = inf.validate(queries, top=3, random=3, retrain=retrain)
    np.testing.assert_allclose(ours.actual, theirs.actual, atol=1e-10)
    assert calls == [30] + [29] * 6


def test_double_and_float32_agree_to_single_precision():
    case = next(c for c in CASES if c.name == "mlp")
    risk = case.risk()
    low = Objective(copy.deepcopy(risk.objective.model).float(), case.loss, l2=0.03)
    found = uw.Influence(low, risk.data, damping=5.0).explain(risk.data)
    assert found.values.dtype == np.float32
    wanted = front(risk, damping=5.0).explain(risk.data).values
    np.testing.assert_allclose(found.values, wanted, rtol=1e-3, atol=1e-5)


def test_influence_in_one_call():
    x, y, model = ridge_problem()
    direct = uw.influence(model, (x, y), (x[:2], y[:2]), loss="mean_squared_error", l2=0.1)
    longer = uw.Influence(model, (x, y), loss="mean_squared_error", l2=0.1).explain((x[:2], y[:2]))
    np.testing.assert_array_equal(direct.values, longer.values)
    assert callable(uw.influence)


def test_a_sink_gets_every_block_once():
    risk = LINEAR_CASES[0].risk()
    rows = torch.randn(2, risk.objective.space.size).double()
    sink = MatrixSink(2, 7, torch.float64)
    sink.matrix[:] = np.nan
    some = Data(risk.data.source, risk.data.ids, batch_size=3)
    score(TrainingGradients(Risk(risk.objective, some)), [Job(rows, sink)])
    assert np.isfinite(sink.matrix).all()


def test_mixed_derivative_of_keyword_inputs():
    risk = next(c for c in CASES if c.name == "keyword inputs").risk()
    batch, _ = risk.at(torch.arange(3))
    rows = torch.randn(2, risk.objective.space.size).double()
    assert mixed_derivative(risk.objective, batch, rows).shape == (2, 3, 3)


def test_no_dense_gradient_of_the_training_data_is_ever_formed(monkeypatch):
    x, y = torch.randn(500, 4), torch.arange(500) % 3
    formed = []
    for kind in (FactoredGradients, AutogradGradients):
        dense = kind.dense

        def counted(self, dense=dense):
            formed.append(self.count)
            return dense(self)

        monkeypatch.setattr(kind, "dense", counted)
    for method in ("exact", "cg", "ggn", "no_hessian"):
        uw.influence(nn.Linear(4, 3), (x, y), (x[:3], y[:3]), loss="cross_entropy", method=method,
                     l2=0.1)  # fmt: skip
    assert set(formed) == {3}
