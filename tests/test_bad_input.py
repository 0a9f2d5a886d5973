"""Wrong answers that look right: each is correct or refused with the fix in the message."""

import copy

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import upweight as uw
from upweight import errors


@pytest.fixture
def x():
    return torch.randn(12, 3)


@pytest.fixture
def y():
    return torch.arange(12) % 2


def influence(model, x, y, **settings):
    settings = {"loss": "cross_entropy", "l2": 0.1, **settings}
    return uw.Influence(model, (x, y), **settings)


def explain(model, x, y, **settings):
    return influence(model, x, y, **settings).explain((x[:2], y[:2]))


def refused(model, kind, message):
    """A context in which a call is refused and the model left as it was."""

    class Refused:
        def __enter__(self):
            self.before = copy.deepcopy(model.state_dict())
            self.context = pytest.raises(kind, match=message)
            self.context.__enter__()

        def __exit__(self, *details):
            result = self.context.__exit__(*details)
            after = model.state_dict()
            assert all(torch.equal(after[k], v) for k, v in self.before.items())
            assert not any(m._forward_hooks for m in model.modules())
            assert torch.backends.mha.get_fastpath_enabled()
            return result

    return Refused()


@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs, targets: (outputs.sum(1) - targets).square().mean(),
        lambda outputs, targets: outputs,
        lambda outputs, targets: float(outputs.sum()),
    ],
)
def test_a_loss_that_is_not_per_example(x, y, loss):
    model = nn.Linear(3, 2)
    with refused(model, errors.LossError, r"shape \[4\] for 4 rows.*reduction='none'"):
        explain(model, x, y, loss=loss)


def test_a_loss_that_couples_rows(x, y):
    model = nn.Linear(3, 2)

    def contrastive(outputs, targets):
        return (outputs - outputs.mean(0)).square().sum(1)

    with refused(model, errors.LossError, "changes with the other examples"):
        explain(model, x, y, loss=contrastive)


def test_nan_in_a_loss_names_the_batch(x, y):
    model = nn.Linear(3, 2)
    x[9, 1] = torch.nan
    for method in ("exact", "cg", "no_hessian"):
        with refused(model, errors.NonFiniteError, r"The loss is nan at row 9 \(batch of rows 0"):
            explain(model, x, y, method=method)
    with refused(model, errors.NonFiniteError, "The loss is nan at row 9"):
        influence(model, x, y, method="no_hessian").self_influence()


def test_nan_in_a_gradient_names_the_parameter(x, y):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine = nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.fine(x) + torch.sqrt(self.scale * x[:, :1].clamp_min(0))

    model = Root()
    x = x.abs() + 0.1
    x[7, 0] = 0.0
    with refused(model, errors.NonFiniteError, "gradient of row 7 .*parameter 'scale'"):
        explain(model, x, y, damping=1.0)


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.1), nn.BatchNorm1d(3), nn.MultiheadAttention(3, 1, dropout=0.1)]
)
def test_a_model_in_train_mode_with_random_layers(layer):
    model = nn.Sequential(layer, nn.Linear(3, 2)).train()
    with refused(model, errors.ModelError, r"train mode.*Call model.eval\(\) first"):
        uw.Objective(model, "cross_entropy")


def test_train_mode_without_random_layers_is_fine(x, y):
    assert explain(nn.Linear(3, 2).train(), x, y).shape == (2, 12)


def test_a_model_that_is_random_in_its_own_way(x, y):
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(len(x), 2)

    model = Noisy(3, 2)
    with refused(model, errors.ModelError, "Two evaluations of the same rows differ"):
        explain(model, x, y)


def test_a_model_that_changed_since(x, y):
    model = nn.Linear(3, 2)
    inf = influence(model, x, y)
    inf.explain((x, y))
    with torch.no_grad():
        model.weight.add_(1)
    with refused(model, errors.ModelError, "changed after"):
        inf.explain((x, y))


def test_unsized_data():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    for source in (Stream(), iter([1, 2]), DataLoader(Stream())):
        with pytest.raises(errors.DataError, match="order"):
            uw.Data.of(source)


