"""Slopes at the outputs have the loss's second derivative as their second moment."""

import math

import pytest
import torch
from torch import nn

import upweight as uw
from upweight.criteria import resolve
from upweight.curvature import Columns, Draws, Labels
from upweight.data import Data
from upweight.errors import InputError, LossError
from upweight.gradients import observe
from upweight.noise import random_signs
from upweight.objective import Objective
from upweight.risk import Risk

DRAWS = 20_000


def normal(*shape):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def log_cosh(outputs, targets):
    return torch.log(torch.cosh(outputs - targets)).flatten(1).sum(1)


def coupled(outputs, targets):
    """Not elementwise: (Σ z − y)⁴ + ‖z‖² with targets in two parts."""
    shift, scale = targets
    return (outputs.sum(1) - shift) ** 4 + scale * (outputs**2).sum(1)


def waves(outputs, targets):
    return torch.cos(outputs - targets).sum(1)


CLASSES = torch.tensor([1.0, 2.0, 0.5])
SMOOTH = nn.CrossEntropyLoss(label_smoothing=0.3)
WEIGHED = nn.CrossEntropyLoss(weight=CLASSES)
SOFT = torch.softmax(normal(1, 3), 1)
BINARY = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 0.5]))
# name: loss, outputs and targets of one example, whether it has columns
ONE = {
    "softmax": ("cross_entropy", normal(1, 3), torch.tensor([2]), True),
    "softmax ignored": ("cross_entropy", normal(1, 3), torch.tensor([-100]), True),
    "softmax class weights": (WEIGHED, normal(1, 3), torch.tensor([1]), True),
    "softmax smoothed": (SMOOTH, normal(1, 3), torch.tensor([0]), True),
    "softmax soft": ("cross_entropy", normal(1, 3), SOFT, True),
    "softmax soft smoothed": (SMOOTH, normal(1, 3), SOFT, True),
    "sequence": ("cross_entropy", normal(1, 2, 3), torch.tensor([[0, 2]]), False),
    "sequence of 4, 1 ignored": (
        "cross_entropy",
        normal(1, 4, 3),
        torch.tensor([[1, -100, 0, 1]]),
        False,
    ),
    "sequence ignored": ("cross_entropy", normal(1, 2, 3), torch.full((1, 2), -100), False),
    "sequence class weights": (WEIGHED, normal(1, 4, 3), torch.tensor([[1, 0, -100, 2]]), False),
    "sequence smoothed": (SMOOTH, normal(1, 2, 3), torch.tensor([[0, 2]]), False),
    "classes second": ("cross_entropy", normal(1, 3, 2), torch.tensor([[0, 2]]), False),
    "image": ("cross_entropy", normal(1, 3, 2, 2), torch.tensor([[[0, 2], [1, -100]]]), False),
    "logistic": ("binary_cross_entropy", normal(1, 1), torch.tensor([1]), True),
    "logistic flat": ("binary_cross_entropy", normal(1), torch.tensor([0]), True),
    "logistic pos_weight": (BINARY, normal(1, 2), torch.tensor([[1, 0]]), True),
    "squares": ("mean_squared_error", normal(1, 3), normal(1, 3), True),
    "squares of pictures": ("mean_squared_error", normal(1, 2, 2), normal(1, 2, 2), True),
    "hinge": ("hinge", normal(1, 1), torch.tensor([1]), True),
    "smooth hinge": (uw.SmoothHinge(0.5), normal(1, 1), torch.tensor([-1]), True),
    "huber": (nn.HuberLoss(delta=10.0), normal(1, 3), normal(1, 3), True),
    "own": (log_cosh, normal(1, 3), normal(1, 3), True),
    "own of positions": (log_cosh, normal(1, 2, 2), normal(1, 2, 2), True),
    "own coupled": (coupled, normal(1, 3), (normal(1), torch.ones(1).double()), True),
}


def second_derivative(loss, z, targets):
    def single(flat):
        return loss(flat.view(z.shape), targets)[0]

    return torch.autograd.functional.hessian(single, z.flatten())


def repeated(leaf):
    if isinstance(leaf, tuple):
        return tuple(repeated(part) for part in leaf)
    return leaf.expand(DRAWS, *leaf.shape[1:])


@pytest.mark.parametrize("name", list(ONE))
def test_many_draws_have_the_second_derivative_as_moment(name):
    given, z, targets, _ = ONE[name]
    loss = resolve(given)
    wanted = second_derivative(loss, z, targets)
    v = loss.draw(
        repeated(z), repeated(targets), lambda shape: random_signs(torch.arange(DRAWS), shape, 7)
    )
    assert v.shape == (DRAWS, *z.shape[1:])
    flat = v.reshape(DRAWS, -1)
    size = float(wanted.trace())
    if size == 0:
        assert not flat.any()
        return
    # A mean of DRAWS bounded terms: five standard errors of the whole matrix.
    outer = flat[:, :, None] * flat[:, None, :]
    error = float(outer.var(0).sum().sqrt()) / math.sqrt(DRAWS)
    assert (outer.mean(0) - wanted).norm() <= 5 * error + 1e-12 * size
    assert error <= 0.05 * wanted.norm()
    assert flat.mean(0).norm() <= 5 * math.sqrt(size / DRAWS)


@pytest.mark.parametrize("name", list(ONE))
def test_columns_add_up_to_the_second_derivative(name):
    given, z, targets, listed = ONE[name]
    loss = resolve(given)
    if not listed:
        with pytest.raises(LossError, match="Draw from it instead"):
            loss.columns(z, targets)
        return
    wanted = second_derivative(loss, z, targets)
    columns = loss.columns(z, targets)
    assert all(column.shape == z.shape for column in columns)
    found = sum(torch.outer(c.flatten(), c.flatten()) for c in columns)
    assert (found - wanted).norm() <= 1e-10 * max(float(wanted.norm()), 1e-10)


