"""Attacks on the training set: the slope is that of really retraining, and the defence sees it."""

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from upweight.attacks import Attempt, Box, attack, retrained, vulnerability
from upweight.errors import DataError, InputError, ModelError, NotConvergedError

L2 = 0.01


def minimise(head, x, y):
    optimiser = torch.optim.LBFGS(
        head.parameters(), max_iter=300, tolerance_grad=1e-12, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimiser.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(head(x)[:, 0], y)
        loss = loss + 0.5 * L2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return head


def loss_of(head, query):
    x, y = query
    with torch.no_grad():
        return nn.functional.binary_cross_entropy_with_logits(head(x)[:, 0], y).item()


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(40, 6, generator=generator).double()
    y = (raw[:, 0] + 0.3 * torch.randn(40, generator=generator) > 0).double()
    extractor = nn.Sequential(nn.Linear(6, 12), nn.Tanh()).double().requires_grad_(False)
    extractor[0].weight.copy_(torch.randn(12, 6, generator=generator) / 2)
    extractor[0].bias.zero_()
    x = extractor(raw)
    head = minimise(nn.Linear(12, 1, bias=False).double(), x, y)
    inf = uw.Influence(head, (x, y), loss="binary_cross_entropy", l2=L2)
    asked = torch.randn(3, 6, generator=generator).double()
    queries = (extractor(asked), (head(extractor(asked))[:, 0] > 0).double().detach())
    return raw, x, y, extractor, head, inf, queries


def retrain(task, ids, inputs):
    """The head trained anew, from zero, on the changed features."""
    _, x, y, extractor, _, _, _ = task
    x = x.clone()
    x[ids] = extractor(inputs)
    return minimise(nn.Linear(12, 1, bias=False).double(), x, y)


def slope_norm(task, i):
    """1-norm of the derivative of the retrained loss in one input, by central differences."""
    raw, queries = task[0], task[-1]
    total = 0.0
    for k in range(raw.shape[1]):
        ends = []
        for sign in (1, -1):
            there = raw[[i]].clone()
            there[0, k] += sign * 1e-4
            ends.append(loss_of(retrain(task, [i], there), queries))
        total += abs(ends[0] - ends[1]) / 2e-4
    return total


def test_the_first_step_is_along_the_derivative_of_really_retraining(task):
    """One tiny step raises the retrained loss by step · ‖∇‖₁, so every sign is right."""
    raw, _, _, extractor, head, inf, queries = task
    small, i = 1e-4, int(vulnerability(inf, queries)["train"][0])
    (after,) = attack(
        inf, extractor, [Attempt([i], raw[[i]], queries)], box=Box(1.0, small, -9, 9), rounds=1
    )
    moved = after.inputs - raw[[i]]
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, small), rtol=1e-6, atol=0)
    real = loss_of(retrain(task, [i], after.inputs), queries) - loss_of(head, queries)
    assert real == pytest.approx(small * slope_norm(task, i), rel=3e-3)


def test_outcomes_are_those_of_training_anew(task):
    raw, _, _, extractor, _, inf, queries = task
    some = [Attempt([2, 7], raw[[2, 7]] + 0.8, queries), Attempt([3], raw[[3]] - 0.5, queries)]
    for attempt, found in zip(some, retrained(inf, extractor, some), strict=True):
        anew = retrain(task, list(attempt.ids), attempt.inputs)
        torch.testing.assert_close(found.row, anew.weight.detach()[0], rtol=1e-5, atol=1e-6)
        assert found.loss.mean() == pytest.approx(loss_of(anew, queries), rel=1e-5)
        wrong = (anew(queries[0])[:, 0] > 0).double() != queries[1]
        assert found.wrong.tolist() == wrong.tolist()


def test_attacks_stay_in_the_box_and_raise_the_loss(task):
    raw, _, _, extractor, head, inf, queries = task
    box = Box(radius=0.4, step=0.1, low=-1.0, high=1.5)
    inside = raw.clamp(box.low, box.high)
    x = extractor(inside)
    y = inf.data.rows().targets
    head = minimise(nn.Linear(12, 1, bias=False).double(), x, y)
    inf = uw.Influence(head, (x, y), loss="binary_cross_entropy", l2=L2)
    one = (queries[0][:1], queries[1][:1])
    attempts = [Attempt([i, i + 1], inside[[i, i + 1]], one) for i in (0, 6, 12)]
    outcomes = attack(inf, extractor, attempts, box=box, rounds=6)
    for attempt, found in zip(attempts, outcomes, strict=True):
        assert float((found.inputs - attempt.inputs).abs().max()) <= 0.4 + 1e-12
        assert float(found.inputs.min()) >= box.low
        assert float(found.inputs.max()) <= box.high
        assert found.loss[0] > loss_of(head, one)
        assert found.wrong.all() or found.rounds == 6
        torch.testing.assert_close(found.features, extractor(found.inputs))


