"""Gauss-Newton products by the layers' factors, and the preconditioner made of its longest rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import upweight as uw
from upweight.curvature import (
    Draws,
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    Hessian,
    Leading,
    leading,
    products,
)
from upweight.curvature.slopes import principal
from upweight.errors import IndefiniteError
from upweight.gradients import Observation, layout_of, observe
from upweight.linalg import Block, Dense, Outer, Woodbury
from upweight.linalg.rows import FormedRows, ProductRows, rows_of
from upweight.risk import Risk
from upweight.solvers import CG


class Tokens(nn.Module):
    """Lookups, a norm, positions and a head, whose weights are used once and often."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Conv1d(4, 4, 2, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.norm(self.embed(tokens)).mT).mean(2)))


def risk(loss="cross_entropy", l2=0.1, n=11):
    torch.manual_seed(0)
    model = Tokens().double()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, (n, 5), generator=generator)
    if loss == "cross_entropy":
        labels = torch.randint(3, (n,), generator=generator)
    else:
        labels = torch.randn(n, 3, generator=generator).double()
    weights = torch.rand(n, generator=generator)
    data = uw.Data.of((tokens, labels), weights=weights, batch_size=4)
    return Risk(uw.Objective(model, loss, l2=l2), data)


LOSSES = ["cross_entropy", "mean_squared_error"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("count", [1, 2, 40])
def test_products_by_factors_are_those_of_both_modes_of_autograd(loss, count, monkeypatch):
    matrix = GaussNewton(risk(loss))
    rows = torch.randn(count, matrix.size, generator=torch.Generator().manual_seed(1)).double()
    monkeypatch.setattr(products, "PASSES", 0)
    by_modes = matrix.apply(rows)
    monkeypatch.setattr(products, "PASSES", 1000)
    monkeypatch.setattr(GaussNewton, "product", None)
    torch.testing.assert_close(matrix.apply(rows), by_modes, rtol=1e-9, atol=1e-12)


def test_products_by_factors_stay_within_the_budget(monkeypatch):
    matrix = GaussNewton(risk())
    rows = torch.randn(5, matrix.size, generator=torch.Generator().manual_seed(1)).double()
    whole, sizes, part = matrix.apply(rows), [], GaussNewton._add_by_factors
    monkeypatch.setattr(products, "budget", lambda: 1)
    monkeypatch.setattr(
        GaussNewton, "_add_by_factors", lambda *a: (sizes.append(len(a[1])), part(*a))[1]
    )
    torch.testing.assert_close(matrix.apply(rows), whole)
    assert sizes == [1] * 11


def test_losses_without_roots_and_layers_without_rules_go_through_autograd(monkeypatch):
    monkeypatch.setattr(products, "PASSES", 1000)
    own = uw.Objective(Tokens().double(), lambda z, y: z.logsumexp(1) - z[torch.arange(len(y)), y])
    data = risk().data
    rows = torch.randn(3, own.space.size).double()
    named = GaussNewton(Risk(uw.Objective(own.model, "cross_entropy"), data)).apply(rows)
    torch.testing.assert_close(GaussNewton(Risk(own, data)).apply(rows), named)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 5), c=st.integers(1, 3), o=st.integers(1, 4), i=st.integers(1, 4),
    q=st.integers(1, 3), ones=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_in_factors_are_their_matrices(n, c, o, i, q, ones, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).double()

    right = draw(1, n, 1, i)
    columns = [[Outer(draw(1, n, 1, o), right, ones)] for _ in range(c)]
    block = Block("w", 1, o, i + ones, 0, o * i if ones else None)
    found = rows_of(block, columns)
    assert isinstance(found, ProductRows)
    full = torch.cat([right, torch.ones(1, n, 1, 1).double()], 3) if ones else right
    matrices = torch.stack(
        [terms[0].left[0, k, 0, :, None] * full[0, k, 0] for k in range(n) for terms in columns]
    )
    dense = torch.cat([matrices[..., :i].flatten(1), matrices[..., i:].flatten(1)], 1)
    formed = FormedRows(matrices[:, None, :, :i], matrices[:, None, :, i] if ones else None)
    rows, weights = draw(q, block.size), draw(q, n * c)
    for part in (found, formed):
        torch.testing.assert_close(part.dot(*block.views(rows)), dense @ rows.T)
        total = rows.clone()
        part.add(weights, *block.views(total))
        torch.testing.assert_close(total, rows + weights @ dense)
        torch.testing.assert_close(part.gram(), dense @ dense.T)
        twice = part.joined([part])
        torch.testing.assert_close(
            twice.gram(), torch.cat([dense, dense]) @ torch.cat([dense, dense]).T
        )
    assert found.bytes() == (n * c * o + n * i) * 8