def test_data_that_changes_between_readings(x, y):
    class Augmented(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return x[i] + torch.randn(3), y[i]

    with pytest.raises(errors.DataError, match="other values each time.*augmentation"):
        uw.Data.of(Augmented())


def test_random_draws_from_a_dataset_are_not_taken_for_changes(x, y):
    data = TensorDataset(x, y)
    listed = [data[i] for i in range(12)]
    lissa = uw.LiSSA(depth=50, repeats=2, batch_size=3)
    inf = uw.Influence(nn.Linear(3, 2), listed, loss="cross_entropy", l2=0.1, method=lissa)
    assert inf.explain((x[:2], y[:2]), accept=True).shape == (2, 12)


def test_inputs_the_model_cannot_take(x, y):
    model = nn.Linear(3, 2)
    with refused(model, errors.DataError, r"training data cannot be run.*uint8 \(4, 3\)"):
        explain(model, x.to(torch.uint8), y)


def test_data_that_changes_later(x, y):
    class Late(Dataset):
        def __init__(self):
            self.moved = 0.0

        def __len__(self):
            return 12

        def __getitem__(self, i):
            return x[i] + (self.moved if i == 4 else 0), y[i]

    source = Late()
    inf = uw.Influence(nn.Linear(3, 2), source, loss="cross_entropy", l2=0.1)
    inf.explain((x, y))
    source.moved = 1.0
    with pytest.raises(errors.DataError, match="rows 0 to 11"):
        inf.explain((x, y))


def test_empty_data():
    with pytest.raises(errors.DataError, match="empty"):
        uw.Data.of((torch.zeros(0, 3), torch.zeros(0).long()))
    with pytest.raises(errors.DataError, match="empty"):
        uw.Data.of([])


def test_ids_that_do_not_match(x, y):
    with pytest.raises(errors.DataError, match="3 ids for 12 rows"):
        uw.Data.of((x, y), ids=[1, 2, 3])
    with pytest.raises(errors.DataError, match="repeat"):
        uw.Data.of((x, y), ids=[0] * 12)
    with pytest.raises(errors.DataError, match="whole numbers or text"):
        uw.Data.of((x, y), ids=[None] + list(range(11)))


def test_unknown_ids_are_named(x, y):
    inf = influence(nn.Linear(3, 2), x, y)
    for call in (
        lambda: inf.params([99]),
        lambda: inf.whatif(on=(x, y), remove=[99]),
        lambda: inf.explain((x, y)).top(99),
        lambda: inf.explain((x, y)).for_train(99),
        lambda: inf.explain((x, y)).group([99]),
    ):
        with pytest.raises(errors.DataError, match="99"):
            call()


def test_ids_are_named_as_a_person_writes_them(x, y):
    inf = influence(nn.Linear(3, 2), x, y)
    scores = inf.explain((x, y))
    for call in (lambda: scores.top(99), lambda: scores.for_train(99), lambda: inf.params([99])):
        with pytest.raises(errors.DataError, match="ids run from 0 to 11"):
            call()
    extremes = inf.extremes((x, y), 2)
    for call in (scores.top, scores.bottom, scores.for_train, extremes.top):
        for several in ([0, 1], np.array([0, 1]), torch.tensor([0, 1])):
            with pytest.raises(errors.DataError, match="at a time is asked for"):
                call(several)
    # One element of an array or a tensor is one id.
    for key in (3, np.int64(3), np.array(3), torch.tensor(3)):
        assert scores.top(key, 1)["train"] == scores.top(3, 1)["train"]


@pytest.mark.parametrize("k", [-1, 0, 2.5, True])
def test_a_number_of_examples_that_is_none(x, y, k):
    scores = influence(nn.Linear(3, 2), x, y).explain((x, y))
    for side in (scores.top, scores.bottom):
        with pytest.raises(errors.InputError, match="k is a whole number of at least 1"):
            side(0, k)
    assert len(scores.top(0, np.int64(2))) == 2


def test_inputs_without_targets(x, y):
    inf = influence(nn.Linear(3, 2), x, y)
    for call in (inf.explain, inf.plan, inf.extremes, inf.validate):
        with pytest.raises(errors.DataError, match=r"queries have no targets.*\(inputs, targets\)"):
            call(x)
    with pytest.raises(errors.DataError, match="training data have no targets"):
        uw.Influence(nn.Linear(3, 2), x, loss="cross_entropy", l2=0.1).explain((x, y))
    # A loss of one's own may need none.
    own = uw.Influence(nn.Linear(3, 2), x, loss=lambda outputs, targets: outputs.square().sum(1))
    assert own.risk.value() > 0


def test_rows_of_different_number(x, y):
    with pytest.raises(errors.DataError, match=r"\[12, 5\]"):
        uw.Data.of((x, y[:5]))


@pytest.mark.parametrize("label", [2, -1])
def test_an_unknown_label_in_cross_entropy(x, y, label):
    model = nn.Linear(3, 2)
    y[8] = label
    with refused(model, errors.LossError, rf"label {label} is unknown: the model has 2 outputs"):
        explain(model, x, y)


def test_labels_of_the_wrong_kind(x, y):
    model = nn.Linear(3, 1)
    with refused(model, errors.LossError, "labels −1 and \\+1.*2·y − 1"):
        explain(model, x, y, loss="hinge")
    with refused(model, errors.LossError, "between 0 and 1, got -1"):
        explain(model, x, 2 * y - 1, loss="binary_cross_entropy")


def test_a_column_never_meets_a_row(x):
    """outputs [n, 1] against targets [n] must not broadcast to [n, n]."""
    model = nn.Linear(3, 1)
    flat = explain(model, x, x[:, 0], loss="mean_squared_error")
    column = explain(model, x, x[:, :1], loss="mean_squared_error")
    np.testing.assert_array_equal(flat.values, column.values)
    with refused(model, errors.LossError, "outputs' size"):
        explain(model, x, x, loss="mean_squared_error")


def test_parameters_that_do_not_require_gradients():
    model = nn.Linear(3, 2).requires_grad_(False)
    with refused(model, errors.ModelError, "requires_grad_"):
        uw.Objective(model, "cross_entropy")
    model.weight.requires_grad_(True)
    with refused(model, errors.ModelError, "bias do not require gradients"):
        uw.Objective(model, "cross_entropy", parameters=["bias"])
    with refused(model, errors.ModelError, "No parameter is called 'wieght'.*weight, bias"):
        uw.Objective(model, "cross_entropy", parameters=["wieght"])
    assert uw.Objective(model, "cross_entropy").space.coverage == 6 / 8


def test_an_indefinite_hessian_without_damping(x, y):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with refused(model, errors.IndefiniteError, "smallest eigenvalue.*damping=.*'ggn'"):
        explain(model, x, y, l2=0.0)
    assert explain(model, x, y, l2=0.0, damping=5.0).shape == (2, 12)
    assert explain(model, x, y, l2=0.01, method="ggn").shape == (2, 12)


def test_a_singular_hessian_without_damping(x, y):
    with pytest.raises(errors.IndefiniteError, match="Add damping"):
        explain(nn.Linear(3, 2), x, y, l2=0.0)


def test_a_failed_solve_is_an_error_unless_accepted(x, y):
    inf = influence(nn.Linear(3, 2), x, y, method=uw.CG(rtol=1e-12, max_steps=1))
    with pytest.raises(errors.NotConvergedError, match="accept=True"):
        inf.explain((x[:1], y[:1]))
    scores = inf.explain((x[:1], y[:1]), accept=True)
    assert "1 of 1 solves accepted although not converged" in repr(scores)


@pytest.mark.parametrize("shape", [(2, 4), (2,), (2, 3, 5)])
def test_queries_of_another_shape(x, y, shape):
    model = nn.Linear(3, 2)
    with refused(model, errors.InputError, "queries|outputs"):
        influence(model, x, y).explain((torch.randn(shape), y[:2]))


def test_queries_without_targets(x, y):
    model = nn.Linear(3, 2)
    with refused(model, errors.InputError, "targets"):
        influence(model, x, y).explain(x)


def test_a_shuffling_loader_never_misaligns_rows(x, y):
    model, data = nn.Linear(3, 2), TensorDataset(x, y)
    wanted = explain(model, x, y)
    for loader in (
        DataLoader(data, batch_size=5, shuffle=True),
        DataLoader(data, batch_size=4, drop_last=True),
    ):
        inf = uw.Influence(model, loader, loss="cross_entropy", l2=0.1)
        np.testing.assert_allclose(inf.explain((x[:2], y[:2])).values, wanted.values, rtol=1e-4)


def test_a_loader_without_batches(x, y):
    with pytest.raises(errors.DataError, match="batch_size=None"):
        uw.Data.of(DataLoader(TensorDataset(x, y), batch_size=None))


@pytest.mark.parametrize(
    "sampler", [WeightedRandomSampler([1.0] * 12, 12), SubsetRandomSampler(range(5))]
)
def test_a_loader_that_does_not_draw_evenly(x, y, sampler):
    with pytest.raises(errors.DataError, match="mean over its dataset.*weights="):
        uw.Data.of(DataLoader(TensorDataset(x, y), sampler=sampler))


def test_the_same_rows_from_every_container(x, y):
    model = nn.Linear(3, 2)
    wanted = explain(model, x, y).values
    frame = pd.DataFrame(x.numpy(), columns=list("abc"))
    labelled = frame.assign(y=y.numpy())
    sources = [
        (x.numpy(), y.numpy().astype(np.int32)),
        (frame, labelled["y"]),
        (pl.DataFrame(x.numpy()), pl.Series(y.numpy())),
        TensorDataset(x, y),
        Subset(TensorDataset(x, y), range(12)),
        [(a, b) for a, b in zip(x, y, strict=True)],
        uw.Data.from_frame(labelled, target="y"),
        uw.Data.from_frame(pl.from_pandas(labelled), target="y"),
    ]
    for source in sources:
        inf = uw.Influence(model, source, loss="cross_entropy", l2=0.1)
        np.testing.assert_allclose(inf.explain((x[:2], y[:2])).values, wanted, rtol=1e-4, atol=1e-6)


def test_a_pandas_index_names_the_rows(x, y):
    frame = pd.DataFrame(x.numpy(), columns=list("abc")).assign(label=y.numpy())
    shuffled = frame.sample(frac=1, random_state=3)
    model = nn.Linear(3, 2)
    inf = uw.Influence(
        model, uw.Data.from_frame(shuffled, target="label"), loss="cross_entropy", l2=0.1
    )
    worst = inf.audit()["id"][:3].tolist()
    # What is dropped by these ids are the rows that were found.
    plain = uw.Influence(model, (x, y), loss="cross_entropy", l2=0.1).audit()["id"][:3].tolist()
    assert worst == plain
    assert shuffled.drop(index=worst).equals(shuffled[~shuffled.index.isin(plain)])
    pair = uw.Data.of((shuffled[["a", "b", "c"]], shuffled["label"]))
    assert pair.ids.tolist() == shuffled.index.tolist()
    assert uw.Data.of({"x": shuffled[["a"]], "labels": y}).ids.tolist() == shuffled.index.tolist()
    named = frame.set_axis([f"row {i}" for i in range(len(x))])
    assert uw.Data.of((x, named["label"])).ids[:2].tolist() == ["row 0", "row 1"]
    assert uw.Data.from_frame(named, target="label").ids[-1] == "row 11"


@pytest.mark.parametrize(
    "index",
    [
        [0] * 12,
        [0.5 * i for i in range(12)],
        pd.date_range("2026-01-01", periods=12),
        pd.MultiIndex.from_product([range(3), range(4)]),
        [0, "a", *range(2, 12)],
        [f"row {min(i, 10)}" for i in range(12)],
    ],
)
def test_an_index_that_names_no_rows_leaves_positions(x, y, index):
    frame = pd.DataFrame(x.numpy(), columns=list("abc"), index=index).assign(label=y.numpy())
    assert uw.Data.from_frame(frame, target="label").ids.tolist() == list(range(12))
    assert uw.Data.of((frame[["a"]], frame["label"])).ids.tolist() == list(range(12))


def test_ids_that_are_given_or_disagree_come_before_an_index(x, y):
    frame = pd.DataFrame(x.numpy(), columns=list("abc"), index=range(5, 17))
    other = pd.Series(y.numpy(), index=range(12, 0, -1))
    assert uw.Data.of((frame, other)).ids.tolist() == list(range(12))
    assert uw.Data.of((frame, y), ids=list("abcdefghijkl")).ids[0] == "a"
    keyed = frame.assign(label=y.numpy(), key=range(20, 32))
    assert uw.Data.from_frame(keyed, target="label", id="key").ids.tolist() == list(range(20, 32))
    polars = pl.from_pandas(keyed)
    assert uw.Data.from_frame(polars, target="label").ids.tolist() == list(range(12))


def test_frames_that_cannot_be_read(x):
    frame = pd.DataFrame({"text": ["a", "b"], "y": [0, 1]})
    with pytest.raises(errors.DataError, match="from_frame"):
        uw.Data.of(frame)
    with pytest.raises(errors.DataError, match="'text'.*not numeric"):
        uw.Data.from_frame(frame, target="y")
    with pytest.raises(errors.DataError, match="no column 'z'"):
        uw.Data.from_frame(frame, target="z")
    with pytest.raises(errors.DataError, match="Encode text"):
        uw.Data.of((frame[["text"]], frame["y"]))


def test_weights_that_cannot_be(x, y):
    for weights in ([1.0] * 3, [-1.0] * 12, [float("nan")] * 12):
        with pytest.raises(errors.DataError, match=r"[Ww]eight"):
            uw.Data.of((x, y), weights=weights)
    data = uw.Data.of((x, y), weights=[0.0] * 12)
    with pytest.raises(errors.LossError, match="No training example has weight"):
        uw.Influence(nn.Linear(3, 2), data, loss="cross_entropy", l2=0.1).explain((x, y))


def test_losses_that_cannot_enter_the_objective():
    for loss, message in (
        (nn.CrossEntropyLoss(weight=torch.ones(2), label_smoothing=0.1), "label smoothing"),
        (nn.CrossEntropyLoss(reduction="sum"), "is a mean"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(2)), "sample"),
        ("crossentropy", "Known names"),
        (3, "callable"),
    ):
        with pytest.raises(errors.LossError, match=message):
            uw.Objective(nn.Linear(3, 2), loss)
    with pytest.raises(errors.LossError, match=r"Hinge\(\) for 0"):
        uw.SmoothHinge(0.0)


