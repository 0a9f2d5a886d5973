"""Rows that approximate an inverse: each against its dense definition, and every refusal."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import upweight as uw
from tests.cases import CASES, as_reference, small_network, small_rows
from tests.test_solvers import mean_of, spd
from upweight import reference
from upweight.curvature import CURVATURES, EKFAC, KFAC, Draws, GaussNewton, Labels, curvature, ridge
from upweight.curvature.moments import Axes, Gradient
from upweight.errors import IndefiniteError, InputError, NonFiniteError, NotConvergedError
from upweight.gradients import TrainingGradients, risk_layout
from upweight.linalg import Dense, Identity, Status
from upweight.linalg.cost import Load
from upweight.methods import METHODS
from upweight.risk import Risk
from upweight.solvers import CG, DataInf, Kronecker, Lanczos, LiSSA, Nystrom

ROWS = ["arnoldi", "nystrom", "astra", "datainf", "representer"]
NAMES = ["softmax weighted", "mlp", "convolution", "padded transformer", "own loss", "recurrent"]
each_case = pytest.mark.parametrize("name", NAMES)
each_row = pytest.mark.parametrize("row", ROWS)
both_removals = pytest.mark.parametrize("removal", ["mean", "sum"])


@pytest.fixture(autouse=True)
def _plain_attention():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def named(name, **settings) -> Risk:
    return next(case for case in CASES if case.name == name).risk(**settings)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, wanted, rtol=1e-8, atol=1e-10):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=rtol, atol=atol)


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def of_part(risk, row):
    """The risk in the parameters that a row looks at."""
    return Risk(METHODS[row].looks_at(risk.objective, risk.data), risk.data)


def by_definition(risk, inverse):
    """share_i ∇ℓ_q A⁻¹ ∇ℓ̃_i of the first three examples as queries, from a dense inverse."""
    problem, theta = as_reference(risk)
    n = len(risk.data)
    rows = [reference.gradient(lambda t, i=i: problem.loss(t, i), theta) for i in range(n)]
    extra = problem.l2 * theta * problem.l2_inside
    return torch.stack(
        [
            torch.stack(
                [problem.shares[i] * rows[q] @ inverse @ (rows[i] + extra) for q in range(3)]
            )
            for i in range(n)
        ],
        1,
    )


def scores(risk, method, damping=0.0, **settings):
    inf = uw.Influence(risk.objective, risk.data, method=method, damping=damping)
    return inf.explain(risk.data.take(torch.arange(3)), **settings)


# Each row by its definition


def ritz_inverse(matrix, rank, steps, shift):
    """Rayleigh and Ritz in the span of v, vA, vA², …, by a QR of these rows."""
    p = len(matrix)
    row = draw(p)
    krylov = []
    for _ in range(min(steps, p)):
        for known in krylov * 2:
            row = row - (row @ known) * known
        krylov.append(row / row.norm())
        row = krylov[-1] @ matrix
    basis = torch.stack(krylov)
    values, mixed = torch.linalg.eigh(basis @ matrix @ basis.T)
    total = torch.zeros(p, p, dtype=torch.float64)
    for k in values.abs().argsort(descending=True)[:rank]:
        if values[k] + shift > 0:
            y = mixed[:, k] @ basis
            total += torch.outer(y, y) / (values[k] + shift)
    return total


@each_case
@pytest.mark.parametrize(("rank", "steps", "shift"), [(3, 5, 0.0), (4, 8, 0.2), (50, 100, 0.3)])
def test_arnoldi_divides_in_the_ritz_vectors_and_nowhere_else(name, rank, steps, shift):
    risk = named(name)
    operator = curvature("hessian", risk)
    matrix = operator.to_dense()
    inverse = Lanczos(rank, steps).init(operator + shift)
    wanted = ritz_inverse(matrix, rank, steps, shift)
    close(inverse.to_dense(), wanted, rtol=1e-6, atol=1e-7 * wanted.abs().max())
    rows = draw(4, len(matrix), seed=1)
    solution = inverse.solve(rows)
    missing = rows - solution.require() @ (matrix + shift * eye(len(matrix)))
    close(solution.residual, missing.norm(dim=1) / rows.norm(dim=1), rtol=1e-6, atol=1e-7)
    close(inverse.quadratic(rows), (rows * solution.value).sum(1))


@both_removals
def test_arnoldi_with_all_directions_is_the_exact_solve(removal):
    risk = named("mlp", removal=removal)
    shift = 0.1 - float(torch.linalg.eigvalsh(curvature("hessian", risk).to_dense())[0])
    found = scores(risk, uw.Method("all", "", solver=Lanczos(1000, 1000)), shift)
    close(found.values, scores(risk, "exact", shift).values)
    assert found.provenance.residual.max() < 1e-8


def nystrom_inverse(matrix, l2, rank, shift):
    p = len(matrix)
    tests = torch.linalg.qr(draw(p, min(rank, p)))[0]
    data = matrix - torch.diag(l2)
    image = data @ tests
    sketch = image @ torch.linalg.pinv(tests.T @ image, rtol=1e-10, hermitian=True) @ image.T
    return torch.linalg.inv(sketch + torch.diag(l2) + shift * eye(p))


@each_case
@pytest.mark.parametrize(("rank", "l2", "shift"), [(3, 0.03, 0.0), (9, 0.0, 0.2), (500, 0.1, 0.1)])
def test_nystrom_is_the_inverse_of_its_sketch_and_l2_and_damping(name, rank, l2, shift):
    risk = named(name, l2=l2)
    operator = curvature("ggn", risk)
    if name == "own loss":  # |z|³ bends upwards everywhere
        operator = curvature("empirical_fisher", risk)
    matrix = operator.to_dense()
    inverse = Nystrom(rank).init(operator + shift)
    wanted = nystrom_inverse(matrix, risk.objective.l2, rank, shift)
    close(inverse.to_dense(), wanted, rtol=1e-6, atol=1e-7 * wanted.abs().max())
    rows = draw(4, len(matrix), seed=1)
    solution = inverse.solve(rows)
    missing = rows - solution.require() @ (matrix + shift * eye(len(matrix)))
    close(solution.residual, missing.norm(dim=1) / rows.norm(dim=1), rtol=1e-6, atol=1e-9)
    close(inverse.quadratic(rows), (rows @ wanted * rows).sum(1), rtol=1e-6)
    if rank == 500:
        close(solution.value, torch.linalg.solve(matrix + shift * eye(len(matrix)), rows.T).T)


def test_nystrom_keeps_an_l2_that_differs_between_parameters():
    risk = named("mlp", l2={"0.*": 0.3, "2.weight": 0.1, "2.bias": 0.02})
    operator = curvature("ggn", risk)
    inverse = Nystrom(4).init(operator)
    close(inverse.to_dense(), nystrom_inverse(operator.to_dense(), risk.objective.l2, 4, 0.0))


def mean_of_inverses(risk, layers, damping, share=0.1):
    """A loop over examples and layers, each with its own matrix."""
    problem, theta = as_reference(risk)
    gradients = [
        reference.gradient(lambda t, i=i: problem.loss(t, i), theta) for i in range(len(risk.data))
    ]
    total = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for places in layers:
        d = len(places)
        shift = float(problem.l2[places[0]]) + damping
        if shift == 0:
            squares = [
                s * g[places].square().sum() for s, g in zip(problem.shares, gradients, strict=True)
            ]
            shift = share * float(sum(squares)) / d
        for weight, g in zip(problem.shares, gradients, strict=True):
            matrix = shift * eye(d) + torch.outer(g[places], g[places])
            total[places[:, None], places] += weight * torch.linalg.inv(matrix)
    return total


@each_case
@pytest.mark.parametrize(("l2", "damping"), [(0.03, 0.0), (0.0, 0.2), (0.1, 0.1), (0.0, 0.0)])
def test_datainf_is_the_mean_of_inverses_in_every_layer(name, l2, damping):
    risk = named(name, l2=l2)
    layers = [block.places().flatten() for block in risk_layout(risk).blocks]
    assert sum(len(places) for places in layers) == risk.objective.space.size
    wanted = mean_of_inverses(risk, layers, damping)
    operator = curvature("empirical_fisher", risk)
    inverse = DataInf().init(operator + damping)
    close(inverse.to_dense(), wanted, atol=1e-10 * wanted.abs().max())
    rows = draw(3, len(wanted), seed=1)
    solution = inverse.solve(rows)
    shifts = torch.zeros(len(wanted), dtype=torch.float64)
    for places, shift in zip(layers, inverse.dampings, strict=True):
        shifts[places] = shift
    fisher = operator.to_dense() - torch.diag(risk.objective.l2) + torch.diag(shifts)
    missing = rows - solution.require() @ fisher
    close(solution.residual, missing.norm(dim=1) / rows.norm(dim=1))
    close(inverse.quadratic(rows), (rows * solution.value).sum(1))


def test_a_layer_is_a_weight_with_its_bias_and_the_published_damping_is_said():
    risk = named("mlp", l2=0.0)
    layers = [torch.arange(15), torch.arange(15, 27)]  # 4·3 + 3, then 3·3 + 3
    inverse = DataInf().init(curvature("empirical_fisher", risk))
    close(inverse.to_dense(), mean_of_inverses(risk, layers, 0.0))
    least, most = sorted(inverse.dampings)
    said = f"λ of 2 of 2 layers is 0.1 of the mean squared gradient per parameter ({least:.1e} to"
    assert any(note.startswith(said) and f"{most:.1e}" in note for note in inverse.notes)
    fifth = DataInf(share=0.5).init(curvature("empirical_fisher", risk))
    close(fifth.to_dense(), mean_of_inverses(risk, layers, 0.0, share=0.5))


def test_layers_of_a_linear_model_follow_its_l2():
    risk = named("softmax", l2={"weight": 0.2, "bias": 0.05})
    layers = [torch.arange(12), torch.arange(12, 15)]
    inverse = DataInf().init(curvature("empirical_fisher", risk) + 0.1)
    close(inverse.to_dense(), mean_of_inverses(risk, layers, 0.1))


@both_removals
@each_row
@pytest.mark.parametrize("name", ["softmax weighted", "mlp", "padded transformer"])
def test_scores_are_those_of_the_dense_inverse(row, name, removal):
    if row == "astra" and name == "padded transformer":
        pytest.skip("four hundred steps of a transformer take seconds")
    risk = of_part(named(name, removal=removal), row)
    method = METHODS[row]
    damping = 0.7 if row == "arnoldi" else 0.2
    operator = curvature(method.curvature, risk)
    l2 = risk.objective.l2
    if row == "arnoldi":
        inverse = ritz_inverse(operator.to_dense(), 50, 100, damping)
    elif row == "nystrom":
        inverse = nystrom_inverse(operator.to_dense(), l2, 100, damping)
    elif row == "datainf":
        layers = [block.places().flatten() for block in risk_layout(risk).blocks]
        inverse = mean_of_inverses(risk, layers, damping)
    elif row == "representer":
        inverse = torch.diag(1 / (l2 + damping))
    else:
        inverse = torch.linalg.inv(operator.to_dense() + damping * eye(len(l2)))
    found = scores(named(name, removal=removal), row, damping).values
    wanted = by_definition(risk, inverse).numpy()
    size = np.abs(wanted).max()
    close(found, wanted, rtol=0, atol=(0.1 if row == "astra" else 1e-8) * size)


@pytest.mark.parametrize("row", ["arnoldi", "nystrom", "datainf", "representer"])
@pytest.mark.parametrize("l2", [0.03, {"*weight": 0.1, "*": 0.02}], ids=["alike", "not alike"])
@pytest.mark.parametrize("name", ["softmax weighted", "convolution"])
def test_self_products_are_the_diagonal(row, l2, name):
    risk = of_part(named(name, l2=l2), row)
    inverse = METHODS[row].invert(METHODS[row].fit(risk), 0.7)
    problem, theta = as_reference(risk)
    dense = inverse.to_dense()
    wanted = []
    for i in range(len(risk.data)):
        g = reference.gradient(lambda t, i=i: problem.loss(t, i), theta)
        wanted.append(float(g @ dense @ g))
    training = TrainingGradients(risk)
    (found,) = training.each(lambda seen: inverse.self_products(seen.gradients), "test")
    close(found, wanted)


# What must not matter, and what dampings share


def settled(row):
    """The row, of few steps where they are random, with an EK-FAC whose fit draws nothing."""
    if row != "astra":
        return METHODS[row]
    maker = Kronecker(EKFAC(slopes=Labels()))
    series = replace(METHODS[row].solver, scale=30.0, depth=40, batch_size=4, preconditioner=maker)
    return replace(METHODS[row], solver=series)


def small(method, order=None, batch_size=None):
    x, y = small_rows(20)
    data = uw.Data.of((x, y), batch_size=batch_size)
    data = data if order is None else data.take(order)
    model = small_network()
    inf = uw.Influence(model, data, loss="cross_entropy", l2=0.05, method=method, damping=0.7)
    return inf, uw.Data.of(small_rows(4, seed=3), batch_size=batch_size)


@each_row
def test_batches_and_order_change_nothing(row):
    inf, queries = small(settled(row))
    whole = inf.explain(queries).values
    for size in (1, 7):
        again, same = small(settled(row), batch_size=size)
        close(again.explain(same).values, whole, rtol=1e-7, atol=1e-9)
    if row != "astra":  # which draws examples by their place
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        again, queries = small(settled(row), order)
        close(again.explain(queries).values, whole[:, order], rtol=1e-7, atol=1e-9)


@each_row
def test_a_sweep_is_the_separate_runs(row):
    inf, queries = small(settled(row))
    sweep = inf.sweep(queries, [0.5, 0.9])
    for damping in (0.5, 0.9):
        alone = uw.Influence(inf.objective, inf.data, method=settled(row), damping=damping)
        found, wanted = sweep[damping], alone.explain(queries)
        close(found.values, wanted.values)
        assert found.provenance.caveats == wanted.provenance.caveats
        assert found.provenance.damping == damping


@pytest.mark.parametrize("solver", [Lanczos(5, 9), Nystrom(5)], ids=["lanczos", "nystrom"])
def test_another_damping_costs_no_product(solver):
    asked = []

    class Counting(Dense.__base__):
        def __init__(self, matrix):
            self.matrix, self.size = matrix, len(matrix)
            self.dtype, self.device = matrix.dtype, matrix.device

        def apply(self, rows):
            asked.append(len(rows))
            return rows @ self.matrix

    operator, rows = Counting(spd(12)), draw(2, 12)
    base = solver.prepared(operator)
    made = sum(asked)
    for shift in (0.1, 1.0):
        found = solver.init(base + shift).solve(rows)
        assert sum(asked) == made
        close(found.value, solver.init(operator + shift).solve(rows).value)
        made = sum(asked)
    assert solver.prepared(base) is base


def test_a_sweep_leaves_the_residual_of_a_sketch_unmeasured():
    inf, queries = small("nystrom")
    assert np.isfinite(inf.explain(queries).provenance.residual).all()
    assert np.isnan(inf.sweep(queries, [0.5])[0.5].provenance.residual).all()


# Representer points


def test_representer_values_add_up_to_the_prediction():
    x, y = small_rows(30)
    model = nn.Linear(3, 2, bias=False).double()
    objective = uw.Objective(
        model, "cross_entropy", l2=0.1, removal="sum", measure=lambda z, t: z[:, 0]
    )
    risk = Risk(objective, uw.Data.of((x, y)))
    problem, theta = as_reference(risk)
    found = scores(risk, "representer")
    assert any("not 0" in note for note in found.provenance.caveats)
    best = reference.train(problem, theta)
    with torch.no_grad():
        model.weight.copy_(best.view(2, 3))
    found = scores(Risk(objective, risk.data), "representer")
    assert not found.provenance.caveats
    with torch.no_grad():
        close(found.values.sum(1), -model(x[:3])[:, 0])


def test_the_distance_from_a_stationary_point_is_its_share_of_the_parts():
    risk = of_part(named("mlp"), "representer")
    problem, theta = as_reference(risk)
    slope = reference.gradient(problem.risk, theta)
    pull = problem.l2 * theta
    relative = slope.norm() / ((slope - pull).norm() + pull.norm())
    assert f"is {float(relative):.0%} of its parts" in ridge(risk).notes[0]


# ASTRA


def iterated(matrices, v, preconditioner, scale, solver):
    """The series of one repeat after another, each step with the mean of its own matrices."""
    generator = torch.Generator().manual_seed(solver.seed)
    start = v / scale if preconditioner is None else v @ preconditioner
    step = eye(len(v.T)) if preconditioner is None else preconditioner
    states = [start.clone() for _ in range(solver.repeats)]
    kept = max(1, round(solver.tail * solver.depth))
    tails = [torch.zeros_like(v) for _ in states]
    for t in range(solver.depth):
        drawn = torch.randint(
            len(matrices), (solver.repeats, solver.batch_size), generator=generator
        )
        for r, places in enumerate(drawn):
            states[r] = states[r] + (v - states[r] @ matrices[places].mean(0)) @ step / scale
            if t >= solver.depth - kept:
                tails[r] += states[r] / kept
    return torch.stack(tails).mean(0)


@pytest.mark.parametrize("name", ["softmax weighted", "mlp"])
@pytest.mark.parametrize("maker", [None, Kronecker(EKFAC(slopes=Labels()))], ids=["plain", "ekfac"])
@pytest.mark.parametrize("tail", [0.0, 0.5])
def test_the_series_takes_the_steps_it_says(name, maker, tail):
    operator, shift = curvature("ggn", named(name)), 0.2
    p = operator.size
    whole = torch.arange(operator.count)
    matrices = torch.stack([operator.apply_sampled(eye(p)[None], i[None, None])[0] for i in whole])
    close(matrices.mean(0), operator.to_dense())
    solver = LiSSA(
        scale=9.0, depth=12, repeats=2, batch_size=3, tail=tail, preconditioner=maker, seed=5
    )
    turn = None if maker is None else maker(operator + shift, 1).to_dense()
    v = draw(2, p, seed=1)
    solution = solver.init(operator + shift).solve(v)
    wanted = iterated(matrices + shift * eye(p), v, turn, 9.0, solver)
    close(solution.value, wanted)
    missing = v - wanted @ (operator.to_dense() + shift * eye(p))
    close(solution.residual, missing.norm(dim=1) / v.norm(dim=1))


@pytest.mark.parametrize(
    "fit", [EKFAC(slopes=Labels()), EKFAC(Axes), EKFAC(Gradient), KFAC()], ids=repr
)
@pytest.mark.parametrize("name", ["mlp", "convolution", "padded transformer"])
def test_a_product_in_a_basis_is_the_turned_product(name, fit):
    risk = named(name, l2={"*weight": 0.1, "*": 0.02})
    plain, basis = GaussNewton(risk), fit(risk)
    turned = GaussNewton(risk, basis)
    p, places = plain.size, torch.tensor([[3, 1, 3]])
    axes = basis.turn(eye(p))  # a row for each parameter, a column for each coordinate
    close(axes @ axes.T, eye(p))
    close(basis.back(basis.turn(draw(2, p))), draw(2, p))
    for rows in (draw(1, p), draw(40, p)):  # by autograd, and by factors
        meant = rows @ axes.T
        close(turned.apply(rows), plain.apply(meant) @ axes)
        some, few = (each.restrict(places[0, :2]) for each in (turned, plain))
        close(some.apply(rows), few.apply(meant) @ axes)
        drawn = plain.apply_sampled(meant[None], places)[0]
        close(turned.apply_sampled(rows[None], places)[0], drawn @ axes)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=st.integers(1, 8), m=st.integers(1, 4), seed=st.integers(0, 9))
def test_any_positive_preconditioner_leaves_the_fixed_point(size, m, seed):
    matrix, turn = spd(size, 20.0, seed), Dense(spd(size, 5.0, seed + 1))
    solver = LiSSA(depth=3000, repeats=1, preconditioner=lambda operator, rows: turn)
    rows = draw(m, size, seed=seed)
    solution = solver.init(mean_of(matrix) + 0.3).solve(rows)
    close(solution.require(), torch.linalg.solve(matrix + 0.3 * eye(size), rows.T).T, rtol=1e-7)
    assert solution.residual.max() < 1e-8


def test_an_exact_preconditioner_needs_steps_of_its_noise_alone():
    matrix = spd(12, 1e4)
    exact = Dense(torch.linalg.inv(matrix))
    rows = draw(3, 12)
    few = {"depth": 30, "repeats": 2, "max_residual": 2.0}
    helped = LiSSA(**few, preconditioner=lambda *_: exact).init(mean_of(matrix)).solve(rows)
    plain = LiSSA(**few).init(mean_of(matrix)).solve(rows)
    assert helped.residual.max() < 1e-9 < 0.1 < plain.residual.min()


def problem_of_errors():
    """A network's Gauss-Newton matrix, and rows."""
    torch.manual_seed(0)
    x, y = draw(120, 6), torch.arange(120) % 3
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    descent = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        descent.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        descent.step()
    risk = Risk(uw.Objective(model, "cross_entropy", l2=1e-3), uw.Data.of((x, y)))
    operator = curvature("ggn", risk)
    problem, theta = as_reference(risk)
    rows = [reference.gradient(lambda t, i=i: problem.loss(t, i), theta) for i in range(4)]
    return operator, torch.stack(rows)