@pytest.mark.parametrize("slopes", ["draw", "columns"])
def test_what_is_not_positive_is_refused(slopes):
    loss, z, y = resolve(waves), normal(2, 3), torch.zeros(2, 3).double()

    def asked(loss, z, y):
        if slopes == "columns":
            return loss.columns(z, y)
        return loss.draw(z, y, lambda shape: random_signs(torch.arange(len(z)), shape, 0))

    with pytest.raises(LossError, match="'waves' is not convex in the outputs"):
        asked(loss, z, y)
    with pytest.raises(LossError, match="up to 256 outputs"):
        asked(resolve(log_cosh), normal(2, 257), normal(2, 257))
    objective = Objective(nn.Linear(2, 3).double(), waves, l2=0.1)
    data = Data.of((normal(5, 2), torch.zeros(5, 3).double()))
    curvature = uw.Influence(objective, data, method="ekfac")
    with pytest.raises(LossError, match="not convex"):
        curvature.explain(data)


def test_columns_of_many_outputs_are_refused():
    with pytest.raises(LossError, match="Draw from it instead"):
        resolve("mean_squared_error").columns(normal(1, 257), normal(1, 257))


def test_no_draws_are_refused():
    with pytest.raises(InputError, match="At least one draw"):
        Draws(0)


def test_weights_of_slopes_add_up_as_a_moment():
    model = nn.Linear(3, 2).double()
    risk = Risk(Objective(model, "cross_entropy"), Data.of((normal(4, 3), torch.arange(4) % 2)))
    batch, _ = risk.at(torch.arange(4))
    expected = {Labels(): [1.0], Columns(): [1.0], Draws(4): [0.25] * 4}
    for slopes, weights in expected.items():
        found = list(slopes.gradients(observe(risk.objective, batch)))
        assert [weight for _, weight in found] == weights
        assert all(gradients.count == 4 for gradients, _ in found)
    first, second, *_ = Draws(4).gradients(observe(risk.objective, batch))
    assert not torch.equal(first[0].dense(), second[0].dense())


# The counter-based generator.


def test_signs_are_even():
    signs = random_signs(torch.arange(4000), torch.Size([3, 70]), seed=0)
    assert signs.shape == (4000, 3, 70)
    assert signs.dtype == torch.int8
    assert torch.equal(signs.unique(), torch.tensor([-1, 1], dtype=torch.int8))
    assert abs(float(signs.double().mean())) < 5 / math.sqrt(signs.numel())
    # Each place is even over the examples, and any two differ in half of them.
    flat = signs.reshape(4000, -1).double()
    assert float(flat.mean(0).abs().max()) < 5 / math.sqrt(4000)
    together = (flat.T @ flat / 4000).fill_diagonal_(0)
    assert float(together.abs().max()) < 6 / math.sqrt(4000)


def correlation(a, b) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_neighbours_and_seeds_are_independent():
    numbers = random_signs(torch.arange(1000), torch.Size([64]), seed=0).double()
    bound = 5 / math.sqrt(numbers.numel())
    assert abs(correlation(numbers[1:], numbers[:-1])) < bound
    assert abs(correlation(numbers[:, 1:], numbers[:, :-1])) < bound
    assert abs(correlation(numbers[1:, 1:], numbers[:-1, :-1])) < bound
    for seed in (1, 2, 1_000_003, -1, 2**62):
        other = random_signs(torch.arange(1000), torch.Size([64]), seed=seed).double()
        assert not torch.equal(numbers, other)
        assert abs(correlation(numbers, other)) < bound
        assert abs(correlation(numbers[1:], other[:-1])) < bound
        assert abs(correlation(numbers[:, 1:], other[:, :-1])) < bound


def test_a_row_has_its_numbers_however_it_is_batched_or_padded():
    whole = random_signs(torch.arange(20), torch.Size([6, 2]), seed=3)
    order = torch.randperm(20)
    assert torch.equal(random_signs(order, torch.Size([6, 2]), seed=3), whole[order])
    for split in torch.arange(20).split(7):
        assert torch.equal(random_signs(split, torch.Size([6, 2]), seed=3), whole[split])
    assert torch.equal(random_signs(torch.arange(20), torch.Size([9, 2]), seed=3)[:, :6], whole)
    assert random_signs(torch.tensor([5]), torch.Size([]), seed=3).shape == (1,)


def test_half_precision_draws_nearly_the_slopes_of_single():
    z = 3 * torch.randn(50, 4000, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(len(z), dtype=torch.long)

    def drawn(outputs):
        return uw.CrossEntropy().draw(
            outputs, y, lambda shape: random_signs(torch.arange(len(z)), shape, 0)
        )

    low, wide = drawn(z.bfloat16()), drawn(z.bfloat16().float())
    assert low.dtype == torch.bfloat16
    assert (low.float() - wide).norm() < 0.01 * wide.norm()


def test_signs_vary_less_than_drawn_labels():
    z = torch.tensor([[5.0, 0.0]]).double().expand(400, 2)
    v = uw.CrossEntropy().draw(
        z, torch.zeros(400).long(), lambda shape: random_signs(torch.arange(400), shape, 0)
    )
    p = float(torch.softmax(z[0], 0)[0])
    sizes = v[:, 0].square()
    assert float(sizes.mean()) == pytest.approx(p * (1 - p), rel=0.05)
    # Those of drawn labels, (1 − p)² or p², have a variance of p (1 − p) (2p − 1)².
    assert float(sizes.var()) < 1e-3 * p * (1 - p) * (2 * p - 1) ** 2
