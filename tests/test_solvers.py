"""Every solver against the dense solve, and every way to fail named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import CASES, LINEAR_CASES
from upweight.curvature import Sketch, curvature
from upweight.errors import IndefiniteError, InputError, NonFiniteError, NotConvergedError
from upweight.linalg import Cholesky, Dense, Eigen, Identity, MeanOperator, Status
from upweight.solvers import CG, Lanczos, LiSSA

SOLVERS = {
    "cholesky": Cholesky(),
    "eigen": Eigen(),
    "cg": CG(rtol=1e-12),
    "lanczos": Lanczos(rank=1000, steps=1000),
    "preconditioned cg": CG(rtol=1e-12, preconditioner=Sketch(size=40, features=2, rows=1)),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def spd(size: int, condition: float = 100.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * torch.logspace(0, -torch.log10(torch.tensor(condition)), size)) @ q.T


@each_solver
@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 12), m=st.integers(1, 5), seed=st.integers(0, 5))
def test_solves_equal_the_dense_solve(solver, size, m, seed):
    matrix = spd(size, seed=seed)
    rows = torch.randn(m, size, dtype=torch.float64)
    inverse = solver.init(Dense(matrix))
    solution = inverse.solve(rows)
    wanted = torch.linalg.solve(matrix, rows.T).T
    torch.testing.assert_close(solution.require(), wanted, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(inverse.quadratic(rows), (rows * wanted).sum(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(inverse.to_dense(), torch.linalg.inv(matrix), rtol=1e-6, atol=1e-8)
    assert solution.residual.max() < 1e-9


@each_solver
@pytest.mark.parametrize("case", CASES[:1] + CASES[7:9], ids=lambda case: case.name)
def test_an_operator_times_its_inverse_is_the_identity(solver, case):
    operator = curvature("ggn", case.risk()) + 0.1
    inverse = solver.init(operator)
    rows = torch.randn(3, operator.size, dtype=torch.float64)
    torch.testing.assert_close(operator @ (inverse @ rows), rows, rtol=1e-8, atol=1e-8)


@each_solver
def test_zero_rows_give_zero(solver):
    solution = solver.init(Dense(spd(4))).solve(torch.zeros(2, 4, dtype=torch.float64))
    assert not solution.require().any()
    assert not solution.residual.any()


def test_columns_are_solved_alone_whatever_stands_beside_them():
    matrix, rows = Dense(spd(20, 1e4)), torch.randn(5, 20, dtype=torch.float64)
    together = CG(rtol=1e-10).init(matrix).solve(rows)
    alone = torch.cat([CG(rtol=1e-10).init(matrix).solve(row[None]).value for row in rows])
    exact = torch.linalg.solve(matrix.matrix, rows.T).T
    for found in (together.value, alone):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_cg_past_convergence_stays_converged():
    matrix, rows = Dense(spd(10)), torch.randn(3, 10, dtype=torch.float64)
    solution = CG(rtol=0.0, max_steps=500).init(matrix).solve(rows)
    torch.testing.assert_close(solution.value @ matrix.matrix, rows, rtol=1e-9, atol=1e-9)
    assert solution.steps < 500
    assert set(solution.status) == {Status.CONVERGED}


def test_cg_that_stops_early_says_so_per_column():
    rows = torch.stack([torch.zeros(30), torch.randn(30)]).double()
    solution = CG(rtol=1e-10, max_steps=2).init(Dense(spd(30, 1e6))).solve(rows)
    assert solution.status == (Status.CONVERGED, Status.NOT_CONVERGED)
    with pytest.raises(NotConvergedError, match="1 of 2 solves failed.*2 steps.*accept=True"):
        solution.require()
    assert torch.isfinite(solution.value).all()


def test_cg_finds_negative_curvature():
    matrix = torch.diag(torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64))
    solution = CG().init(Dense(matrix)).solve(torch.ones(1, 3, dtype=torch.float64))
    assert solution.status == (Status.NEGATIVE_CURVATURE,)
    assert torch.isfinite(solution.value).all()
    with pytest.raises(IndefiniteError, match="bends down"):
        solution.require()


def test_cg_residual_is_the_true_one_in_float32():
    matrix, rows = spd(40, 1e5), torch.randn(2, 40)
    solution = CG(rtol=1e-9, max_steps=200).init(Dense(matrix.float())).solve(rows)
    product = solution.value.double() @ matrix.float().double()
    true = (product - rows.double()).norm(dim=1) / rows.double().norm(dim=1)
    torch.testing.assert_close(solution.residual.double(), true, rtol=0.3, atol=1e-6)


def test_a_preconditioner_saves_steps_and_not_accuracy():
    matrix = Dense(torch.diag(torch.logspace(0, 5, 50, dtype=torch.float64)))
    exact = Dense(torch.linalg.inv(matrix.matrix))
    rows = torch.randn(2, 50, dtype=torch.float64)
    plain = CG(rtol=1e-8).init(matrix).solve(rows)
    helped = CG(rtol=1e-8, preconditioner=lambda operator, m: exact).init(matrix).solve(rows)
    assert helped.steps <= 2 < 10 < plain.steps
    torch.testing.assert_close(helped.value, plain.value, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("solver", [Cholesky(), Eigen()])
def test_indefinite_matrices_are_refused_with_the_damping_that_would_do(solver):
    matrix = torch.diag(torch.tensor([1.0, -0.25], dtype=torch.float64))
    with pytest.raises(IndefiniteError, match="-2.500e-01.*damping above 2.5e-01"):
        solver.init(Dense(matrix))
    solver.init(Dense(matrix) + 0.3)


def test_another_damping_of_an_eigendecomposition_is_free():
    matrix, rows = spd(6), torch.randn(2, 6, dtype=torch.float64)
    inverse = Eigen().init(Dense(matrix)).damped(0.5)
    wanted = torch.linalg.solve(matrix + 0.5 * torch.eye(6, dtype=torch.float64), rows.T).T
    torch.testing.assert_close(inverse @ rows, wanted)


def test_dense_solves_refuse_what_would_not_fit():
    with pytest.raises(InputError, match=r"method='cg'"):
        Cholesky(largest=3).init(Dense(spd(4)))


def test_dense_solves_refuse_nan():
    with pytest.raises(NonFiniteError):
        Cholesky().init(Dense(torch.full((2, 2), torch.nan)))


def test_rows_of_another_length_are_refused():
    with pytest.raises(InputError, match=r"Expected a row \[4\]"):
        Dense(spd(4)) @ torch.ones(3, dtype=torch.float64)


def mean_of(matrix: torch.Tensor, count: int = 3):

    class Constant(MeanOperator):
        def __init__(self) -> None:
            self.size, self.count = len(matrix), count
            self.dtype, self.device = matrix.dtype, matrix.device

        def apply(self, rows):
            return rows @ matrix

        def apply_sampled(self, rows, positions):
            return rows @ matrix

        def restrict(self, positions):
            return self

    return Constant()


def test_lissa_fixed_point_is_the_damped_solve():
    matrix, rows = spd(5, 10.0), torch.randn(2, 5, dtype=torch.float64)
    solution = LiSSA(scale=2.0, depth=2000, repeats=2).init(mean_of(matrix) + 0.3).solve(rows)
    wanted = torch.linalg.solve(matrix + 0.3 * torch.eye(5, dtype=torch.float64), rows.T).T
    torch.testing.assert_close(solution.require(), wanted, rtol=1e-8, atol=1e-10)
    assert solution.residual.max() < 1e-8


def test_lissa_reference_convention_is_scale_times_damp():
    """h ← v + (1 − d) h − A h/σ, as the reference code has it, solves A + σ d."""
    matrix, v = spd(5, 10.0), torch.randn(1, 5, dtype=torch.float64)
    scale, damp = 4.0, 0.05
    h = v.clone()
    for _ in range(3000):
        h = v + (1 - damp) * h - h @ matrix / scale
    shift = LiSSA.damping_from_reference(scale, damp)
    ours = LiSSA(scale=scale, depth=3000).init(mean_of(matrix) + shift).solve(v)
    torch.testing.assert_close(ours.value, h / scale, rtol=1e-9, atol=1e-12)


def test_lissa_depth_leaves_the_stated_part_of_flat_directions():
    """After t steps a share (1 − e/σ)^(t+1) of an eigendirection is missing."""
    matrix, v = (
        torch.diag(torch.tensor([1.0, 0.01], dtype=torch.float64)),
        torch.ones(1, 2).double(),
    )
    found = LiSSA(scale=2.0, depth=100, tail=0.0).init(mean_of(matrix)).solve(v).value[0, 1]
    assert float(found) == pytest.approx(100 * (1 - (1 - 0.005) ** 101), rel=1e-9)


def test_lissa_that_diverges_is_named_and_not_nan_in_silence():
    solution = LiSSA(scale=0.2, depth=500).init(mean_of(spd(5))).solve(torch.ones(1, 5).double())
    assert solution.status == (Status.DIVERGED,)
    with pytest.raises(NotConvergedError, match="grew without bound. Raise the scale"):
        solution.require()


def test_lissa_finds_its_scale_and_reports_its_error():
    case = LINEAR_CASES[0]
    operator = curvature("hessian", case.risk()) + 0.2
    rows = torch.randn(2, operator.size, dtype=torch.float64)
    wanted = torch.linalg.solve(operator.to_dense(), rows.T).T
    solution = LiSSA(depth=1500, repeats=8, batch_size=4).init(operator).solve(rows)
    error = (solution.value - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert error.max() < 0.1
    assert (error < 3 * solution.error + 0.02).all()
    again = LiSSA(depth=1500, repeats=8, batch_size=4).init(operator).solve(rows)
    assert torch.equal(again.value, solution.value)


def test_lissa_of_closed_form_and_autograd_draw_the_same_steps():
    from upweight.curvature import Hessian

    risk = LINEAR_CASES[0].risk()
    rows = torch.randn(2, risk.objective.space.size, dtype=torch.float64)
    solver = LiSSA(scale=5.0, depth=30, repeats=2, batch_size=3)
    closed = solver.init(curvature("hessian", risk)).solve(rows).value
    torch.testing.assert_close(closed, solver.init(Hessian(risk)).solve(rows).value)


def test_lissa_needs_examples_to_draw_from():
    with pytest.raises(InputError, match="not a mean over examples"):
        LiSSA().init(Identity(3, torch.float64, torch.device("cpu")))
