"""Projected rows are their dense definitions, with P made by projecting the identity."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import upweight as uw
from tests.cases import CASES, CONVOLUTIONS, Case, as_reference
from upweight import errors, reference
from upweight.curvature import EKFAC, KFAC, Labels
from upweight.curvature.moments import eigen
from upweight.data import Data
from upweight.gradients import layout_of, per_example
from upweight.linalg import (
    Block,
    BlockGradients,
    Cholesky,
    Dense,
    DenseGradients,
    FactoredGradients,
    Outer,
    Spectral,
)
from upweight.linalg.columns import as_blocks, columns
from upweight.methods import METHODS, Method
from upweight.probes import peak_bytes
from upweight.projections import (
    GaussianEntries,
    LeadingDirections,
    LeadingEigenvalues,
    LowRankKernel,
    ProjectedKernel,
    Pulled,
    RademacherEntries,
    RandomSides,
    SparseEntries,
    compression_of,
)
from upweight.projections.entries import RandomProjection
from upweight.projections.lifted import Lifted, ProjectedRows, Stored
from upweight.projections.lowrank import RankFactors
from upweight.projections.operator import Projected
from upweight.projections.projection import Unprojected
from upweight.risk import Risk
from upweight.solvers import Nystrom

EVERY = CASES + CONVOLUTIONS
every_case = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
both_removals = pytest.mark.parametrize("removal", ["mean", "sum"])
ENTRIES = [
    RademacherEntries(9),
    GaussianEntries(9, seed=3),
    SparseEntries(9),
    SparseEntries(9, 2, nonzeros=1),
]
every_entries = pytest.mark.parametrize("entries", ENTRIES, ids=str)
LAMBDA = 0.07


@pytest.fixture(autouse=True)
def _plain_attention():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def named(name: str) -> Case:
    return next(case for case in EVERY if case.name == name)


def close(found, wanted, rtol=1e-8) -> None:
    found, wanted = (torch.as_tensor(np.ascontiguousarray(x)) for x in (found, wanted))
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= rtol * float(wanted.norm())


def front(risk: Risk, method, damping=LAMBDA) -> uw.Influence:
    return uw.Influence(risk.objective, risk.data, method=method, damping=damping)


def row(name: str, curvature, solver=None) -> Method:
    """A row of the table with another curvature."""
    made = METHODS[name]
    assert isinstance(made, Method)
    return replace(made, curvature=curvature, solver=solver or made.solver)


SMALL = {
    "trak": row("trak", ProjectedKernel(SparseEntries(9, nonzeros=2), "margin")),
    "trak_gaussian": row("trak", ProjectedKernel(GaussianEntries(9), "margin")),
    "logra": row("logra", ProjectedKernel(RandomSides(2))),
    "logra_pca": row("logra", ProjectedKernel(LeadingDirections(4))),
    "leading_ekfac": row("leading_ekfac", LeadingEigenvalues(5)),
    "lorif": row("lorif", LowRankKernel(RandomSides(3), Nystrom(50)), Pulled(Nystrom(50))),
}
each_small = pytest.mark.parametrize("name", list(SMALL))


def has_margin(risk: Risk) -> bool:
    try:
        ProjectedKernel(RademacherEntries(2), "margin")(risk)
    except errors.LossError:
        return False
    return True


def gradients_of(risk: Risk, measure="loss") -> Tensor:
    """Gradients of a measure of every example, one by one, ``[n, p]``."""
    theta = as_reference(risk)[1]
    objective = risk.objective
    batch, shares = risk.at(torch.arange(len(risk.data)))
    measured = objective.measured(measure)
    found = []
    for i in range(len(shares)):
        one = batch.part(slice(i, i + 1))
        value = lambda t, one=one: measured(objective.space.unflatten(t), one)[0]  # noqa: E731
        found.append(reference.gradient(value, theta))
    return torch.stack(found)


def row_of(p: int) -> Tensor:
    return torch.zeros(p, dtype=torch.float64)


def matrix_of(projection) -> Tensor:
    """P, ``[k, p]``: the projection of the identity."""
    eye = torch.eye(projection.size, dtype=torch.float64)
    return projection.project(DenseGradients(eye)).T


def ridge_of(risk: Risk, projection) -> Tensor:
    """L2 in k dimensions: that of a coordinate's parameters, or its mean over all."""
    l2, p = risk.objective.l2, matrix_of(projection)
    return (p.square() @ l2 / p.square().sum(1)) if bool((l2 > 0).any()) else p.new_zeros(len(p))