def test_rows_of_an_example_share_its_right_factor():
    generator = torch.Generator().manual_seed(0)
    owners = torch.tensor([2, 5, 5, 5, 6, 9, 9])
    right = torch.randn(4, 3, generator=generator).double()
    place = torch.tensor([0, 1, 1, 1, 2, 3, 3])
    single = ProductRows(
        torch.randn(7, 1, 2, generator=generator).double(), right[place], ones=True
    )
    block = Block("w", 1, 2, 4, 0, 6)
    rows = torch.randn(5, 8, generator=generator).double()
    grouped = single.grouped(owners)
    assert torch.equal(grouped.right, right)
    torch.testing.assert_close(grouped.dot(*block.views(rows)), single.dot(*block.views(rows)))
    torch.testing.assert_close(grouped.gram(), single.gram())
    weights, one, other = rows[:, :7], torch.zeros(5, 8).double(), torch.zeros(5, 8).double()
    grouped.add(weights, *block.views(one))
    single.add(weights, *block.views(other))
    torch.testing.assert_close(one, other)
    # As in a norm, whose right factor is another for every slope.
    apart = ProductRows(single.left, right[place] + torch.arange(7.0)[:, None], ones=True)
    assert apart.grouped(owners) is apart


def test_woodbury_is_the_inverse():
    asked = risk()
    batch, _ = asked.rows(0, 6)
    gradients = observe(asked.objective, batch).gradients()
    parts = [rows_of(b, [t]) for b, t in zip(gradients.blocks, gradients.terms, strict=True)]
    shifts = [0.5 + 0.1 * k for k in range(len(parts))]
    found = Woodbury(gradients.blocks, parts, shifts)
    diagonal = torch.zeros(asked.objective.space.size).double()
    for block, shift in zip(gradients.blocks, shifts, strict=True):
        diagonal[block.places().flatten()] = shift
    v = gradients.dense()
    wanted = torch.linalg.inv(torch.diag(diagonal) + v.T @ v)
    torch.testing.assert_close(found.to_dense(), wanted, rtol=1e-9, atol=1e-11)
    with pytest.raises(IndefiniteError, match="only where the diagonal is positive"):
        Woodbury(gradients.blocks, parts, [0.0, *shifts[1:]])


@pytest.mark.parametrize("loss", LOSSES)
def test_all_rows_make_the_exact_inverse_and_one_step(loss):
    matrix = GaussNewton(risk(loss)) + 0.05
    found = Leading(10_000)(matrix, 5)
    wanted = torch.linalg.inv(matrix.to_dense())
    torch.testing.assert_close(found.to_dense(), wanted, rtol=1e-7, atol=1e-9)
    rows = torch.randn(2, matrix.size, generator=torch.Generator().manual_seed(1)).double()
    assert CG(preconditioner=Leading(10_000)).init(matrix).solve(rows).steps == 1


def test_rows_of_equal_length_belong_together():
    """Of outputs that are all alike any turn of the columns is principal."""
    asked = risk()
    nn.init.zeros_(asked.objective.model.head.weight)
    nn.init.zeros_(asked.objective.model.head.bias)
    matrix = GaussNewton(asked) + 0.05
    wanted = torch.linalg.inv(matrix.to_dense())
    torch.testing.assert_close(Leading()(matrix, 5).to_dense(), wanted, rtol=1e-7, atol=1e-9)