def test_settings_that_cannot_be(x, y):
    model = nn.Linear(3, 2)
    for settings, message in (
        ({"l2": -1.0}, "l2 must be"),
        ({"l2": {"nope.*": 1.0}}, "matches no chosen parameter"),
        ({"damping": -1.0}, "damping must be"),
        ({"damping": float("nan")}, "damping must be"),
        ({"loss": None}, "Say what was minimised"),
        ({"method": "exakt"}, "Known: exact"),
        ({"method": 3.5}, "method is a name"),
    ):
        with pytest.raises(errors.InputError, match=message):
            explain(model, x, y, **settings)
    with pytest.raises(errors.InputError, match="removal"):
        uw.Objective(model, "cross_entropy", removal="other")
    with pytest.raises(errors.InputError, match="already carries"):
        uw.Influence(uw.Objective(model, "cross_entropy"), (x, y), loss="hinge")
    with pytest.raises(errors.ModelError, match=r"torch\.nn\.Module"):
        uw.Objective("model", "cross_entropy")
    with pytest.raises(errors.LossError, match="measure 'speed' is unknown"):
        influence(model, x, y).explain((x, y), measure="speed")


def test_whatif_that_cannot_be(x, y):
    inf = influence(nn.Linear(3, 2), x, y)
    with pytest.raises(errors.DataError, match="named twice"):
        inf.whatif(on=(x, y), remove=[1], relabel={1: 0})
    with pytest.raises(errors.DataError, match="factor"):
        inf.whatif(on=(x, y), reweight={1: -2.0})
    with pytest.raises(errors.LossError, match="label 7 is unknown"):
        inf.whatif(on=(x, y), relabel={1: 7})