def scores(risk: Risk, inverse: Tensor, training: Tensor, measure="loss") -> Tensor:
    """share_i ∇m_q H⁻¹ (∇ℓ_i + [inside] Λθ) with training gradients as they are given."""
    objective = risk.objective
    extra = objective.l2 * objective.space.row() * (objective.removal == "mean")
    _, shares = risk.at(torch.arange(len(risk.data)))
    return gradients_of(risk, measure) @ inverse @ (training + extra).T * shares


def pulled(projection, kernel: Tensor, damping=LAMBDA) -> Tensor:
    """Pᵀ (K + λ)⁻¹ P."""
    p = matrix_of(projection)
    eye = torch.eye(len(kernel), dtype=torch.float64)
    return p.T @ torch.linalg.inv(kernel + damping * eye) @ p


def moment(risk: Risk, values: Tensor) -> Tensor:
    """Σ share v vᵀ."""
    total = torch.zeros(values.shape[1], values.shape[1], dtype=torch.float64)
    _, shares = risk.at(torch.arange(len(risk.data)))
    for share, value in zip(shares, values, strict=True):
        total = total + (share * torch.outer(value, value) if share > 0 else 0)
    return total


def block_diagonal(matrix: Tensor, widths) -> Tensor:
    parts, at = [], 0
    for width in widths:
        parts.append(matrix[at : at + width, at : at + width])
        at += width
    return torch.block_diag(*parts)


# The rows


@every_case
@both_removals
@pytest.mark.parametrize("name", ["trak", "trak_gaussian"])
def test_trak_is_its_dense_definition(case, name, removal):
    risk = case.risk(removal=removal)
    inf = front(risk, SMALL[name])
    if not has_margin(risk):
        with pytest.raises(errors.LossError, match=r"Use method='logra'.*ProjectedKernel\(\.\.\."):
            inf.explain(risk.data)
        return
    kernel = inf._made.curvature
    assert isinstance(kernel, Projected)
    projection = kernel.projection
    values = gradients_of(risk, "margin") @ matrix_of(projection).T
    wanted = moment(risk, values) + ridge_of(risk, projection).diag()
    close(kernel.to_dense(), wanted)
    inverse = pulled(projection, wanted)
    close(inf.explain(risk.data).values, scores(risk, inverse, gradients_of(risk)))
    counted = risk.weights > 0
    found = inf.explain(risk.data.take(counted.nonzero()[:, 0]), measure="margin").values
    close(found, scores(risk, inverse, gradients_of(risk), "margin")[counted])
    close(inf.inverse.to_dense(), inverse)


@every_case
@both_removals
@pytest.mark.parametrize("name", ["logra", "logra_pca"])
def test_logra_is_its_dense_definition(case, name, removal):
    risk = case.risk(removal=removal)
    inf = front(risk, SMALL[name])
    kernel = inf._made.curvature
    assert isinstance(kernel, Projected)
    projection = kernel.projection
    values = gradients_of(risk) @ matrix_of(projection).T
    wanted = block_diagonal(moment(risk, values), projection.widths)
    wanted += ridge_of(risk, projection).diag()
    close(kernel.to_dense(), wanted)
    inverse = pulled(projection, wanted)
    close(inf.explain(risk.data).values, scores(risk, inverse, gradients_of(risk)))
    close(inf.inverse.to_dense(), inverse)
    own = scores(risk, inverse, gradients_of(risk)).diagonal()
    close(inf.self_influence(), own, rtol=1e-7)


# Where a layer's fifth eigenvalue is its sixth: squared errors bend alike for all outputs, and
# biases of keys change nothing.
TIES = {
    *("ridge of two", "regression net", "dot product attention"),
    *("encoder layer", "keyword inputs", "recurrent"),
}


@every_case
@both_removals
def test_leading_ekfac_is_ekfac_on_its_leading_directions(case, removal):
    risk = case.risk(removal=removal)
    inf = front(risk, SMALL["leading_ekfac"])
    fitted = EKFAC(rows="auto")(risk)
    inverse, unique = torch.zeros(fitted.size, fitted.size, dtype=torch.float64), True
    for part in fitted.blocks:
        _, o, i = part.block.shape
        places, sizes = part.block.places(), part.values.flatten()
        order = sizes.argsort(descending=True)
        unique &= len(sizes) <= 5 or bool(sizes[order[4]] > sizes[order[5]] + 1e-9)
        for pair in order[:5].tolist():
            group, j, l = pair // (o * i), pair // i % o, pair % i
            left = torch.eye(o).double() if part.left is None else part.left[group]
            right = torch.eye(i).double() if part.right is None else part.right[group]
            row = torch.zeros(fitted.size, dtype=torch.float64)
            row[places[group].flatten()] = torch.outer(left[:, j], right[:, l]).flatten()
            inverse += torch.outer(row, row) / (part.values.flatten()[pair] + LAMBDA)
    if not unique:  # which of equal ones are kept is open
        found, wanted = (
            torch.linalg.eigvalsh(inf.inverse.to_dense()),
            torch.linalg.eigvalsh(inverse),
        )
        assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-8)
        assert case.name in TIES
        return
    close(inf.inverse.to_dense(), inverse)
    close(inf.explain(risk.data).values, scores(risk, inverse, gradients_of(risk)))


