"""When conjugate gradients end, what several dampings share, and what an indefinite matrix says."""

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from upweight.curvature import GaussNewton, Leading
from upweight.errors import IndefiniteError, InputError
from upweight.linalg import Dense, Operator, Status
from upweight.risk import Risk
from upweight.solvers import CG, Budget, Settled
from upweight.solvers.stopping import Progress, Rule


class Counted(Operator):
    """Counts the rows it is multiplied with."""

    def __init__(self, base):
        self.base, self.rows, self.products = base, 0, 0
        self.size, self.dtype, self.device = base.size, base.dtype, base.device

    def apply(self, rows):
        self.rows, self.products = self.rows + len(rows), self.products + 1
        return self.base.apply(rows)


def matrix(size=60, condition=1e4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)), size, dtype=torch.float64)
    return (q * values) @ q.T


def rows(count=3, size=60, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


def network(n=40):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = torch.randn(n, 6).double(), torch.arange(n) % 3
    return Risk(uw.Objective(model, "cross_entropy", l2=0.01), uw.Data.of(data))


def test_a_budget_of_steps_is_no_failure_and_says_what_is_left():
    solution = CG(rtol=1e-12, stop=(Budget(steps=2),)).init(Dense(matrix())).solve(rows())
    assert set(solution.status) == {Status.ENDED}
    assert solution.steps == 2
    wanted = (rows() - solution.value @ matrix()).norm(dim=1) / rows().norm(dim=1)
    torch.testing.assert_close(solution.residual, wanted)
    assert solution.require() is solution.value
    (caveat,) = solution.caveats()
    assert "Budget(steps=2" in caveat
    assert f"{float(wanted.max()):.1e}" in caveat


def test_an_ended_row_beside_a_finished_one():
    two = torch.stack([torch.linalg.eigh(matrix())[1][:, -1], rows()[0]])
    solution = CG(rtol=1e-8, stop=(Budget(steps=1),)).init(Dense(matrix())).solve(two[:1])
    assert solution.status == (Status.CONVERGED,)


def test_running_into_max_steps_stays_a_failure():
    solution = CG(rtol=1e-12, max_steps=2).init(Dense(matrix())).solve(rows())
    assert set(solution.status) == {Status.NOT_CONVERGED}


def test_a_budget_of_seconds_begins_no_step_that_would_not_fit(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("upweight.solvers.cg.monotonic", lambda: now[0])
    slow = Counted(Dense(matrix()))
    plain = slow.apply

    def later(asked):
        now[0] += 10.0
        return plain(asked)

    monkeypatch.setattr(slow, "apply", later)
    solution = CG(rtol=1e-12, stop=(Budget(seconds=35.0),)).init(slow).solve(rows())
    assert solution.steps == 3
    assert set(solution.status) == {Status.ENDED}


@pytest.mark.parametrize("given", [{}, {"steps": 0}, {"seconds": -1.0}])
def test_a_budget_is_positive(given):
    with pytest.raises(InputError, match="positive number of steps or seconds"):
        Budget(**given)


def test_ranks_settle_before_the_residual_does():
    risk = network()
    operator = GaussNewton(risk)
    queries = torch.randn(4, operator.size, generator=torch.Generator().manual_seed(2)).double()
    whole = CG(rtol=1e-10).init(operator).solve(queries)
    solution = CG(rtol=1e-10, stop=(Settled(0.99, steps=2),)).init(operator).solve(queries)
    assert set(solution.status) == {Status.ENDED}
    assert solution.steps < whole.steps
    assert "Settled(rank=0.99" in solution.caveats()[0]


def test_ranks_are_those_of_scores_and_their_correlation_spearmans():
    risk, stats = network(), pytest.importorskip("scipy.stats")
    operator, generator = GaussNewton(risk), torch.Generator().manual_seed(3)
    first = torch.randn(1, operator.size, generator=generator).double()
    second = first + 0.5 * torch.randn(1, operator.size, generator=generator).double()
    model, slopes = risk.objective.model, []
    for i in range(len(risk.data)):
        batch = risk.data.rows(i, i + 1)
        value = nn.functional.cross_entropy(model(*batch.inputs), batch.targets)
        parts = torch.autograd.grad(value, list(model.parameters()))
        slopes.append(torch.cat([part.flatten() for part in parts]))
    one, other = (torch.stack(slopes) @ row[0] for row in (first, second))
    wanted = float(stats.spearmanr(one, other).statistic)
    assert 0.5 < wanted < 0.999

    def ends(rank):
        settled = Settled(rank, steps=1, examples=1000).begin(operator + 0.5)
        assert not settled(Progress(1, first, torch.ones(1), 0.0, 0.0, 1.0))
        return settled(Progress(2, second, torch.ones(1), 0.0, 0.0, 1.0))

    assert ends(wanted - 1e-9)
    assert not ends(wanted + 1e-9)


def test_ranks_need_training_data():
    with pytest.raises(InputError, match="none"):
        CG(stop=(Settled(),)).init(Dense(matrix())).solve(rows())


def test_own_rules_may_end_a_solve():
    class Never(Rule):
        def begin(self, operator):
            return lambda now: False

    solution = CG(rtol=1e-9, stop=(Never(),)).init(Dense(matrix())).solve(rows())
    assert set(solution.status) == {Status.CONVERGED}


@pytest.mark.parametrize("preconditioned", [False, True])
def test_dampings_share_their_directions(preconditioned):
    """The answers are those of separate solves, for fewer rows multiplied."""
    risk = network()
    solver = CG(rtol=3e-10, preconditioner=Leading(20) if preconditioned else None)
    queries = torch.randn(3, GaussNewton(risk).size).double()
    dampings, alone, shared = (0.001, 0.003, 0.01, 0.03, 0.1), 0, 0
    kept = None
    for damping in dampings:
        single = GaussNewton(risk)
        wanted = solver.init(single + damping).solve(queries)
        alone += wanted.steps
        kept = kept or solver.prepared(GaussNewton(risk))
        found = solver.init(kept + damping).solve(queries)
        shared += found.steps
        torch.testing.assert_close(found.require(), wanted.require(), rtol=1e-6, atol=1e-8)
        assert found.residual.max() < 2e-9
    assert shared < 0.6 * alone


def test_a_sweep_equals_separate_explanations():
    risk = network()
    queries = risk.data.take(torch.arange(4))
    method = uw.Method("tight", "", "ggn", CG(rtol=1e-10))
    sweep = uw.Influence(risk.objective, risk.data, method=method).sweep(queries, [0.01, 0.1, 1.0])
    for damping in (0.01, 0.1, 1.0):
        alone = uw.Influence(risk.objective, risk.data, method=method, damping=damping)
        np.testing.assert_allclose(
            sweep[damping].values, alone.explain(queries).values, rtol=1e-6, atol=1e-12
        )


def test_directions_beyond_their_room_are_let_go(monkeypatch):
    monkeypatch.setattr("upweight.solvers.cg.budget", lambda: 2)
    solver, base = CG(rtol=1e-10), Dense(matrix())
    kept = solver.prepared(base)
    for damping in (0.0, 0.01):
        found = solver.init(kept + damping).solve(rows()).require()
        dense = matrix() + damping * torch.eye(60, dtype=torch.float64)
        torch.testing.assert_close(found, torch.linalg.solve(dense, rows().T).T)


@pytest.mark.parametrize("size", [3, 60])
def test_an_indefinite_matrix_says_how_far_it_bends_and_what_would_repair_it(size):
    values = torch.linspace(-0.5, 4.0, size, dtype=torch.float64)
    q, _ = torch.linalg.qr(rows(size, size))
    bent = Dense((q * values) @ q.T)
    with pytest.raises(IndefiniteError) as caught:
        CG(rtol=1e-10).init(bent + 0.1) @ rows(3, size)
    text = str(caught.value)
    repair = float(text.partition("damping=")[2].partition(" ")[0])
    assert 0.4 < repair < 1.0
    solution = CG(rtol=1e-8).init(bent + repair).solve(rows(3, size))
    assert set(solution.status) == {Status.CONVERGED}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_solve_far_beyond_convergence_stays_converged(dtype):
    base = Dense(matrix(40, 1e2).to(dtype))
    asked = rows(5, 40).to(dtype)
    rtol = 100 * torch.finfo(dtype).eps
    solution = CG(rtol=rtol, max_steps=5000).init(base).solve(asked)
    assert set(solution.status) == {Status.CONVERGED}
    wanted = torch.linalg.solve(base.matrix, asked.T).T
    torch.testing.assert_close(solution.value, wanted, rtol=1e4 * rtol, atol=1e4 * rtol)