@pytest.mark.parametrize(
    ("depth", "shift", "plain_share", "alone_share"), [(75, 0.01, 0.6, 0.5), (150, 0.0, 0.85, 0.75)]
)
def test_astra_beats_the_plain_series_and_its_preconditioner_at_equal_passes(
    depth, shift, plain_share, alone_share
):
    matrix, rows = problem_of_errors()
    operator = matrix + shift
    exact = torch.linalg.solve(operator.to_dense(), rows.T).T

    def error(found):
        return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).median())

    solver = LiSSA(depth=depth, repeats=2, batch_size=16, max_error=9.0, max_residual=9.0)
    plain = solver.init(operator).solve(rows)
    two_draws = Kronecker(EKFAC(slopes=Draws(2), rows="auto"))
    helped = replace(solver, preconditioner=two_draws).init(operator).solve(rows)
    alone = two_draws(operator, 1).apply(rows)
    assert error(helped.value) < plain_share * error(plain.value)
    assert error(helped.value) < alone_share * error(alone)


def test_the_standard_error_of_repeats_is_that_of_other_seeds():
    operator, rows = problem_of_errors()
    solver = LiSSA(
        scale=40.0, depth=40, repeats=4, batch_size=16, preconditioner=Kronecker(), max_residual=9.0
    )
    runs = [replace(solver, seed=seed).init(operator).solve(rows) for seed in range(6)]
    values = torch.stack([run.value for run in runs])
    spread = (values - values.mean(0)).square().sum(2).sum(0) / 5
    true = spread.sqrt() / values.mean(0).norm(dim=1)
    said = torch.stack([run.error for run in runs]).mean(0)
    assert (said / true).log().abs().max() < 0.7


