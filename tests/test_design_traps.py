"""Wrong answers that look right, each with the tests that it is right or refused here.

The table below names them all; those that no other file has are at the end of this one.
"""

import ast
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import upweight as uw
from upweight import errors

# What goes wrong -> tests, "file::test" or "file::test[case]".
TRAPS = {
    "dropout or batch normalisation in train mode": (
        "test_bad_input::test_a_model_in_train_mode_with_random_layers",
        "test_bad_input::test_a_model_that_is_random_in_its_own_way",
        "test_traps::test_frozen_layers_and_modes_are_part_of_the_model",
    ),
    "losses that couple the rows of a batch": ("test_bad_input::test_a_loss_that_couples_rows",),
    "ignored tokens counted": (
        "test_design_traps::test_the_objective_is_torchs_own_mean[ignored tokens]",
        "test_traps::test_sequences_padded_batch_by_batch",
    ),
    "class weights ignored": (
        "test_design_traps::test_the_objective_is_torchs_own_mean[class weights]",
        "test_traps::test_relabelling_moves_the_weight_of_the_class_too",
    ),
    "label smoothing ignored": (
        "test_design_traps::test_the_objective_is_torchs_own_mean[label smoothing]",
    ),
    "sample weights ignored": ("test_influence::test_sample_weights_count_like_copies",),
    "weight decay ignored": (
        "test_influence::test_ridge_leave_one_out_through_the_leverage",
        "test_design_traps::test_weight_decay_is_part_of_the_curvature",
    ),
    "layers skipped in silence": (
        "test_layers::test_rules[addmm]",
        "test_layers::test_no_rule[einsum]",
        "test_layers::test_all_parameters_are_covered",
        "test_stock_models::test_gradients_are_those_of_a_loop[gpt2]",
    ),
    "low coverage": ("test_precision::test_a_small_part_must_be_meant",),
    "tied weights": (
        "test_stock_models::test_tied_tables_are_one_parameter",
        "test_kronecker::test_a_tied_weight_is_a_lookup_and_a_product",
        "test_influence::test_scores_are_the_reference_ones[tied transformer]",
    ),
    "a layer called twice": (
        "test_layers::test_rules[called twice]",
        "test_layers::test_rules[called three times]",
        "test_layers::test_rules[convolution called twice]",
    ),
    "padded sequences": (
        "test_influence::test_padding_changes_nothing",
        "test_kronecker::test_padding_changes_nothing",
    ),
    "a loss divided by something else than the batch": (
        "test_bad_input::test_a_loss_that_is_not_per_example",
        "test_bad_input::test_losses_that_cannot_enter_the_objective",
        "test_design_traps::test_the_objective_is_torchs_own_mean[tokens]",
    ),
    "shuffled loaders": (
        "test_bad_input::test_a_shuffling_loader_never_misaligns_rows",
        "test_bad_input::test_a_loader_that_does_not_draw_evenly",
    ),
    "changing loaders": (
        "test_bad_input::test_data_that_changes_between_readings",
        "test_bad_input::test_data_that_changes_later",
    ),
    "an indefinite curvature without damping": (
        "test_bad_input::test_an_indefinite_hessian_without_damping",
        "test_traps::test_lissa_finds_negative_curvature",
        "test_solvers::test_cg_finds_negative_curvature",
    ),
    "conjugate gradients that did not converge": (
        "test_bad_input::test_a_failed_solve_is_an_error_unless_accepted",
        "test_solvers::test_cg_that_stops_early_says_so_per_column",
    ),
    "a recursion that diverged": (
        "test_solvers::test_lissa_that_diverges_is_named_and_not_nan_in_silence",
        "test_traps::test_lissa_that_went_nowhere_is_not_converged",
    ),
    "inverses of batches averaged": (
        "test_design_traps::test_inverses_of_batches_are_not_averaged",
        "test_influence::test_batch_size_and_query_split_change_nothing",
        "test_kronecker::test_batches_of_the_fit_change_nothing",
    ),
    "float32 with unscaled features": (
        "test_design_traps::test_unscaled_features_in_float32_are_right_or_refused",
    ),
    "stale caches": (
        "test_bad_input::test_a_model_that_changed_since",
        "test_scores::test_a_directory_of_another_run_is_refused",
        "test_traps::test_other_questions_are_other_runs",
        "test_fingerprints::test_settings_that_matter_make_another_run",
    ),
    "attention kernels without second derivatives": (
        "test_influence::test_scores_are_the_reference_ones[dot product attention]",
        "test_influence::test_scores_are_the_reference_ones[encoder layer]",
    ),
    "hooks left behind after an error": (
        "test_layers::test_nothing_is_changed_by_an_error",
        "test_bad_input::test_nan_in_a_loss_names_the_batch",
    ),
    "mixed precision": (
        "test_precision::test_gradients_under_autocast_are_those_of_a_loop_under_autocast",
        "test_precision::test_autocast_that_the_objective_does_not_know_is_refused",
    ),
    "layers that change themselves": (
        "test_precision::test_renormalising_tables_are_refused_and_left_alone",
        "test_precision::test_models_that_write_to_themselves_are_refused",
    ),
}
HERE = Path(__file__).parent


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_has_its_tests(trap):
    for named in TRAPS[trap]:
        file, test = named.split("::")
        name, _, case = test.rstrip("]").partition("[")
        text = (HERE / f"{file}.py").read_text()
        defined = {n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
        assert name in defined, named
        cases = text + (HERE / "cases.py").read_text()
        assert not case or f'"{case}"' in cases, named


# What torch would minimise, by its own reduction, against scores


def naive(model, total, parts, query, l2):
    """Scores ∇m(q) (∇²R + λ)⁻¹ ∇ part_i with derivatives of functions of the parameter row."""
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    row = torch.cat([p.detach().flatten() for p in model.parameters()])

    def at(function):
        def of(values):
            pieces = values.split([shape.numel() for shape in shapes])
            params = {n: x.view(s) for n, x, s in zip(names, pieces, shapes, strict=True)}
            return function(lambda x: torch.func.functional_call(model, params, (x,)))

        return of

    hessian = torch.func.hessian(at(total))(row) + l2 * torch.eye(len(row)).double()
    asked = torch.func.jacrev(at(query))(row)
    return asked @ torch.linalg.solve(hessian, torch.func.jacrev(at(parts))(row).T)


def shuffled(logits):
    """``[n, s, c]`` as torch's criterion wants them, ``[n·s, c]``."""
    return logits.flatten(0, -2)


def rowwise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(9, 3).double(), torch.arange(9) % 3


def sequences(*, ignored):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randint(5, (7, 4)), torch.randint(3, (7, 4))
    if ignored:
        y = y.masked_fill(torch.arange(4) >= torch.tensor([4, 3, 1, 2, 4, 1, 3])[:, None], -100)
    return model, x, y


WEIGHTS = torch.tensor([1.0, 2.0, 0.5]).double()


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        pytest.param(rowwise, {}, id="plain"),
        pytest.param(rowwise, {"weight": WEIGHTS}, id="class weights"),
        pytest.param(rowwise, {"label_smoothing": 0.2}, id="label smoothing"),
        pytest.param(partial(sequences, ignored=False), {}, id="tokens"),
        pytest.param(partial(sequences, ignored=True), {}, id="ignored tokens"),
    ],
)
def test_the_objective_is_torchs_own_mean(make, settings):
    """R is criterion(outputs, targets) over all data; an example is its part of that mean."""
    model, x, y = make()
    criterion = nn.CrossEntropyLoss(**settings)
    asked = {k: v for k, v in settings.items() if k != "weight"}
    summed = nn.CrossEntropyLoss(**settings, reduction="sum")
    with torch.no_grad():
        outputs = shuffled(model(x))
        divisor = summed(outputs, y.flatten()) / criterion(outputs, y.flatten())
    queries = torch.arange(3) if not (y < 0).any() else torch.tensor([0, 4])  # without padding

    def total(f):
        return criterion(shuffled(f(x)), y.flatten())

    def parts(f):
        z = f(x)
        return (
            torch.stack([summed(shuffled(z[i]), y[i].flatten()) for i in range(len(x))]) / divisor
        )

    def query(f):
        z = f(x[queries])
        losses = [
            F.cross_entropy(shuffled(z[k]), y[q].flatten(), **asked)
            for k, q in enumerate(queries.tolist())
        ]
        return torch.stack(losses)

    def shaped(f):
        return f if y.dim() > 1 else lambda x: f(x)[:, None]

    wanted = naive(model, total, lambda f: parts(shaped(f)), lambda f: query(shaped(f)), 1.0)
    objective = uw.Objective(model, criterion, l2=1.0, removal="sum")
    for method in ("exact", "cg"):
        found = uw.Influence(objective, (x, y), method=method).explain((x[queries], y[queries]))
        rtol = 1e-8 if method == "exact" else 1e-3
        scale = float(wanted.abs().max())
        np.testing.assert_allclose(found.values, wanted.numpy(), rtol=rtol, atol=rtol * scale)


