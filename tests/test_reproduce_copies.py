"""Stacked training against torch.optim.Adam, one model after the other."""

import copy

import pytest
import torch
from torch import nn

import upweight as uw
from reproduce.copies import Copies, train_copies
from upweight.gradients import stacked
from upweight.risk import Risk

LR, BATCH, STEPS = 0.01, 12, 25


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)
    ).double()  # fmt: skip


def plan(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(count, generator=generator)[:BATCH] for _ in range(STEPS)]
    return [(positions, LR if step < 10 else LR / 10) for step, positions in enumerate(drawn)]


@pytest.fixture
def case():
    torch.manual_seed(3)
    x, y = torch.randn(40, 1, 8, 8, dtype=torch.float64), torch.randint(0, 4, (40,))
    model = network()
    objective = uw.Objective(model, "cross_entropy", l2={"*.weight": 0.03})
    return model, Risk(objective, uw.Data.of((x, y))), (x, y)


def by_torch(model, data, gone, steps, state=None):
    """A plain loop with torch.optim.Adam that leaves examples out of its minibatches."""
    x, y = data
    model = copy.deepcopy(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=LR)
    if state is not None:
        optimiser.load_state_dict(state)
    for positions, lr in steps:
        optimiser.param_groups[0]["lr"] = lr
        kept = positions[~torch.isin(positions, gone)]
        loss = nn.functional.cross_entropy(model(x[kept]), y[kept])
        for name, value in model.named_parameters():
            if name.endswith("weight"):
                loss = loss + 0.5 * 0.03 * value.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model, optimiser.state_dict()


def row_of(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize(("models", "cells"), [(1, 5), (4, 512)])
def test_copies_equal_a_loop_over_torch_adam(case, models, cells, monkeypatch):
    monkeypatch.setattr(stacked, "MODELS", models)
    monkeypatch.setattr(stacked, "CELLS", cells)
    model, risk, data = case
    steps, removals = plan(40), [torch.tensor([]), torch.tensor([7]), torch.tensor([1, 30, 31])]
    start = Copies.fresh(risk.objective.space.row()).repeat(3)
    found = train_copies(risk, start, removals, plan=steps)
    assert found.steps == STEPS
    for row, gone in zip(found.rows, removals, strict=True):
        expected, _ = by_torch(model, data, gone, steps)
        torch.testing.assert_close(row, row_of(expected), rtol=0, atol=1e-10)
    assert float((found.rows[0] - found.rows[1]).norm()) > 1e-3


def test_copies_go_on_from_a_checkpoint_with_its_moments(case):
    """Trained in two halves, the second without an example, equals torch's two halves."""
    model, risk, data = case
    steps, gone = plan(40), torch.tensor([5])
    half = train_copies(
        risk, Copies.fresh(risk.objective.space.row()), [torch.tensor([])], plan=steps[:12]
    )
    found = train_copies(risk, half.repeat(2), [torch.tensor([]), gone], plan=steps[12:])
    middle, state = by_torch(model, data, torch.tensor([]), steps[:12])
    for row, left_out in zip(found.rows, (torch.tensor([]), gone), strict=True):
        expected, _ = by_torch(middle, data, left_out, steps[12:], copy.deepcopy(state))
        torch.testing.assert_close(row, row_of(expected), rtol=0, atol=1e-10)


def test_weights_count_and_sum_keeps_shares(case):
    """Without renormalising, leaving an example out is giving it no weight in the same mean."""
    model, risk, data = case
    weights = torch.linspace(0.5, 2, 40, dtype=torch.float64)
    objective = uw.Objective(model, "cross_entropy", l2=0.1, removal="sum")
    weighted = Risk(objective, uw.Data.of(data, weights=weights))
    row, positions = objective.space.row(), torch.arange(10)
    found = train_copies(
        weighted, Copies.fresh(row), [torch.tensor([4])], plan=[(positions, LR)]
    ).first[0]
    losses = risk.objective.losses(
        objective.space.unflatten(row.requires_grad_()), risk.at(positions)[0]
    )
    kept = weights[:10] / weights[:10].sum()
    value = (losses * kept).sum() - kept[4] * losses[4] + 0.05 * row.square().sum()
    expected = 0.1 * torch.autograd.grad(value, row)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_copies_in_double_resolve_what_float32_parameters_cannot(case):
    """Differences of copies, with float32 gradients: kept in float64 they lose far less."""
    model, risk, _ = case
    steps, removals = plan(40), [torch.tensor([]), torch.tensor([7])]
    exact = Copies.fresh(risk.objective.space.row()).repeat(2)
    single = uw.Objective(copy.deepcopy(model).float(), "cross_entropy", l2={"*.weight": 0.03})
    rough = Risk(single, risk.data)
    start = Copies.fresh(single.space.row()).repeat(2)
    truth = train_copies(risk, exact, removals, plan=steps).rows.diff(dim=0)
    errors = [
        float((train_copies(rough, one, removals, plan=steps).rows.diff(dim=0) - truth).norm())
        for one in (start, start.double())
    ]
    assert errors[1] < min(1e-5, errors[0])


def test_as_many_removals_as_copies(case):
    _, risk, _ = case
    start = Copies.fresh(risk.objective.space.row())
    with pytest.raises(uw.errors.InputError, match="2 removals for 1 copies"):
        train_copies(risk, start, [torch.tensor([1])] * 2, plan=[])