def test_a_fit_serves_every_damping_and_dies_with_its_curvature(monkeypatch):
    fits = []
    whole = EKFAC.__call__
    monkeypatch.setattr(EKFAC, "__call__", lambda self, risk: fits.append(1) or whole(self, risk))
    maker = Kronecker()
    operator = curvature("ggn", named("mlp"))
    first, second = maker(operator + 0.1, 3), maker(operator + 0.2, 3)
    assert len(fits) == 1
    dense = CURVATURES["ekfac"](named("mlp")).to_dense()
    for found, shift in ((first, 0.1), (second, 0.2)):
        close(found.to_dense(), torch.linalg.inv(dense + shift * eye(len(dense))))
    maker(curvature("ggn", named("mlp")), 3)
    assert len(fits) == 3
    assert maker(Identity(3, torch.float64, torch.device("cpu")), 3) is None
    bare = replace(METHODS["astra"].solver, depth=2).init(mean_of(spd(3)))
    bare.solve(draw(1, 3))
    assert "solved without preconditioner" in bare.notes[0]
    row = draw(2, operator.size)
    close(
        CG(rtol=1e-10, preconditioner=maker).init(operator).solve(row).require(),
        CG(rtol=1e-10).init(operator).solve(row).require(),
        rtol=1e-6,
    )