def test_few_rows_are_the_longest_and_the_solve_is_exact_all_the_same(monkeypatch):
    monkeypatch.setattr(leading, "FEWER", 0)
    asked = risk()
    matrix = GaussNewton(asked) + 0.01
    layout = layout_of(asked.objective, asked.rows(0, 4)[0])
    batch, share = asked.rows(0, 11)
    seen = Observation(asked.objective, layout, batch)
    slopes = principal(asked.objective.loss.columns(seen.outputs, batch.targets))
    every = [seen.pulled(slope * share.sqrt()[:, None], keep=True).dense() for slope in slopes]
    v = torch.stack(every, 1).flatten(0, 1)
    longest = v[v.square().sum(1).topk(7).indices]
    wanted = torch.linalg.inv(
        longest.T @ longest + (0.11) * torch.eye(matrix.size, dtype=torch.float64)
    )
    torch.testing.assert_close(Leading(7)(matrix, 5).to_dense(), wanted, rtol=1e-8, atol=1e-9)
    rows = torch.randn(3, matrix.size, generator=torch.Generator().manual_seed(1)).double()
    exact = torch.linalg.solve(matrix.to_dense(), rows.T).T
    solved = CG(rtol=1e-10, preconditioner=Leading(7)).init(matrix).solve(rows)
    torch.testing.assert_close(solved.require(), exact, rtol=1e-7, atol=1e-9)
    plain = CG(rtol=1e-10).init(matrix).solve(rows)
    assert solved.steps <= plain.steps


def test_what_has_no_such_rows_has_no_preconditioner():
    assert Leading()(Dense(torch.eye(3)) + 1.0, 5) is None
    assert Leading()(EmpiricalFisher(risk()) + 1.0, 5) is None
    assert Leading()(GaussNewton(risk(l2=0.0)), 5) is None
    own = uw.Objective(Tokens().double(), lambda z, y: -z.square().sum(1), l2=0.1)
    assert Leading()(GaussNewton(Risk(own, risk().data)), 5) is None


@pytest.mark.parametrize("curvature", [Hessian, Fisher])
def test_what_resembles_a_gauss_newton_matrix_takes_its_rows(curvature):
    matrix = curvature(risk(l2=0.5)) + 0.5
    queries = torch.randn(2, matrix.size, generator=torch.Generator().manual_seed(1)).double()
    exact = torch.linalg.solve(matrix.to_dense(), queries.T).T
    plain = CG(rtol=1e-8).init(matrix).solve(queries)
    solved = CG(rtol=1e-8, preconditioner=Leading()).init(matrix).solve(queries)
    torch.testing.assert_close(solved.require(), exact, rtol=1e-6, atol=1e-8)
    assert solved.steps < plain.steps


def test_a_small_budget_takes_fewer_rows(monkeypatch):
    matrix = GaussNewton(risk()) + 0.05
    monkeypatch.setattr(leading, "FEWER", 0)
    monkeypatch.setattr(leading, "budget", lambda: 4 * 8000)
    found = Leading()(matrix, 5)
    rows = sum(part.bytes() for part in found.parts)
    assert 1 <= len(found.factor) < 33
    assert rows + 2 * found.factor.nbytes <= 8000