def low_rank(projection, training: Tensor, rank: int) -> Tensor:
    """Projected gradients with each layer's matrix cut to its leading singular values."""
    values, at = training @ matrix_of(projection).T, 0
    found = values.clone()
    for side, width in zip(projection.sides, projection.widths, strict=True):
        shape = side.basis.values.shape
        u, s, v = torch.linalg.svd(values[:, at : at + width].view(-1, *shape), full_matrices=False)
        cut = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
        found[:, at : at + width] = cut.flatten(1)
        at += width
    return found


@every_case
@both_removals
def test_lorif_is_its_dense_definition(case, removal):
    risk = case.risk(removal=removal)
    inf = front(risk, SMALL["lorif"])
    projection = inf._made.curvature.projection
    p, training = matrix_of(projection), gradients_of(risk)
    values = low_rank(projection, training, 1)
    kernel = moment(risk, values) + ridge_of(risk, projection).diag()
    inverse = torch.linalg.inv(kernel + LAMBDA * torch.eye(len(kernel)))
    _, shares = risk.at(torch.arange(len(risk.data)))
    extra = risk.objective.l2 * risk.objective.space.row() * (removal == "mean")
    wanted = training @ p.T @ inverse @ (values + extra @ p.T).T * shares
    close(inf.explain(risk.data).values, wanted, rtol=1e-6)
    own = (values * (values @ inverse)).sum(1) + values @ inverse @ p @ extra
    close(inf.self_influence(), own * shares, rtol=1e-6)


@pytest.mark.parametrize("rank", [2, 3])
def test_factors_that_hold_all_of_a_gradient_change_nothing(rank):
    """With as many products as positions or sides lorif is logra with the layers together."""
    risk = named("convolution").risk()
    inf = front(risk, row("lorif", LowRankKernel(RandomSides(3), Nystrom(50), rank=3)))
    projection = inf._made.curvature.projection
    values = gradients_of(risk) @ matrix_of(projection).T
    close(low_rank(projection, gradients_of(risk), 3), values, rtol=1e-12)
    wanted = pulled(projection, moment(risk, values) + ridge_of(risk, projection).diag())
    close(inf.explain(risk.data).values, scores(risk, wanted, gradients_of(risk)), rtol=1e-6)


def test_a_sketch_of_few_directions_is_nystrom_of_the_moment():
    risk = named("mlp").risk()
    fitted = LowRankKernel(RandomSides(3), Nystrom(2))(risk)
    whole = LowRankKernel(RandomSides(3), Cholesky())(risk).parts[0].to_dense()
    ridge = ridge_of(risk, fitted.projection)
    core = whole - ridge.diag()
    tests = Nystrom(2)._rows(Dense(whole))[0]
    product = tests @ core
    wanted = product.T @ torch.linalg.pinv(tests @ product.T) @ product + ridge.diag()
    close(fitted.to_dense(), wanted, rtol=1e-7)


# Random projections


@every_entries
def test_columns_have_length_one_and_little_in_common(entries):
    p, seeds = 40, 400
    total = torch.zeros(p, p, dtype=torch.float64)
    for seed in range(seeds):
        matrix = matrix_of(RandomProjection(replace(entries, seed=seed), row_of(p)))
        total += matrix.T @ matrix / seeds
    # Of PᵀP the variance of an entry is at most 2/k.
    error = (2 / (entries.width * seeds)) ** 0.5
    gap = total - torch.eye(p)
    assert gap.abs().max() < 5 * error
    assert abs(gap.mean()) < 5 * error / p
    if not isinstance(entries, GaussianEntries):
        assert torch.allclose(total.diag(), torch.ones(p).double(), rtol=1e-12)