# Nothing is NaN: what cannot be answered is refused, with the remedy


@pytest.mark.parametrize("maker", [None, Kronecker()], ids=["plain", "ekfac"])
def test_a_series_that_grows_is_named_and_not_nan(maker):
    operator = curvature("ggn", named("mlp")) + 0.1
    solver = LiSSA(scale=1e-3, depth=400, repeats=1, preconditioner=maker)
    solution = solver.init(operator).solve(draw(2, operator.size))
    assert solution.status == (Status.DIVERGED,) * 2
    assert not solution.value.any()  # what is kept all the same is nothing, and says so
    close(solution.residual, [1.0, 1.0])
    assert "accepted although diverged" in solution.caveats()[0]
    with pytest.raises(NotConvergedError, match="grew without bound. Raise the scale"):
        solution.require()
    # A run that is cut off before it overflows has grown all the same.
    short = replace(solver, scale=0.05, depth=9).init(operator).solve(draw(2, operator.size))
    assert short.status[0] in (Status.DIVERGED, Status.NOT_CONVERGED)


def test_a_preconditioner_that_bends_down_is_no_answer():
    turn = Dense(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)))
    solver = LiSSA(scale=4.0, depth=2000, preconditioner=lambda *_: turn)
    solution = solver.init(mean_of(eye(2))).solve(torch.ones(1, 2).double())
    assert solution.status == (Status.DIVERGED,)


