"""Figure 2, right, on a slice: the network, its curvature, retrainings and refits."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from reproduce import fig2_network as experiment
from reproduce import kept, network
from reproduce.experiment import Steps
from upweight.curvature import curvature
from upweight.gradients import stacked_gradient

SMALL = dataclasses.replace(
    experiment.Settings(), n=200, batch=50, steps=(150, 60, 60), removals=8, queries=2,
    retrain_steps=30, anneal_steps=60,
)  # fmt: skip


def parameters_of(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def test_the_network_is_the_papers():
    """2,616 parameters, VALID convolutions, tanh after each, mean over space, ten outputs."""
    model = network.Network(0)
    assert sum(p.numel() for p in model.parameters()) == 2616
    pixels = torch.rand(3, 784)
    x = pixels.view(3, 1, 28, 28)
    for layer, (_, _, size, stride) in zip(model.convolutions, network.LAYERS, strict=True):
        assert layer.weight.shape[-1] == size
        x = torch.tanh(F.conv2d(x, layer.weight, layer.bias, stride=stride))
    assert x.shape == (3, 10, 2, 2)
    expected = x.mean((2, 3)) @ model.top.weight.T + model.top.bias
    torch.testing.assert_close(model(pixels), expected)
    deep = model.convolutions[2].weight
    assert float(deep.detach().abs().max()) <= 4 / 72**0.5
    assert 0.8 < float(deep.detach().std()) * 72**0.5 / (2 * 0.88) < 1.2


def test_gauss_newton_from_jacobians_is_the_librarys():
    generator = torch.Generator().manual_seed(1)
    data = (torch.rand(30, 784, generator=generator), torch.arange(30) % 10)
    row = parameters_of(network.Network(0)).double()
    risk = experiment._risk(row, data, SMALL)
    rows = torch.randn(2, 2616, generator=generator, dtype=torch.float64)
    expected = curvature("ggn", risk).apply(rows)
    found = rows @ network.gauss_newton(risk)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    slope = stacked_gradient(
        risk.objective, risk.at(torch.arange(30))[0], row[None],
        weights=torch.full((1, 30), 1 / 30, dtype=torch.float64),
    )  # fmt: skip
    value, whole = network.value_and_slope(risk, row)
    torch.testing.assert_close(slope[0] + row * risk.objective.l2, whole, rtol=1e-9, atol=1e-10)
    assert float(value) == pytest.approx(risk.value(), rel=1e-9)


def test_a_killed_run_goes_on_with_the_next_shard(tmp_path, monkeypatch):
    made = []

    def refit(risk, row, shares, near):
        made.append(len(shares))
        if len(made) == 2:
            raise KeyboardInterrupt
        return row + shares

    def share(risk, everything, some):
        return torch.tensor([[float(len(one))] for one in some])

    monkeypatch.setattr(kept, "refitted", refit)
    monkeypatch.setattr(kept, "kept_shares", share)
    monkeypatch.setattr(kept, "SHARD", 2)
    risk = SimpleNamespace(data=range(10))
    gone, row, near = kept.left_out([7, 8, 9, 3]), torch.zeros(3), (None, 0.1)
    with pytest.raises(KeyboardInterrupt):
        kept.refits(risk, row, gone, near=near, steps=Steps(tmp_path))
    steps = Steps(tmp_path)
    rows = kept.refits(risk, row, gone, near=near, steps=steps)
    assert made == [2, 2, 2, 1]
    assert rows[:, 0].tolist() == [0, 1, 1, 1, 1]
    assert len(steps.before) == 1


@pytest.fixture(scope="module")
def slice_of_it(data_folder):
    del data_folder
    steps = Steps()
    with pytest.MonkeyPatch.context() as patch:
        # So few images bend the objective down further than 5,500 do.
        patch.setattr(experiment, "SAFE", (0.3, 1.0))
        first = experiment._as_the_paper(experiment._data(SMALL), SMALL, steps)
        return first, experiment._settled_way(first, SMALL, steps)


def _r(point):
    return np.corrcoef(point["ggn"][0, point["removed"]], point["actual"][0])[0, 1]


def test_predictions_agree_with_retrainings_and_refits(slice_of_it):
    first, second = slice_of_it
    assert second["damping"] == 0.3
    assert _r(first) > 0.5
    assert _r(second) > 0.98
    assert second["slopes"][1:].max() < 1e-2
    # The copy that keeps everything stays where it was.
    assert np.abs(second["drift"]).max() < 1e-4 * np.abs(second["actual"]).max()