def test_entries_are_what_they_say():
    places = torch.arange(5000)
    like = torch.ones(1, dtype=torch.float64)
    signs = RademacherEntries(100).entries(places, like)
    assert torch.equal(signs.abs(), torch.full_like(signs, 0.1))
    assert abs(signs.mean() * 10) < 5 / signs.numel() ** 0.5
    normal = GaussianEntries(100).entries(places, like) * 10
    quantiles = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).double()
    share = (normal.flatten()[:, None] < quantiles).double().mean(0)
    assert torch.allclose(share, torch.special.ndtr(quantiles), atol=5 * 0.5 / 500_000**0.5)
    sparse = matrix_of(RandomProjection(SparseEntries(10, nonzeros=3), row_of(5000)))
    for start, stop in ((0, 3), (3, 6), (6, 10)):
        part = sparse[start:stop]
        assert torch.equal((part != 0).sum(0), torch.ones(5000).long())
        counts = (part != 0).double().mean(1)
        assert torch.allclose(counts, torch.full_like(counts, 1 / (stop - start)), atol=0.05)
    assert torch.allclose(sparse.square().sum(0), torch.ones(5000).double())


@every_entries
def test_a_projection_and_its_transpose_are_one_matrix(entries):
    projection = RandomProjection(entries, row_of(30))
    values = torch.randn(4, 9, dtype=torch.float64)
    close(projection.spread(values), values @ matrix_of(projection), rtol=1e-14)
    assert not torch.equal(
        matrix_of(projection), matrix_of(RandomProjection(replace(entries, seed=77), row_of(30)))
    )


@every_entries
def test_many_queries_stay_projected_and_score_alike(entries, monkeypatch):
    risk = named("convolution").risk()
    inf = front(risk, row("trak", ProjectedKernel(entries, "margin")))
    few = inf.explain(risk.data).values
    assert isinstance(inf._made.precondition(risk.data, "loss", accept=False)[0], Tensor)
    monkeypatch.setattr(type(entries), "work", 3)
    rows = inf._made.precondition(risk.data, "loss", accept=False)[0]
    assert isinstance(rows, ProjectedRows)
    assert len(rows) == 7
    close(inf.explain(risk.data).values, few, rtol=1e-11)


@every_case
@every_entries
def test_gradients_are_projected_in_their_factors(case, entries):
    risk = case.risk()
    projection = RandomProjection(entries, risk.objective.l2)
    batch, _ = risk.at(torch.arange(len(risk.data)))
    found = projection.project(per_example(risk.objective, batch))
    close(found, gradients_of(risk) @ matrix_of(projection).T, rtol=1e-9)


def test_as_many_dimensions_as_parameters_need_no_projection():
    risk = named("mlp").risk()
    assert isinstance(RademacherEntries(27)(risk), Unprojected)
    assert isinstance(RademacherEntries(26)(risk), RandomProjection)
    inf = front(risk, row("trak", ProjectedKernel(RademacherEntries(27), "loss")))
    wanted = front(risk, "empirical_fisher").explain(risk.data).values
    close(inf.explain(risk.data).values, wanted)