def test_weight_decay_is_part_of_the_curvature():
    """Scores with L2 are those of (H + λ), and not those without it."""
    model, x, y = rowwise()

    def total(f):
        return F.cross_entropy(f(x), y)

    def parts(f):
        return F.cross_entropy(f(x), y, reduction="none") / len(x)

    def query(f):
        return F.cross_entropy(f(x[:2]), y[:2], reduction="none")

    found = {}
    for l2 in (1.0, 2.0):
        objective = uw.Objective(model, "cross_entropy", l2=l2, removal="sum")
        found[l2] = uw.Influence(objective, (x, y)).explain((x[:2], y[:2])).values
        wanted = naive(model, total, parts, query, l2).numpy()
        np.testing.assert_allclose(found[l2], wanted, rtol=1e-8, atol=1e-12)
    assert not np.allclose(found[1.0], found[2.0], rtol=0.1)


def test_inverses_of_batches_are_not_averaged():
    """The mean over batches' own inverses has nearly the right order and the wrong values."""
    torch.manual_seed(0)
    x, y = torch.randn(48, 3).double(), torch.arange(48) % 3
    model, asked = nn.Linear(3, 3).double(), (torch.randn(4, 3).double(), torch.arange(4) % 3)

    def total(f, cut=slice(None)):
        return F.cross_entropy(f(x[cut]), y[cut])

    def parts(f):
        return F.cross_entropy(f(x), y, reduction="none") / len(x)

    def query(f):
        return F.cross_entropy(f(asked[0]), asked[1], reduction="none")

    objective = uw.Objective(model, "cross_entropy", l2=0.05, removal="sum")
    wanted = naive(model, total, parts, query, 0.05).numpy()
    for size in (1, 8, 13, 48):
        loader = DataLoader(TensorDataset(x, y), batch_size=size)
        for method in ("exact", "ggn"):
            found = uw.Influence(objective, loader, method=method).explain(asked).values
            np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-13)
    batches = [partial(total, cut=slice(at, at + 8)) for at in range(0, 48, 8)]
    averaged = sum(naive(model, batch, parts, query, 0.05).numpy() for batch in batches) / 6
    assert np.corrcoef(averaged.ravel(), wanted.ravel())[0, 1] > 0.9
    assert np.abs(averaged - wanted).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("method", ["exact", "cg", "ggn"])
@pytest.mark.parametrize("spread", [1.0, 1e2, 1e3, 1e4])
def test_unscaled_features_in_float32_are_right_or_refused(method, spread):
    """Ages beside incomes: the condition of H grows with the square of their ratio."""
    torch.manual_seed(0)
    x = torch.randn(40, 3).double() * torch.tensor([1 / spread, 1.0, spread])
    y, query = torch.arange(40) % 2, slice(0, 5)
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        model.weight.div_(torch.tensor([1 / spread, 1.0, spread]))
    settings = {"loss": "binary_cross_entropy", "l2": 1e-4, "method": method}
    wanted = uw.Influence(model, (x, y), **{**settings, "method": "exact"})
    wanted = wanted.explain((x[query], y[query])).values
    single = uw.Influence(model.float(), (x.float(), y), **settings)
    try:
        found = single.explain((x[query].float(), y[query])).values
    except errors.NumericalError:
        assert spread >= 1e2  # well scaled data is never refused
        return
    gap = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert gap.max() < 0.02, gap
