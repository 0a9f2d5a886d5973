"""Trainings by a recipe against plain torch loops, one model after the other."""

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from upweight.retraining import Fresh
from upweight.retraining.starts import begun

N, L2 = 60, 0.01


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()


def rows(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (N,), generator=generator)


def test_retraining_equals_a_plain_loop():
    (x, y), model = rows(), network()
    inf = uw.Influence(model, (x, y), loss="cross_entropy", l2=L2)
    training = uw.Training(3, 16, uw.SGD(0.1, momentum=0.9))
    trials = uw.Trials.subsets(N, count=4, fraction=0.5, seeds=[0, 1])
    truth = inf.retrain((x[:4], y[:4]), trials, training)
    for seed, gone, found in zip(trials.seeds.tolist(), trials.gone, truth.measured, strict=True):
        twin = begun(model, Fresh(), seed)
        optimiser = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
        for epoch in range(3):
            for batch in training.epoch(seed, epoch, N).split(16):
                kept = batch[~torch.from_numpy(gone)[batch]]
                loss = nn.functional.cross_entropy(twin(x[kept]), y[kept])
                loss = loss + 0.5 * L2 * sum(p.square().sum() for p in twin.parameters())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        with torch.no_grad():
            wanted = nn.functional.cross_entropy(twin(x[:4]), y[:4], reduction="none")
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-9)


def test_trials_of_other_data_are_refused():
    inf = uw.Influence(network(), rows(), loss="cross_entropy")
    with pytest.raises(uw.errors.InputError, match="of 7 examples"):
        inf.retrain(
            rows(), uw.Trials.without([[0]], 7, seeds=[0]), uw.Training(1, 16, uw.SGD(0.1))
        )