def test_many_dimensions_come_near_the_unprojected_scores():
    """Also with L2, which stays as large beside a projected curvature as it was."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    data = torch.randn(12, 30).double(), torch.arange(12) % 3
    gaps = []
    for width in (150, 600):
        inf = uw.Influence(
            model, data, loss="cross_entropy", l2=0.3,
            method=row("trak", ProjectedKernel(RademacherEntries(width), "loss")),
        )  # fmt: skip
        objective = inf.objective
        exact = uw.Influence(objective, data, method="empirical_fisher").explain(data).values
        found = inf.explain(data).values
        gaps.append(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    assert gaps[0] < 0.5
    assert gaps[1] < 0.25


def test_l2_that_differs_between_parameters_is_said():
    risk = named("mlp").risk(l2={"0.*": 0.1, "2.weight": 0.4})
    inf = front(risk, SMALL["trak"])
    caveats = inf.explain(risk.data).provenance.caveats
    assert any("the projection has its mean, 0.189" in caveat for caveat in caveats)
    close(inf._made.curvature.projection.ridge(risk.objective.l2), [(0.1 * 15 + 0.4 * 9) / 27] * 9)
    for name in ("logra", "leading_ekfac", "lorif"):
        assert not any("L2" in c and "mean" in c for c in front(risk, SMALL[name]).inverse.notes)


# Sides


@every_case
def test_two_sides_are_orthogonal_and_of_the_stated_length(case):
    risk = case.risk()
    for maker in (RandomSides(2), LeadingDirections(3)):
        projection = maker(risk)
        p = matrix_of(projection)
        close(p @ p.T, projection.squares.diag(), rtol=1e-10)
        values = torch.randn(4, projection.width, dtype=torch.float64)
        close(projection.spread(values), values @ p, rtol=1e-12)
        batch, _ = risk.at(torch.arange(len(risk.data)))
        found = projection.project(per_example(risk.objective, batch))
        close(found, gradients_of(risk) @ p.T, rtol=1e-9)


def test_random_sides_keep_lengths_on_average():
    torch.manual_seed(0)
    data = Data.of((torch.randn(5, 6).double(), torch.arange(5) % 2))
    risk = Risk(uw.Objective(nn.Linear(6, 5).double(), "cross_entropy"), data)
    total = torch.zeros(35, 35, dtype=torch.float64)
    for seed in range(400):
        p = matrix_of(RandomSides(3, seed)(risk))
        assert p.shape == (9, 35)
        total += p.T @ p / 400
    gap = total - torch.eye(35)
    assert gap.abs().max() < 0.4
    assert abs(gap.diag().mean()) < 1e-12  # its trace is p
    assert abs(gap.mean()) < 0.02


def test_principal_directions_are_the_leading_pairs_of_kfac():
    risk = named("mlp").risk()
    projection = LeadingDirections(4)(risk)
    fitted = KFAC(slopes=Labels())(risk)
    at = 0
    for part, width in zip(fitted.blocks, projection.widths, strict=True):
        p = matrix_of(projection)[at : at + width]
        found = (p @ fitted.to_dense() @ p.T).diag().sort().values
        close(found, part.values.flatten().sort().values[-4:])
        at += width


def test_a_side_that_is_short_is_left_as_it_is():
    risk = named("mlp").risk()
    projection = RandomSides(5)(risk)
    assert projection.width == projection.size
    close(torch.cat([s.basis.values.flatten() for s in projection.sides]), torch.ones(27))
    inf = front(risk, row("logra", ProjectedKernel(RandomSides(5))))
    p = matrix_of(projection)
    close(p.T @ p, torch.eye(27), rtol=1e-12)
    kernel = block_diagonal(moment(risk, gradients_of(risk) @ p.T), projection.widths)
    wanted = pulled(projection, kernel + 0.03 * torch.eye(27))
    close(inf.explain(risk.data).values, scores(risk, wanted, gradients_of(risk)))


# What changes nothing


def problem(name: str, order: Tensor | None = None, batch_size: int | None = None):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv1d(2, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    x, y = torch.randn(20, 2, 5).double(), torch.arange(20) % 2
    data = Data.of((x, y), batch_size=batch_size)
    data = data if order is None else data.take(order)
    queries = Data.of((torch.randn(5, 2, 5).double(), torch.arange(5) % 2), batch_size=batch_size)
    objective = uw.Objective(model, "cross_entropy", l2=0.1)
    return uw.Influence(objective, data, method=STABLE[name]), queries


# Drawn labels go by place.
STABLE = SMALL | {
    "leading_ekfac": row("leading_ekfac", LeadingEigenvalues(5, EKFAC(slopes=Labels()))),
    "trak": row("trak", ProjectedKernel(SparseEntries(30), "margin")),
}


@each_small
def test_batches_order_and_splits_change_nothing(name):
    inf, queries = problem(name)
    whole = inf.explain(queries).values
    for size in (1, 3, 20):
        again, same = problem(name, batch_size=size)
        close(again.explain(same).values, whole)
    order = torch.randperm(20)
    again, _ = problem(name, order)
    close(again.explain(queries).values, whole[:, order.numpy()])
    inputs, targets = queries.rows().inputs[0], queries.rows().targets
    parts = [inf.explain((inputs[some], targets[some])).values for some in ([0, 1], [2, 3, 4])]
    close(np.concatenate(parts), whole)


@each_small
def test_small_pieces_change_nothing(name, monkeypatch):
    inf, queries = problem(name)
    whole = inf.explain(queries).values
    monkeypatch.setattr("upweight.linalg.blocks.PIECE_BYTES", 600)
    again, _ = problem(name)
    close(again.explain(queries).values, whole)
    tokens = named("tied transformer").risk()
    batch, _ = tokens.at(torch.arange(len(tokens.data)))
    projection = RandomProjection(SparseEntries(9), tokens.objective.l2)
    found = projection.project(per_example(tokens.objective, batch))
    close(found, gradients_of(tokens) @ matrix_of(projection).T, rtol=1e-9)


@each_small
def test_a_sweep_is_separate_runs_from_one_fit(name, monkeypatch):
    inf, queries = problem(name)
    fits = []
    fit = type(inf.method.curvature).__call__
    monkeypatch.setattr(
        type(inf.method.curvature), "__call__", lambda self, risk: fits.append(1) or fit(self, risk)
    )
    sweep = inf.sweep(queries, [0.01, 0.2])
    assert fits == [1]
    for damping in (0.01, 0.2):
        alone = uw.Influence(inf.objective, inf.data, method=inf.method, damping=damping)
        close(sweep[damping].values, alone.explain(queries).values)


def test_auto_damping_is_a_share_of_the_mean_in_k_dimensions():
    risk = named("mlp").risk(l2=0.0)
    inf = front(risk, SMALL["logra"], damping="auto")
    inf.explain(risk.data)
    kernel = inf._made.curvature.to_dense()
    assert inf._made.shift == pytest.approx(0.1 * float(kernel.trace()) / len(kernel), rel=1e-12)


@each_small
def test_every_question_of_the_front_takes_it(name):
    inf, queries = problem(name)
    whole = inf.explain(queries)
    found = inf.extremes(queries, 2)
    close(found.largest, np.sort(whole.values)[:, ::-1][:, :2])
    ids = whole.train_ids[:2]
    moved = inf.params(ids).rows
    asked = per_example(inf.objective, queries.rows()).dense()
    effects = inf.group_effects([list(ids)], on=queries)
    close(effects.first[:, 0], (asked @ moved.T).sum(1))
    assert np.isfinite(effects.second).all()
    if name != "lorif":  # whose scores are of what it keeps
        close(asked @ moved.T, whole.values[:, :2])


# What is kept


@pytest.mark.parametrize("name", ["logra", "logra_pca", "leading_ekfac", "lorif"])
def test_kept_gradients_answer_a_second_time_without_the_model(name, tmp_path):
    inf, queries = problem(name)
    kept = inf._made.training.compression
    whole = inf.explain(queries).values
    if kept is None:  # the factors are shorter
        return
    found = list(inf._made.training.each(lambda seen: seen.gradients, "kept"))
    assert all(isinstance(gradients, Lifted) for gradients in found)
    p = matrix_of(inf._made.curvature.projection)
    for gradients in found:
        dense = gradients.dense()
        inner = gradients.inner.dense()
        close(dense @ p.T, inner)
        rows, weights = torch.randn(3, p.shape[1]).double(), torch.randn(2, len(dense)).double()
        close(gradients.dot(rows), rows @ dense.T)
        close(gradients.combine(weights), weights @ dense)
        close(gradients.squared_norms(), dense.square().sum(1))
        close(gradients.part(slice(2, 5)).dense(), dense[2:5])
        assert gradients.finite()
    again, _ = problem(name)
    again.keep(gradients=tmp_path / "g")
    close(again.explain(queries).values, whole)
    third, _ = problem(name)
    third.keep(gradients=tmp_path / "g")
    monkey = third._made.training
    third._made.curvature  # noqa: B018
    assert monkey.keeper.get(0, 20) is not None
    close(third.explain(queries).values, whole)
    other, _ = problem("logra" if name != "logra" else "logra_pca")
    other.keep(gradients=tmp_path / "g")
    with pytest.raises(errors.StoreError):
        other.explain(queries)


def test_what_is_kept_does_not_change_scores():
    risk = named("convolution").risk()
    method = SMALL["logra"]
    whole = front(risk, method)
    assert isinstance(compression_of(whole._made.curvature), Stored)
    plain = front(risk, replace(method, compression=None))
    close(whole.explain(risk.data).values, plain.explain(risk.data).values, rtol=1e-12)
    close(whole.self_influence(), plain.self_influence(), rtol=1e-10)


def test_low_rank_factors_are_as_small_as_they_say():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(640, 10))
    data = torch.randn(30, 3, 6, 6), torch.arange(30) % 10
    inf = uw.Influence(model, data, loss="cross_entropy", method="lorif", damping=0.1)
    factors = inf._made.training.compression
    assert isinstance(factors, RankFactors)
    batch, _ = inf.risk.rows(0, 30)
    whole = per_example(inf.objective, batch)
    kept = factors.compress(whole)
    # 40 x (27 + 1) of the convolution, 10 x 64 of the head: one product of each.
    assert kept.bytes() == 30 * 4 * (40 + 28 + 10 + 64)
    assert whole.bytes() > 5 * kept.bytes()


@pytest.mark.parametrize(
    ("name", "curvature"),
    [
        ("trak", ProjectedKernel(SparseEntries(256), "margin")),
        ("trak", ProjectedKernel(RademacherEntries(256), "margin")),
        ("trak", ProjectedKernel(GaussianEntries(256), "margin")),
        ("logra", ProjectedKernel(RandomSides(8))),
        ("logra", ProjectedKernel(LeadingDirections(64))),
        ("leading_ekfac", LeadingEigenvalues(64)),
        ("lorif", LowRankKernel(RandomSides(8), Nystrom(20))),
    ],
    ids=str,
)
def test_neither_gradients_nor_projections_are_ever_whole(name, curvature, monkeypatch):
    monkeypatch.setattr("upweight.linalg.blocks.PIECE_BYTES", 2**21)
    n = 256
    model = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 10))
    data = torch.randn(n, 300), torch.arange(n) % 10
    queries = torch.randn(3, 300), torch.arange(3)
    method = row(name, curvature)
    inf = uw.Influence(model, data, loss="cross_entropy", l2=0.1, method=method)
    inf.risk.value()
    # 127 MB: all gradients, and as much for P of 256 dimensions.
    whole = 4 * n * inf.objective.space.size
    fitted, _ = peak_bytes(lambda: inf._made.curvature)
    solved, _ = peak_bytes(lambda: inf.explain(queries))
    assert max(fitted, solved) < whole / 8


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.booleans(),
    st.sampled_from(["plain", "ones", "indexed", "transposed"]),
)  # fmt: skip
def test_columns_add_up_to_the_gradients(n, g, o, i, twice, kind):
    generator = torch.Generator().manual_seed(n + 7 * g + 31 * o + 101 * i)
    g = 1 if kind == "indexed" else g
    bias = g * o * i if kind == "ones" else None
    wide = i + (kind == "ones")
    block = Block("w", g, o, wide, weight=0, bias=bias, transposed=kind == "transposed")

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def term(s):
        if kind == "indexed":
            return Outer(torch.randint(o, (n, s), generator=generator), normal(1, n, s, i))
        return Outer(normal(g, n, s, o), normal(g, n, s, i), ones=kind == "ones")

    terms = [term(2), term(1)] if twice else [term(2)]
    gradients = BlockGradients([block], [terms], n, normal(1))
    total = torch.zeros_like(gradients.dense())
    for places, values in columns(gradients, 0):
        total.index_add_(1, places, values)
    close(total, gradients.dense(), rtol=1e-12)
    close(as_blocks(DenseGradients(total), [block]).dense(), total, rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_in_closed_form_need_no_matrix(bias):
    x, r = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    gradients = FactoredGradients(r, x, bias=bias)
    total = torch.zeros(4, 6, dtype=torch.float64)
    for places, values in columns(gradients, 0):
        total.index_add_(1, places, values)
    close(total, gradients.dense(), rtol=1e-14)


# Refusals


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RademacherEntries(0), "at least 1 dimension, got 0"),
        (lambda: SparseEntries(4, nonzeros=5), "1 to 4 nonzeros, got 5"),
        (lambda: SparseEntries(4, nonzeros=0), "1 to 4 nonzeros, got 0"),
        (lambda: RandomSides(0), "at least 1 number, got 0"),
        (lambda: LeadingDirections(0), "at least 1 direction, got 0"),
        (lambda: LeadingEigenvalues(0), "at least 1 direction, got 0"),
        (lambda: LowRankKernel(RandomSides(2), Nystrom(2), rank=0), "at least 1 product"),
    ],
)
def test_less_than_something_is_refused(make, says):
    with pytest.raises(errors.InputError, match=says):
        make()


def test_solvers_refuse_each_others_curvatures():
    risk = named("mlp").risk()
    with pytest.raises(errors.InputError, match="a curvature of all parameters"):
        front(risk, Method("wrong", "", "ggn", Pulled())).explain(risk.data)
    with pytest.raises(errors.InputError, match="a curvature of all parameters"):
        front(risk, replace(METHODS["ggn"], compression=compression_of)).explain(risk.data)
    with pytest.raises(errors.InputError, match="not diagonal in a known basis"):
        front(risk, row("trak", ProjectedKernel(RademacherEntries(4)), Pulled(Spectral()))).explain(
            risk.data
        )


def test_a_kernel_of_more_dimensions_than_examples_asks_for_damping():
    risk = named("mlp").risk(l2=0.0)
    with pytest.raises(errors.IndefiniteError, match="Add damping above"):
        front(risk, SMALL["trak"], 0.0).explain(risk.data)
    with pytest.raises(errors.IndefiniteError, match="Add damping"):
        front(risk, SMALL["lorif"], 0.0).explain(risk.data)
    front(risk, SMALL["trak"], 0.1).explain(risk.data)


@pytest.mark.parametrize("name", ["trak", "logra", "leading_ekfac", "lorif"])
def test_half_precision_keeps_sums_wide(name):
    found = {}
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv1d(2, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)
        )  # fmt: skip
        model = model.bfloat16().to(dtype)
        x = torch.randn(200, 2, 6).bfloat16().to(dtype)
        made = (
            row("trak", ProjectedKernel(RademacherEntries(40), "margin"))
            if name == "trak"
            else STABLE[name]
        )
        data = Data.of((x, torch.arange(200) % 3))
        objective = uw.Objective(model, "cross_entropy", l2=0.01)
        found[dtype] = uw.Influence(objective, data, method=made, damping=0.1).explain(data).values
    # Two or three digits are all that there are.
    close(found[torch.bfloat16], found[torch.float64], rtol=0.05)


def test_examples_without_any_gradient_are_projected_to_nothing():
    gradients = BlockGradients([Block("w", 1, 4, 5, weight=0)], [[]], 3, row_of(1))
    found = RandomProjection(RademacherEntries(7), row_of(20)).project(gradients)
    assert torch.equal(found, torch.zeros(3, 7, dtype=torch.float64))


def test_trak_takes_what_a_user_measures():
    risk = named("regression net").risk()

    def output(outputs, targets):
        return outputs.sum(1)

    inf = front(risk, row("trak", ProjectedKernel(SparseEntries(9), output)))
    projection = inf._made.curvature.projection
    values = gradients_of(risk, output) @ matrix_of(projection).T
    kernel = moment(risk, values) + 0.03 * torch.eye(9)
    wanted = scores(risk, pulled(projection, kernel), gradients_of(risk))
    close(inf.explain(risk.data).values, wanted)


def test_the_loss_is_minus_the_other_classes_times_the_margin():
    """∇ℓ = −(1 − p)∇f, so that training gradients of the loss are TRAK's Q Φ."""
    for name in ("mlp", "mlp with sigmoid", "convolution"):
        risk = named(name).risk()
        batch, _ = risk.at(torch.arange(len(risk.data)))
        losses = risk.objective.losses(risk.objective.space.values(), batch).detach()
        wrong = 1 - torch.exp(-losses)
        close(gradients_of(risk), -wrong[:, None] * gradients_of(risk, "margin"), rtol=1e-12)


