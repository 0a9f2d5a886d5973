"""Plans: every method has one, they change nothing, and count what they say they count."""

import math
from typing import final

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import upweight as uw
from upweight import probes
from upweight.errors import InputError
from upweight.linalg import Cost, Load, Solver
from upweight.methods import METHODS
from upweight.probes import Tally, peak_bytes
from upweight.projections import ProjectedKernel, Pulled, RandomSides, compression_of
from upweight.weighing import per_parameter_change, without_loss


def rows(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def influence(method="ekfac", **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    return uw.Influence(model, rows(), loss="cross_entropy", l2=0.01, method=method, **settings)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "bm25"])
def test_every_method_has_a_plan_that_changes_nothing(method):
    inf = influence(method)
    before = {name: value.clone() for name, value in inf.objective.model.state_dict().items()}
    found = inf.plan(rows(5, seed=1))
    assert found.stages[-1].name in ("scores", "similarities")
    for stage in found.stages:
        assert all(math.isfinite(x) and x >= 0 for x in (stage.seconds, stage.bytes, stage.disk))
    assert found.bytes == max(stage.bytes for stage in found.stages) > 0
    assert found.seconds == sum(stage.seconds for stage in found.stages) > 0
    assert 0 < found.coverage <= 1
    assert "GiB at the peak" in repr(found)
    after = inf.objective.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "curvature" not in inf._made.__dict__  # nothing was fitted to all of the data


def test_what_would_stop_the_run_stops_the_plan():
    with pytest.raises(InputError, match="counts token ids"):
        influence("bm25").plan(rows(5))
    with pytest.raises(InputError, match="damping=0.1 would be ignored"):
        influence("no_hessian", damping=0.1).plan(rows(5))
    with pytest.raises(InputError, match="dense solve of 119 parameters"):
        influence(uw.Cholesky(largest=50)).plan(rows(5))


def test_scores_take_their_own_size_on_disk_and_kept_gradients_theirs(tmp_path):
    plain = influence().plan(rows(5, seed=1)).stages[-1].disk
    assert plain == 5 * 40 * 4
    kept = influence().keep(gradients=tmp_path / "g").plan(rows(5, seed=1)).stages[-1].disk
    inf = influence().keep(gradients=tmp_path / "g")
    inf.explain(rows(5, seed=1))
    files = sum(path.stat().st_size for path in (tmp_path / "g").glob("*.safetensors"))
    assert kept - plain == pytest.approx(files, rel=0.1)


class Clock(FlopCounterMode):
    """Operations of products in place of seconds, so that estimates can be compared by value."""

    def __call__(self):
        return float(self.get_total_flops())


QUERIES = torch.ones(8, 20).cumsum(0).sin(), torch.arange(8) % 5


def network(method, batch_size=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 5))
    rows = torch.randn(1200, 20), torch.randint(5, (1200,))
    data = uw.Data.of(rows, batch_size=batch_size)
    return uw.Influence(model, data, loss="cross_entropy", l2=0.1, method=method)


def planned_and_done(method, monkeypatch, batch_size=None):
    """Operations that a plan foretells, stage by stage, and those of the run itself."""
    with Clock(display=False) as clock, monkeypatch.context() as patch:
        patch.setattr(probes, "clock", clock)
        plan = network(method, batch_size).plan(QUERIES)
    with Clock(display=False) as clock:
        network(method, batch_size).explain(QUERIES, accept=True)
    return plan, clock()


TEN = uw.CG(rtol=1e-30, max_steps=10)
LISSA = uw.LiSSA(scale=50.0, depth=60, repeats=2, batch_size=20)
COUNTED = {
    "cg": uw.Method("m", "", "ggn", TEN),
    "lissa": uw.Method("m", "", "ggn", LISSA),
    "ggn": "ggn",
    "ekfac": "ekfac",
    "ekfac by cg": uw.Method("m", "", "ekfac", TEN),
    "relatif": "relatif",
    "arnoldi": "arnoldi",
    "nystrom": "nystrom",
    "no_hessian": "no_hessian",
    "cosine": "cosine",
    "loss": "loss",
    "gradient_norm": "gradient_norm",
}


@pytest.mark.parametrize("name", COUNTED)
def test_plans_foretell_the_operations_of_the_run(name, monkeypatch):
    plan, done = planned_and_done(COUNTED[name], monkeypatch)
    assert plan.known
    assert plan.seconds == pytest.approx(done, rel=0.3)


@pytest.mark.parametrize("name", ["cg", "ekfac", "relatif", "no_hessian", "cosine"])
def test_plans_of_small_batches_count_all_of_them(name, monkeypatch):
    plan, done = planned_and_done(COUNTED[name], monkeypatch, batch_size=100)
    assert plan.seconds == pytest.approx(done, rel=0.3)


@pytest.mark.parametrize("method", ["relatif", "l_relatif"])
def test_factors_on_training_gradients_cost_a_product_each(method, monkeypatch):
    (plain, once), (weighed, more) = (
        planned_and_done(name, monkeypatch) for name in ("ekfac", method)
    )
    found = weighed.stages[-1].seconds - plain.stages[-1].seconds
    assert found == pytest.approx(more - once, rel=0.03)
    assert found > 1200 * 2 * (21 * 21 + 24 * 24)  # into the basis, per example