def test_a_preconditioner_of_nothing_to_divide_by_is_refused():
    operator = curvature("ggn", named("mlp", l2=0.0))
    with pytest.raises(IndefiniteError, match="Add damping"):
        METHODS["astra"].solver.init(operator).solve(draw(1, operator.size))


def test_the_probe_counts_damping():
    matrix = torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64))
    with pytest.raises(IndefiniteError, match="Add damping"):
        LiSSA(depth=50).init(mean_of(-eye(2)))
    solution = LiSSA(depth=3000, repeats=1).init(mean_of(matrix) + 0.8).solve(draw(1, 2))
    close(solution.require() @ (matrix + 0.8 * eye(2)), draw(1, 2))


@pytest.mark.parametrize(
    "values",
    [[1.0] * 6, [2.0, 2.0, 2.0, 1.0, 1.0, 0.5], [3.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1e-30] * 6],
    ids=["identity", "repeated", "one direction", "tiny"],
)
def test_a_space_that_closes_early_goes_on(values):
    matrix = torch.diag(torch.tensor(values, dtype=torch.float64))
    for rank in (2, 6):
        inverse = Lanczos(rank, 6).init(Dense(matrix) + 0.1 * max(values))
        found = inverse.to_dense()
        assert torch.isfinite(found).all()
        top = torch.linalg.eigvalsh(found).flip(0)
        wanted = 1 / (torch.tensor(values).double().sort(descending=True)[0] + 0.1 * max(values))
        size = float(wanted.max())
        close(top[:rank].sort()[0] / size, wanted[:rank].sort()[0] / size)
        close(top[rank:] / size, torch.zeros(6 - rank), atol=1e-9)