def test_tokens_have_no_derivative():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    data = (torch.randint(5, (8, 2)), torch.arange(8) % 2)
    inf = uw.Influence(model, data, loss="cross_entropy", l2=0.1, damping=5.0)
    with pytest.raises(errors.InputError, match="integers"):
        inf.perturbation(data, [0])


def test_a_model_off_its_minimum_cannot_be_validated(x, y):
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.mul_(50)
    inf = influence(model, x, y, l2=1e-3)
    with pytest.raises(errors.NumericalError, match="retrain="):
        inf.validate((x, y), top=3, random=3)


def test_validation_needs_enough_removals(x, y):
    inf = influence(nn.Linear(3, 2), x, y)
    for top, random in ((2, 0), (10, 5), (-1, 3)):
        with pytest.raises(errors.InputError, match="Cannot remove"):
            inf.validate((x, y), top=top, random=random)


def test_baselines_invert_nothing(x, y):
    inf = influence(nn.Linear(3, 2), x, y, method="euclidean")
    assert "a similarity" in repr(inf.explain((x, y)))
    with pytest.raises(errors.InputError, match="is a baseline and inverts no curvature"):
        inf.self_influence()


def test_mixed_dtypes_are_refused_with_the_fix():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double())
    with pytest.raises(errors.ModelError, match="mix dtypes"):
        uw.Objective(model, "cross_entropy")


def test_missing_packages_say_how_to_get_them(monkeypatch):
    from upweight.packages import require

    with pytest.raises(errors.MissingPackageError, match="pip install scikit-learn"):
        require("sklearn.nothing_of_the_kind", "this")


def test_soft_targets_that_are_no_probabilities_are_refused():
    x, soft = torch.randn(6, 3), torch.rand(6, 2)
    with pytest.raises(errors.LossError, match="sum of 1"):
        uw.Influence(torch.nn.Linear(3, 2), (x, soft), loss="cross_entropy", l2=0.1).risk  # noqa: B018