@pytest.mark.parametrize("solver", [uw.Cholesky(), TEN])
def test_factors_that_solve_for_every_example_are_a_stage(solver):
    method = uw.Method("m", "", "ggn", solver, per_parameter_change)
    (stage,) = [s for s in network(method).plan(QUERIES).stages if "factors" in s.name]
    assert stage.name == "factors of training gradients (1,200 solves)"
    assert stage.seconds > 0
    ablation = uw.Method("m", "", "ggn", solver, without_loss)  # looks at losses alone
    assert not [s for s in network(ablation).plan(QUERIES).stages if "factors" in s.name]


@final
class Silent(Solver):
    """Says nothing of its cost."""

    def init(self, operator):
        return uw.Cholesky().init(operator)


def test_a_solver_that_says_nothing_is_not_planned_and_the_plan_says_so():
    plan = network(Silent()).plan(QUERIES)
    assert [stage.known for stage in plan.stages] == [False, True]
    assert not plan.known
    assert plan.seconds == plan.stages[1].seconds > 0
    assert plan.bytes == plan.stages[1].bytes
    said = repr(plan)
    for words in ("At least", "unknown", "solve (Silent does not say what it takes)"):
        assert words in said


def test_a_given_inverse_is_timed_as_it_is():
    calls = []

    class Half:
        def __matmul__(self, columns):
            calls.append(columns.shape)
            return columns / 2

    plan = network(Half()).plan(QUERIES)
    assert [stage.name for stage in plan.stages] == ["preconditioning", "scores"]
    assert calls[0] == (629, 8)


def test_what_solvers_say():
    load = Load(size=100, rows=7, examples=50, item=8)
    assert load.bytes == 7 * 100 * 8
    dense = uw.Cholesky().cost(load)
    assert (dense.matrix, dense.products, dense.bytes) == (True, 1, 16 * 100**2)
    assert dense.operations == 100**3 / 3 + 7 * 100**2
    assert uw.Eigen().cost(load).matrix
    assert uw.Spectral().cost(load) == Cost()
    assert uw.CG(max_steps=3).cost(load).products == 3
    assert uw.CG().cost(load).bytes == 5 * load.bytes
    assert uw.CG().cost(load).without == ""
    assert "preconditioner" in METHODS["cg"].solver.cost(load).without
    series = LISSA.cost(load)
    assert (series.products, series.steps, series.drawn) == (1, 60 * 2, 20)
    assert Silent().cost(load) is None


def test_a_trial_that_is_singular_does_not_stop_the_plan_but_is_told():
    """Tokens that the first examples lack have no curvature there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9000, 2), nn.Flatten(), nn.Linear(2, 2))
    tokens, labels = torch.arange(9000)[:, None], torch.arange(9000) % 2
    inf = uw.Influence(model, (tokens, labels), loss="cross_entropy", method="diagonal")
    plan = inf.plan((tokens[:2], labels[:2]))
    assert "Note: on the part of the data that was tried: The curvature is" in repr(plan)
    assert plan.stages[-1].name == "scores"


def test_what_is_kept_of_a_compressed_gradient_is_planned(tmp_path):
    """A projection keeps k x k numbers of a layer where all of its gradient would be more."""
    sizes = {}
    for side in (2, 4):
        method = uw.Method(
            "m",
            "",
            ProjectedKernel(RandomSides(side)),
            Pulled(uw.Cholesky()),
            compression=compression_of,
        )
        inf = network(method).keep(gradients=tmp_path / str(side))
        sizes[side] = inf.plan(QUERIES).stages[-1].disk - 8 * 1200 * 4
        assert not (tmp_path / str(side)).exists()
        inf.explain(QUERIES)
        files = (tmp_path / str(side)).glob("*.safetensors")
        assert sizes[side] == pytest.approx(sum(path.stat().st_size for path in files), rel=0.1)
    assert sizes[4] > sizes[2]


def test_a_tally_counts_sparse_tensors():
    with Tally() as tally:
        x = torch.sparse_coo_tensor(
            torch.tensor([[0, 2]]), torch.ones(2), (3,), check_invariants=True
        )
        y = x * 2
        del x
    assert tally.peak == 2 * 8 + 2 * 4 + 2 * 4  # both share their places
    assert y.to_dense().tolist() == [2, 0, 2]


def test_a_tally_counts_bytes_while_they_live():
    with Tally() as tally:
        x = torch.ones(1000, dtype=torch.float64)
        y = x * 2
        z = y.view(10, 100)
        assert tally.now == 16000
        del x, y
        assert tally.now == 8000
        z.add_(1)
        del z
    assert (tally.now, tally.peak) == (0, 16000)


def test_the_graph_of_a_forward_pass_counts():
    weight = torch.ones(100, 100, requires_grad=True)

    def work():
        out = torch.ones(50, 100)
        for _ in range(4):
            out = torch.sigmoid(out @ weight)
        return out

    held, out = peak_bytes(work)
    with torch.no_grad():
        free, _ = peak_bytes(work)
    assert held >= 4 * 50 * 100 * 4
    assert free < held
    assert out.shape == (50, 100)