def test_a_gradient_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
    x = torch.randn(6, 3).double()
    x[4] = 0

    def loss(outputs, targets):
        return outputs.square().sum(1).sqrt()

    for name in ("trak", "logra", "lorif"):
        method = (
            SMALL[name] if name != "trak" else row("trak", ProjectedKernel(RademacherEntries(9)))
        )
        inf = uw.Influence(model.double(), (x, x[:, 0]), loss=loss, method=method, damping=0.1)
        with pytest.raises(errors.NonFiniteError, match=r"gradient of row 4 .*sqrt\(0\)"):
            inf.explain((x[:2], x[:2, 0]))


def test_parameter_subsets_and_general_parameters():
    """Parameters without a rule are projected as others are."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3, 2).double())
            self.head = nn.Linear(2, 2).double()

        def forward(self, x):
            return self.head(torch.tanh(torch.cumsum(self.scale, 0).T @ x.T).T)

    torch.manual_seed(0)
    data = Data.of((torch.randn(9, 3).double(), torch.arange(9) % 2))
    for chosen in (None, ["scale"], ["head.weight"]):
        objective = uw.Objective(Odd(), "cross_entropy", l2=0.1, parameters=chosen)
        risk = Risk(objective, data)
        if chosen != ["head.weight"]:
            assert "scale" in layout_of(objective, risk.rows(0, 9)[0]).general
        for entries in (RademacherEntries(3), SparseEntries(3, nonzeros=2)):
            inf = front(risk, row("trak", ProjectedKernel(entries, "margin")))
            projection = inf._made.curvature.projection
            values = gradients_of(risk, "margin") @ matrix_of(projection).T
            kernel = moment(risk, values) + 0.1 * torch.eye(3)
            wanted = scores(risk, pulled(projection, kernel), gradients_of(risk))
            close(inf.explain(data).values, wanted)
        inf = front(risk, SMALL["logra"])
        projection = inf._made.curvature.projection
        values = gradients_of(risk) @ matrix_of(projection).T
        kernel = block_diagonal(moment(risk, values), projection.widths)
        kernel += 0.1 * torch.eye(len(kernel))
        wanted = scores(risk, pulled(projection, kernel), gradients_of(risk))
        close(inf.explain(data).values, wanted)


@pytest.mark.parametrize("failing", ["raises", "nan"])
def test_factors_are_found_where_single_precision_fails(failing, monkeypatch):
    known = torch.linalg.eigh

    def eigh(grams):
        if grams.dtype == torch.float64:
            return known(grams)
        if failing == "raises":
            raise RuntimeError("the algorithm failed to converge")
        return known(grams)[0], torch.full_like(grams, torch.nan)

    grams = torch.randn(3, 1, 5, 5)
    grams = grams @ grams.mT
    wanted = known(grams.double())[1].abs()
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    torch.testing.assert_close(eigen(grams)[1].abs().double(), wanted)