def test_directions_that_bend_down_are_left_out_and_said():
    matrix = torch.diag(torch.tensor([2.0, 1.0, -0.5, -3.0], dtype=torch.float64))
    inverse = Lanczos(3, 4).init(Dense(matrix) + 0.25)
    close(
        inverse.to_dense(),
        torch.diag(torch.tensor([1 / 2.25, 1 / 1.25, 0, 0], dtype=torch.float64)),
    )
    assert "inverted on 2 of 4 directions" in inverse.notes[0]
    assert "1 of 3 Ritz values are not positive" in inverse.notes[1]
    assert "least -2.8e+00" in inverse.notes[1]
    inverse = Lanczos(4, 4).init(Dense(matrix) + 4.0)
    close(inverse.to_dense(), torch.linalg.inv(matrix + 4 * eye(4)))
    assert len(inverse.notes) == 1


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_there_is_no_direction_in_a_curvature_of_nothing(shift):
    with pytest.raises(IndefiniteError, match="is zero.*add damping"):
        Lanczos(2, 3).init(Dense(torch.zeros(4, 4, dtype=torch.float64)) + shift)
    with pytest.raises(IndefiniteError, match="not positive on any of 2.*add damping above 2.0e"):
        Lanczos(2, 3).init(Dense(-2 * eye(4)) + shift)
    if shift:
        zero = Dense(torch.zeros(4, 4, dtype=torch.float64)) + shift
        close(Nystrom(2).init(zero).to_dense(), eye(4) / shift)


