"""Subtler wrong answers, found by trying: each was once silent and is now right or refused."""

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import upweight as uw
from upweight import errors
from upweight.curvature import curvature
from upweight.data import Data
from upweight.demo import minimise
from upweight.linalg import Cholesky, Dense, Status
from upweight.risk import Risk
from upweight.solvers import CG


class Wrapped(nn.Module):
    """Any module behind one that has no closed form."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def rows(n=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator).double()
    y = torch.randint(2, (n,), generator=generator)
    return x, y


def values(model, data=None, *, loss="cross_entropy", query=None, **settings):
    data = rows() if data is None else data
    inf = uw.Influence(model, data, loss=loss, l2=0.1, **settings)
    return inf.explain(rows(3, seed=1) if query is None else query).values


class Scaled(nn.Sequential):
    def forward(self, x):
        return 5 * super().forward(x)


def hooked():
    model = nn.Sequential(nn.Linear(3, 2)).double()
    model.register_forward_hook(lambda module, inputs, outputs: 5 * outputs)
    return model


def inner_hooked():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).double()
    model[1].register_forward_hook(lambda module, inputs, outputs: 3 * outputs)
    return model


@pytest.mark.parametrize(
    "make", [lambda: Scaled(nn.Linear(3, 2)).double(), hooked, inner_hooked], ids=range(3)
)
def test_a_model_that_only_looks_linear_is_taken_as_it_is(make):
    model = make()
    np.testing.assert_allclose(values(model), values(Wrapped(model)), rtol=1e-8)


def test_a_subclass_of_a_criterion_is_another_loss():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            plain = nn.functional.cross_entropy(outputs, targets, reduction="none")
            return (1 - torch.exp(-plain)) ** 2 * plain

    model, focal = nn.Linear(3, 2).double(), Focal()
    wanted = values(model, loss=lambda z, y: focal(z, y) + 0, damping=1.0)
    np.testing.assert_allclose(values(model, loss=focal, damping=1.0), wanted, rtol=1e-8)


def test_a_subclass_of_a_tensor_dataset_is_read_by_its_items():
    class Normed(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x * 10, y

    model, (x, y) = nn.Linear(3, 2).double(), rows()
    np.testing.assert_allclose(values(model, Normed(x, y)), values(model, (x * 10, y)), rtol=1e-9)


def test_partial_losses_keep_their_settings():
    model, (x, y) = nn.Linear(3, 2).double(), rows()
    y = y.clone()
    y[:5] = -100
    partial = functools.partial(nn.functional.cross_entropy, reduction="none")
    np.testing.assert_allclose(values(model, (x, y), loss=partial), values(model, (x, y)))
    with pytest.raises(errors.LossError, match="cannot enter"):
        uw.Objective(model, functools.partial(nn.functional.cross_entropy, size_average=True))


def fitted(loss, data):
    model = nn.Linear(3, 2).double()
    objective = uw.Objective(model, loss, l2=0.1)
    risk = Risk(objective, Data.of(data))
    for _ in range(30):
        step = torch.linalg.solve(curvature("hessian", risk).to_dense(), risk.gradient())
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.sub_(objective.space.unflatten(step)[name])
    return model, objective


@pytest.mark.parametrize("label", [1, -100])
def test_relabelling_moves_the_weight_of_the_class_too(label):
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 8.0]).double())
    x, y = rows(600)
    i = int((y == 0).nonzero()[0])
    _, objective = fitted(loss, (x, y))
    query = rows(3, seed=1)
    inf = uw.Influence(objective, (x, y))
    predicted = inf.whatif(on=query, relabel={i: label}).change
    changed = y.clone()
    changed[i] = label
    refit, _ = fitted(loss, (x, changed))
    ask = nn.functional.cross_entropy
    with torch.no_grad():
        before = ask(objective.model(query[0]), query[1], reduction="none")
        actual = ask(refit(query[0]), query[1], reduction="none") - before
    np.testing.assert_allclose(predicted, actual.numpy(), rtol=0.2, atol=2e-5)
    if label == -100:
        np.testing.assert_allclose(predicted, inf.whatif(on=query, remove=[i]).change, rtol=1e-8)


def test_a_query_of_a_class_without_weight_still_has_a_loss():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0]).double())
    model = nn.Linear(3, 2).double()
    closed, general = values(model, loss=loss), values(Wrapped(model), loss=loss)
    np.testing.assert_allclose(closed, general, rtol=1e-8, atol=1e-14)
    assert np.abs(closed).max(1).min() > 0


def test_retraining_is_measured_on_the_model_that_came_back():
    x, y = rows()
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    minimise(net, (x, y), 0.1)
    objective = uw.Objective(net, "cross_entropy", l2=0.1, parameters=["2.*"])
    query, returned = rows(2, seed=1), []

    def retrain(kept):
        torch.manual_seed(len(returned))
        fresh = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
        returned.append(fresh)
        return fresh

    proof = uw.Influence(objective, (x, y)).validate(query, top=3, random=0, retrain=retrain)
    with torch.no_grad():
        losses = torch.stack(
            [nn.functional.cross_entropy(m(query[0]), query[1], reduction="none") for m in returned]
        )
    np.testing.assert_allclose(proof.actual, (losses[1:] - losses[0]).T.numpy(), atol=1e-12)
    with pytest.raises(errors.InputError, match="must return a torch.nn.Module"):
        uw.Influence(objective, (x, y)).validate(query, top=3, random=0, retrain=lambda kept: None)


def test_validation_takes_only_scores_of_its_own_question():
    x, y = rows()
    model = nn.Linear(3, 2).double()
    minimise(model, (x, y), 0.1)
    inf, query = uw.Influence(model, (x, y), loss="cross_entropy", l2=0.1), rows(2, seed=1)
    inf.validate(query, top=3, random=3, scores=inf.explain(query))
    for scores in (inf.explain(query, measure="margin"), inf.explain(rows(2, seed=2))):
        with pytest.raises(errors.InputError, match="belong to other queries"):
            inf.validate(query, top=3, random=3, scores=scores)
    near = uw.Influence(model, (x, y), loss="cross_entropy", l2=0.1, method="euclidean")
    with pytest.raises(errors.InputError, match="predict no change"):
        near.validate(query, top=3, random=3)


def test_other_questions_are_other_runs(tmp_path):
    inf = uw.Influence(nn.Linear(3, 2).double(), rows(), loss="cross_entropy", l2=0.1)
    inf.explain(rows(2, seed=1)).save(tmp_path / "run")
    for scores in (inf.explain(rows(2, seed=2)), inf.explain(rows(2, seed=1), measure="margin")):
        with pytest.raises(errors.StoreError, match="another run"):
            scores.save(tmp_path / "run")


@pytest.mark.parametrize(
    "solver",
    [
        uw.LiSSA(scale=1e4, depth=100),
        uw.LiSSA(scale=1e4, depth=100, repeats=1),
    ],
    ids=["ten repeats", "one repeat"],
)
def test_lissa_that_went_nowhere_is_not_converged(solver):
    inf = uw.Influence(nn.Linear(3, 2), rows(), loss="cross_entropy", l2=0.1, method=solver)
    with pytest.raises(errors.NotConvergedError):
        inf.explain(rows(2, seed=1))


def test_lissa_finds_negative_curvature():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(4)
    inf = uw.Influence(net, rows(), loss="cross_entropy", method=uw.LiSSA(depth=60, repeats=2))
    with pytest.raises(errors.NumericalError):
        inf.explain(rows(2, seed=1))


def test_a_matrix_singular_by_a_duplicated_column_is_never_solved():
    refused = 0
    for seed in range(12):
        x = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed)).double()
        matrix = torch.cat([x, x[:, :1]], 1)
        with pytest.raises(errors.IndefiniteError, match="singular"):
            Cholesky().init(Dense(matrix.T @ matrix))
        refused += 1
    assert refused == 12


def test_cg_never_reports_less_than_the_true_residual():
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(200, 200, generator=generator).double())
    matrix = ((q * torch.logspace(0, -3.5, 200).double()) @ q.T).float()
    right = q[:, :1].T.repeat(150, 1) + 1e-3 * torch.randn(150, 200, generator=generator)
    right[0] = torch.randn(200, generator=generator)
    solution = CG(rtol=1e-5, max_steps=400).init(Dense(matrix)).solve(right.float())
    product = solution.value.double() @ matrix.double()
    true = (product - right).norm(dim=1) / right.norm(dim=1)
    assert (true <= 1.5 * solution.residual.double() + 1e-6).all()


def test_cg_solves_many_rows_in_float32():
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(300, 300, generator=generator))
    matrix = (q * torch.logspace(0, -3, 300)) @ q.T
    solution = CG(rtol=1e-3, max_steps=300).init(Dense(matrix)).solve(torch.randn(299, 300))
    assert set(solution.status) == {Status.CONVERGED}


def test_cg_names_nan_in_the_operator():
    with pytest.raises(errors.NonFiniteError):
        CG().init(Dense(torch.full((3, 3), torch.nan))).solve(torch.ones(1, 3))


def test_cg_without_curvature_or_gradients():
    data = (rows()[0], 2 * rows()[1] - 1)
    model = nn.Linear(3, 1, bias=False).double()
    query = (data[0][:12], data[1][:12])
    inf = uw.Influence(model, data, loss="hinge", l2=0.5, method="cg")
    exact = uw.Influence(model, data, loss="hinge", l2=0.5)
    np.testing.assert_allclose(inf.explain(query).values, exact.explain(query).values, atol=1e-9)
    far = (torch.zeros_like(query[0]), query[1])
    assert not inf.explain(far).values.any()


def test_damping_is_never_ignored():
    model = nn.Linear(3, 2).double()
    ready = np.eye(8)
    for method in ("no_hessian", ready):
        with pytest.raises(errors.InputError, match="would be ignored"):
            values(model, method=method, damping=1.0)
    risk = Risk(uw.Objective(model, "cross_entropy", l2=0.1), Data.of(rows()))
    with pytest.raises(errors.InputError, match="takes an inverse"):
        values(model, method=curvature("ggn", risk))


def test_frozen_layers_and_modes_are_part_of_the_model():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()
    net[0].requires_grad_(False)
    inf = uw.Influence(net, rows(), loss="cross_entropy", l2=0.1, method="ggn")
    inf.explain(rows(2, seed=1))
    net[1].train()
    with pytest.raises(errors.ModelError, match="eval"):
        inf.explain(rows(2, seed=1))
    net.eval()
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(errors.ModelError, match="changed after"):
        inf.explain(rows(2, seed=1))


@pytest.mark.parametrize(
    "method", ["exact", "cg", "ggn", "fisher", "empirical_fisher", "no_hessian"]
)
@pytest.mark.parametrize("names", [["inner.2.*"], ["inner.0.bias"]])
def test_some_parameters_of_a_model_without_a_closed_form(method, names):
    inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    whole = uw.Objective(Wrapped(inner), "cross_entropy", l2=0.5, parameters=names)
    damping = 0.0 if method == "no_hessian" else 1.0
    inf = uw.Influence(whole, rows(), method=method, damping=damping)
    found = inf.explain(rows(12, seed=1), accept=True).values
    for p in inner.parameters():
        p.requires_grad_(False)
    for name, p in whole.model.named_parameters():
        p.requires_grad_(any(name.startswith(k.rstrip("*")) for k in names))
    frozen = uw.Objective(whole.model, "cross_entropy", l2=0.5)
    again = uw.Influence(frozen, rows(), method=method, damping=damping)
    wanted = again.explain(rows(12, seed=1), accept=True).values
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-12)


def test_audits_of_labels_that_are_not_one_class_each():
    model, (x, y) = nn.Linear(3, 2).double(), rows()
    ignored = y.clone()
    ignored[:3] = -100
    table = uw.Influence(model, (x, ignored), loss="cross_entropy", l2=0.1).audit()
    skipped = np.isin(table["id"], [0, 1, 2])
    assert not table["is_label_issue"][skipped].any()
    assert np.isnan(table["margin"][skipped]).all()
    soft = torch.softmax(torch.randn(30, 2), 1).double()
    table = uw.Influence(model, (x, soft), loss="cross_entropy", l2=0.1).audit()
    assert "margin" not in table.columns


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.bool])
def test_labels_of_every_integer_type(dtype):
    model, (x, y) = nn.Linear(3, 2).double(), rows()
    found = values(model, (x, y.to(dtype)))
    np.testing.assert_array_equal(found, values(model, (x, y)))


def test_half_precision_ends_in_single():
    x, y = rows()
    inf = uw.Influence(nn.Linear(3, 2).bfloat16(), (x, y), loss="cross_entropy", l2=0.1)
    assert inf.explain((x[:2], y[:2])).values.dtype == np.float32
    assert inf.self_influence().dtype == np.float32


def test_ablations_are_for_explaining_only():
    inf = uw.Influence(
        nn.Linear(3, 2).double(), rows(), loss="cross_entropy", l2=0.1, method="no_train_loss"
    )
    for call in (
        inf.self_influence,
        lambda: inf.params([0]),
        lambda: inf.whatif(on=rows(2), remove=[0]),
    ):
        with pytest.raises(errors.InputError, match="ablation"):
            call()


def test_examples_without_weight_have_a_derivative():
    x, y = rows()
    data = Data.of((x, y), weights=[0.0] + [1.0] * 29)
    inf = uw.Influence(nn.Linear(3, 2).double(), data, loss="cross_entropy", l2=0.1)
    assert np.isnan(inf.explain(rows(2)).upweight[:, 0]).all()
    change = inf.params([0])
    assert not change.rows.any()
    assert change.upweight.abs().max() > 0
    assert inf.perturbation(rows(2), [0]).paper.abs().max() > 0


def test_labels_that_repeat_the_input_are_a_language_models():
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7)).double()

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, input_ids):
            return self.net(input_ids)

    ids = torch.randint(7, (6, 4))
    with pytest.raises(errors.LossError, match="Shift the labels"):
        values(
            Language(), {"input_ids": ids, "labels": ids}, query={"input_ids": ids, "labels": ids}
        )


def test_no_grad_and_default_device_change_nothing():
    x, y = rows()
    inf = uw.Influence(nn.Linear(3, 2).double(), (x, y), loss="cross_entropy", l2=0.1)
    wanted = inf.explain((x, y)).values
    with torch.no_grad():
        assert inf.plan((x, y)).seconds > 0
        np.testing.assert_array_equal(inf.explain((x, y)).values, wanted)


def test_channels_last_targets_are_not_scrambled():
    model = nn.Unflatten(1, (3, 4))
    net = nn.Sequential(nn.Linear(3, 12), model).double()
    with pytest.raises(errors.LossError, match="outputs' size"):
        values(net, (rows()[0], torch.randn(30, 4, 3).double()), loss="mean_squared_error")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remove": "r3"}, "list of ids"),
        ({"remove": 3}, "list of ids"),
        ({"relabel": {0: 1.9}}, "not a value"),
        ({"relabel": {0: [1, 0]}}, "shape of the old ones"),
    ],
)
def test_changes_that_cannot_be_meant(change, message):
    inf = uw.Influence(nn.Linear(3, 2).double(), rows(), loss="cross_entropy", l2=0.1)
    with pytest.raises(errors.DataError, match=message):
        inf.whatif(on=rows(2), **change)


def test_sources_that_cannot_be_meant():
    x, y = rows()
    for source, message in (
        ([x, x], "list of two arrays"),
        ((np.ma.masked_array(x.numpy()), y), "masked"),
        ((x.to_sparse(), y), "to_dense"),
    ):
        with pytest.raises(errors.DataError, match=message):
            Data.of(source)
    assert Data.of((x, y), ids=np.array([f"r{i}" for i in range(30)], dtype=object)).ids[3] == "r3"


@pytest.mark.parametrize("ids", [["a", 0, *range(2, 30)], np.zeros((30, 2), int), [0.5] * 30])
def test_ids_that_cannot_be_meant(ids):
    with pytest.raises(errors.DataError, match="whole numbers or text"):
        Data.of(rows(), ids=ids)


def test_distances_that_do_not_exist():
    tokens = (torch.randint(5, (8, 2)), torch.arange(8) % 2)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    with pytest.raises(errors.InputError, match="no distance"):
        values(model, tokens, query=tokens, method="euclidean")


def test_a_group_counts_each_example_once():
    scores = uw.influence(nn.Linear(3, 2).double(), rows(), rows(2), loss="cross_entropy", l2=0.1)
    with pytest.raises(errors.DataError, match="twice"):
        scores.group([1, 1])


def test_sequences_padded_batch_by_batch():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 9)).double()
    lengths = [2, 3, 4, 6]
    items = [(torch.randint(5, (n,)), torch.randint(9, (n,))) for n in lengths]

    def collate(batch):
        width = max(len(x) for x, _ in batch)
        pad = nn.functional.pad
        return (
            torch.stack([pad(x, (0, width - len(x))) for x, _ in batch]),
            torch.stack([pad(y, (0, width - len(y)), value=-100) for _, y in batch]),
        )

    def scores(size):
        loader = torch.utils.data.DataLoader(items, batch_size=size, collate_fn=collate)
        inf = uw.Influence(model, loader, loss="cross_entropy", l2=0.5, damping=1.0)
        return inf.explain(collate(items)).values

    np.testing.assert_allclose(scores(1), scores(4), rtol=1e-8, atol=1e-13)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("method", ["cg", "ggn_cg", "lissa", "exact"])
def test_an_operation_without_a_second_derivative_is_named(method):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(5, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.bag(x))

    model = Bag().double()
    tokens = (torch.randint(5, (8, 2)), torch.randint(2, (8,)))
    with pytest.raises(errors.ModelError, match="nn.EmbeddingBag"):
        values(model, tokens, query=tokens, method=method)
    assert np.isfinite(values(model, tokens, query=tokens, method="ekfac")).all()