def test_a_wide_box_flips_the_query_and_the_audit_finds_the_culprits(task):
    raw, x, y, extractor, _, inf, queries = task
    one = (queries[0][:1], queries[1][:1])
    other = [int(i) for i in (y != one[1]).nonzero()[:6, 0]]
    box = Box(radius=8.0, step=0.2, low=-20, high=20)
    (found,) = attack(inf, extractor, [Attempt(other, raw[other], one)], box=box, rounds=60)
    assert found.wrong.all()
    assert 0 < found.rounds < 60
    poisoned = x.clone()
    poisoned[other] = found.features
    head = retrain(task, other, found.inputs)
    audit = uw.Influence(head, (poisoned, y), loss="binary_cross_entropy", l2=L2).audit()
    worst = audit["id"][np.argsort(-audit["self_influence"])][:6]
    assert len(set(other) & set(worst.tolist())) >= 2


def test_vulnerability_is_the_mean_size_of_perturbations(task):
    *_, inf, queries = task
    table = vulnerability(inf, queries)
    wanted = inf.perturbation(queries, list(range(40))).magnitude().mean(0).numpy()
    order = table["train"]
    np.testing.assert_allclose(table["vulnerability"], wanted[order], rtol=1e-10)
    assert (np.diff(table["vulnerability"]) <= 0).all()


def test_what_cannot_be_attacked_is_refused(task):
    raw, x, y, extractor, head, inf, queries = task
    box = Box(1.0, 0.1, -9, 9)
    with pytest.raises(InputError, match="differs from the features"):
        attack(inf, extractor, [Attempt([1], raw[[2]], queries)], box=box)
    with pytest.raises(DataError, match="one input for each id"):
        attack(inf, extractor, [Attempt([1, 2], raw[[1]], queries)], box=box)
    with pytest.raises(DataError, match="each id once"):
        attack(inf, extractor, [Attempt([1, 1], raw[[1, 1]], queries)], box=box)
    with pytest.raises(InputError, match="floating numbers"):
        attack(inf, extractor, [Attempt([1], raw[[1]].int(), queries)], box=box)
    random = nn.Sequential(extractor, nn.Dropout(0.5)).train()
    with pytest.raises(ModelError, match="eval"):
        attack(inf, random, [Attempt([1], raw[[1]], queries)], box=box)
    with pytest.raises(InputError, match="step ≤ radius"):
        Box(0.5, 1.0, 0, 255)
    early = nn.Linear(12, 1, bias=False).double()
    early = uw.Influence(early, (x, y), loss="binary_cross_entropy", l2=L2)
    with pytest.raises(NotConvergedError, match="not at a minimum"):
        attack(early, extractor, [Attempt([1], raw[[1]], queries)], box=box)
    plain = uw.Influence(head, (x, y[:, None]), loss="mean_squared_error", l2=L2)
    with pytest.raises((InputError, NotConvergedError)):
        attack(
            plain, extractor, [Attempt([1], raw[[1]], (queries[0], queries[1][:, None]))], box=box
        )


def test_targets_in_a_column_say_the_same(task):
    raw, x, y, extractor, head, inf, queries = task
    column = uw.Influence(head, (x, y[:, None]), loss="binary_cross_entropy", l2=L2)
    box, found = Box(radius=0.5, step=0.1, low=-9, high=9), []
    for of, targets in ((inf, queries[1]), (column, queries[1][:, None])):
        attempt = Attempt([3, 7], raw[[3, 7]], (queries[0], targets))
        found += attack(of, extractor, [attempt], box=box, rounds=2)
    assert found[0].wrong.shape == found[1].wrong.shape == (3,)
    np.testing.assert_array_equal(found[0].wrong, found[1].wrong)
    np.testing.assert_allclose(found[0].loss, found[1].loss)