@pytest.mark.parametrize("solver", [Lanczos(2, 3), Nystrom(2)], ids=["lanczos", "nystrom"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_product_that_is_not_finite_is_refused(solver, value):
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        solver.init(Dense(torch.full((4, 4), value, dtype=torch.float64)) + 1.0)


def test_a_sketch_needs_a_positive_curvature_and_something_to_divide_by():
    with pytest.raises(IndefiniteError, match="bends down.*Gauss-Newton"):
        Nystrom(4).init(Dense(torch.diag(torch.tensor([1.0, 2.0, 3.0, -1.0]).double())) + 5.0)
    for l2 in (0.0, {"0.*": 0.1}):
        risk = named("mlp", l2=l2)
        with pytest.raises(IndefiniteError, match="neither. Add damping"):
            scores(risk, "nystrom")
        assert np.isfinite(scores(risk, "nystrom", 0.1).values).all()


def test_representer_points_need_l2_or_damping():
    risk = named("mlp", l2=0.0)
    with pytest.raises(IndefiniteError, match="Add damping"):
        scores(risk, "representer")
    assert np.isfinite(scores(risk, "representer", 0.1).values).all()


def test_a_layer_without_gradient_has_no_published_damping():
    x, y = small_rows(8)
    model = small_network()
    with torch.no_grad():
        model[2].weight.zero_()  # so that nothing reaches the first layer
    inf = uw.Influence(model, (x, y), loss="cross_entropy", method="datainf")
    with pytest.raises(IndefiniteError, match="layer of '0.weight' has no gradient.*Add damping"):
        inf.explain((x, y))
    damped = uw.Influence(model, (x, y), loss="cross_entropy", method="datainf", damping=0.1)
    assert np.isfinite(damped.explain((x, y)).values).all()


def test_settings_and_curvatures_that_do_not_suit_are_refused():
    for pair in ((0, 5), (6, 5)):
        with pytest.raises(InputError, match="1 ≤ rank ≤ steps"):
            Lanczos(*pair)
    with pytest.raises(InputError, match="at least one test row"):
        Nystrom(0)
    with pytest.raises(InputError, match="not Hessian. Use method='datainf'"):
        scores(named("mlp"), DataInf())
    with pytest.raises(InputError, match="not a mean over examples"):
        replace(METHODS["astra"].solver).init(Identity(3, torch.float64, torch.device("cpu")))


@each_row
def test_rows_answer_in_single_precision(row):
    found = []
    for dtype in (torch.float64, torch.float32):
        x, y = small_rows(20)
        queries = small_rows(3, seed=3)
        inf = uw.Influence(
            small_network().to(dtype), (x.to(dtype), y), loss="cross_entropy", l2=0.05,
            method=settled(row), damping=0.7,
        )  # fmt: skip
        found.append(inf.explain((queries[0].to(dtype), queries[1])).values)
    assert found[1].dtype == np.float32
    close(found[1], found[0], rtol=1e-3, atol=1e-4 * np.abs(found[0]).max())


@pytest.mark.parametrize(
    "solver", [Lanczos(), Nystrom(), DataInf(), METHODS["astra"].solver], ids=lambda s: repr(s)[:7]
)
def test_costs_grow_with_what_is_asked(solver):
    loads = Load(100, 2, 50), Load(1000, 20, 50)
    little, much = (solver.cost(load) for load in loads)
    assert 0 < little.bytes < much.bytes
    rows = [
        c.products * load.rows + c.single for c, load in zip((little, much), loads, strict=True)
    ]
    assert 0 < rows[0] <= rows[1]


# Conjugate gradients that are asked for more than there is


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind",
    [
        "positive",
        "singular",
        "zero",
    ],
)
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("condition", [10.0, 1e4])
def test_cg_far_beyond_convergence_stays_converged(dtype, kind, preconditioned, condition):
    matrix = spd(12, condition)
    if kind == "singular":
        part = draw(12, 5, seed=2)
        matrix = part @ part.T
    elif kind == "zero":
        matrix = torch.zeros(12, 12, dtype=torch.float64)
    rows = draw(3, 12, seed=3) @ matrix
    turn = Dense((spd(12, 3.0, seed=4)).to(dtype))
    maker = (lambda *_: turn) if preconditioned else None
    solver = CG(rtol=0.0, max_steps=20_000, preconditioner=maker)
    solution = solver.init(Dense(matrix.to(dtype))).solve(rows.to(dtype))
    assert solution.steps < 200
    assert torch.isfinite(solution.value).all()
    assert set(solution.status) == {Status.CONVERGED}
    eps = torch.finfo(dtype).eps
    missing = (rows - solution.value.double() @ matrix).norm(dim=1)
    assert (missing <= 500 * eps * rows.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_cg_meets_what_rounding_allows_on_a_singular_system(dtype, preconditioned, seed):
    part = draw(12, 5, seed=seed)
    matrix = part @ part.T
    rows = draw(3, 12, seed=seed + 9) @ matrix
    turn = Dense(spd(12, 3.0, seed=4).to(dtype))
    maker = (lambda *_: turn) if preconditioned else None
    rtol = 200 * torch.finfo(dtype).eps
    solver = CG(rtol=rtol, max_steps=20_000, preconditioner=maker)
    solution = solver.init(Dense(matrix.to(dtype))).solve(rows.to(dtype))
    assert solution.steps < 20
    assert set(solution.status) == {Status.CONVERGED}
    missing = (rows - solution.value.double() @ matrix).norm(dim=1)
    assert (missing <= 3 * rtol * rows.norm(dim=1)).all()