class Letters(nn.Module):
    """A language model: attention over what was before, a norm, a head, and a scale of no rule."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attend = nn.Linear(4, 12)
        self.scale = nn.Parameter(torch.rand(3, 2) + 0.5)
        self.head = nn.Linear(4, 7)

    def forward(self, tokens):
        h = self.embed(tokens)
        mixed = nn.functional.scaled_dot_product_attention(
            *self.attend(h).chunk(3, 2), is_causal=True
        )
        return self.head(torch.tanh(h + mixed * torch.linalg.norm(self.scale, ord="fro")))


def sequences(n=9, l2=0.1):
    """Next tokens, padding left out: no short list of columns."""
    torch.manual_seed(0)
    model = Letters().double()
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(7, (2, n, 5), generator=generator)
    targets[torch.rand(n, 5, generator=generator) < 0.3] = -100
    weights = torch.rand(n, generator=generator)
    data = uw.Data.of((tokens, targets), weights=weights, batch_size=4)
    return Risk(uw.Objective(model, "cross_entropy", l2=l2), data)


def draws(asked, count, seed=0):
    """The same random rows, all at once, ``[n, p]``."""
    batch, share = asked.rows(0, len(asked.data))
    seen = observe(asked.objective, batch)
    found = [
        gradients.dense() * (share * weight).sqrt()[:, None]
        for gradients, weight in Draws(count, seed).gradients(seen)
    ]
    return torch.cat(found)


def test_sequences_have_the_directions_of_their_draws():
    asked = sequences()
    v = draws(asked, leading.MOST_DRAWN)
    eye = torch.eye(v.shape[1], dtype=torch.float64)
    wanted = torch.linalg.inv(v.T @ v + 0.15 * eye)
    found = Leading()(GaussNewton(asked) + 0.05, 3)
    torch.testing.assert_close(found.to_dense(), wanted, rtol=1e-7, atol=1e-9)
    again = Leading()(GaussNewton(asked) + 0.05, 3)
    assert torch.equal(found.to_dense(), again.to_dense())


def test_few_directions_are_the_principal_ones(monkeypatch):
    asked = sequences()
    v = draws(asked, 6)
    monkeypatch.setattr(leading, "MOST_DRAWN", 6)
    # All 54 draws fit into the room of twice 40 directions.
    found = Leading(40)(GaussNewton(asked) + 0.05, 3)
    values, vectors = torch.linalg.eigh(v.T @ v)
    first = (vectors[:, -40:] * values[-40:]) @ vectors[:, -40:].T
    wanted = torch.linalg.inv(first + 0.15 * torch.eye(v.shape[1], dtype=torch.float64))
    torch.testing.assert_close(found.to_dense(), wanted, rtol=1e-7, atol=1e-9)
    assert len(found.factor) == 40


def test_directions_of_a_sample_count_for_all_examples(monkeypatch):
    asked = sequences()
    monkeypatch.setattr(leading, "DRAWN", 3)
    chosen = torch.randperm(9, generator=torch.Generator().manual_seed(3))[:6].sort().values
    v = draws(asked, 1, seed=3)[chosen] * (9 / 6) ** 0.5

    def top(rows):
        _, turn = torch.linalg.eigh(rows @ rows.T)
        return turn[:, -2:].T @ rows

    # Of 6 rows 4 are there at once: twice the room of 2 directions.
    kept = top(torch.cat([top(v[:4]), v[4:]]))
    wanted = torch.linalg.inv(kept.T @ kept + 0.15 * torch.eye(v.shape[1], dtype=torch.float64))
    found = Leading(2, seed=3)(GaussNewton(asked) + 0.05, 3)
    torch.testing.assert_close(found.to_dense(), wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 10, 4000])
def test_solves_of_sequences_are_exact_whatever_the_directions(rows):
    asked = sequences()
    matrix = GaussNewton(asked) + 0.01
    queries = torch.randn(3, matrix.size, generator=torch.Generator().manual_seed(1)).double()
    exact = torch.linalg.solve(matrix.to_dense(), queries.T).T
    solved = CG(rtol=1e-10, preconditioner=Leading(rows)).init(matrix).solve(queries)
    torch.testing.assert_close(solved.require(), exact, rtol=1e-7, atol=1e-9)


def test_directions_keep_within_a_quarter_of_the_budget_and_as_much_again(monkeypatch):
    asked = sequences()
    row = asked.objective.space.size * 8
    monkeypatch.setattr(leading, "budget", lambda: 4 * 4 * row)
    assert len(Leading()(GaussNewton(asked) + 0.05, 3).factor) == 4
