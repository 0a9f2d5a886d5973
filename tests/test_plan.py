"""Plans: every method has one, they change nothing, and count what they say they count."""

import math

import pytest
import torch
from torch import nn

import upweight as uw
from upweight.errors import InputError
from upweight.methods import METHODS
from upweight.probes import Tally, peak_bytes


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
