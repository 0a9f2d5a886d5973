"""A last linear layer alone: recognised in any module, in closed form, at every position."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import upweight as uw
from tests.cases import as_reference
from upweight import reference
from upweight.curvature import GaussNewton, Hessian, LinearCurvature, Sketch, curvature
from upweight.errors import ModelError
from upweight.gradients import last_linear, linear_form, per_example
from upweight.risk import Risk

N, LETTERS, WIDTH = 12, 5, 4


class Tagger(nn.Module):
    """A label for every letter, from the letters until there."""

    def __init__(self, *, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(LETTERS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3, bias=bias)

    def forward(self, letters):
        return self.head(self.mix(self.table(letters).cumsum(1)).tanh())


class Picture(nn.Module):
    """Convolution, then a head: no nn.Sequential."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.filters, self.head = nn.Conv2d(1, 2, 2), nn.Linear(8, 3)

    def forward(self, x):
        return SimpleNamespace(logits=self.head(self.filters(x).relu().flatten(1)), extra=x)


def letters(padded=True):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(LETTERS, (N, 6), generator=generator)
    y = torch.randint(3, (N, 6), generator=generator)
    if padded:
        y = y.masked_fill(torch.rand(N, 6, generator=generator) < 0.4, -100)
        y[3] = -100  # an example that counts nothing
    return x, y


def pictures():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 1, 3, 3, generator=generator, dtype=torch.float64)
    return x, torch.arange(N) % 3


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.2, 3.0], dtype=torch.float64))
HEADS = {
    "sequences": (Tagger, letters, "cross_entropy"),
    "without bias": (lambda: Tagger(bias=False), letters, "cross_entropy"),
    "weighted": (Tagger, letters, WEIGHTED),
    "smoothed": (Tagger, lambda: letters(False), nn.CrossEntropyLoss(label_smoothing=0.2)),
    "logits of a picture": (Picture, pictures, "cross_entropy"),
}
each_head = pytest.mark.parametrize("name", HEADS)


def head_of(name, **settings):
    make, data, loss = HEADS[name]
    settings = {"parameters": ["head.*"], "l2": 0.1, **settings}
    return Risk(uw.Objective(make().double(), loss, **settings), uw.Data.of(data()))


def one(risk):
    return risk.rows(0, 1)[0]


def close(found, wanted, rtol=1e-9, atol=1e-11):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=rtol, atol=atol)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@each_head
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_the_closed_form_is_the_hessian(name, kind):
    risk = head_of(name)
    closed, plain = curvature(kind, risk), Hessian(risk)
    assert isinstance(closed, LinearCurvature)
    dense = plain.to_dense()
    problem, theta = as_reference(risk)
    close(dense, reference.hessian(problem, theta))
    close(closed.to_dense(), dense)
    rows = draw(3, closed.size)
    close(closed.apply(rows), rows @ dense)
    places = torch.tensor([[1, 5], [3, 3]])
    groups = rows.expand(2, -1, -1)
    close(closed.apply_sampled(groups, places), plain.apply_sampled(groups, places))
    some = torch.tensor([0, 7, 3])
    close(closed.restrict(some).to_dense(), plain.restrict(some).to_dense())


@each_head
def test_draws_estimate_the_closed_form(name):
    closed = curvature("ggn", head_of(name))
    x, bend = closed.sampled(200_000, 0)
    blocks = torch.einsum("nkl,ni,nj->kilj", bend, x, x) / len(x)
    drawn = closed._arranged(blocks.contiguous()) + 0.1 * torch.eye(closed.size)
    assert (drawn - closed.to_dense()).norm() < 0.03 * closed.to_dense().norm()
    made = Sketch(size=200_000, rows=1)(closed + 0.1, 1)
    rows = draw(2, closed.size)
    assert (made.apply((closed + 0.1).apply(rows)) - rows).norm() < 0.1 * rows.norm()


@each_head
def test_gradients_of_the_head_are_autograds(name):
    risk = head_of(name)
    batch, _ = risk.rows(0, N)
    problem, theta = as_reference(risk)
    wanted = [reference.gradient(lambda t, i=i: problem.loss(t, i), theta) for i in range(N)]
    close(per_example(risk.objective, batch).dense(), torch.stack(wanted))


@each_head
def test_last_layer_scores_are_those_of_the_dense_matrix(name):
    make, data, loss = HEADS[name]
    model = make().double()
    asked = uw.Influence(model, data(), loss=loss, l2=0.1, method="last_layer", damping=0.05)
    risk = head_of(name)
    found = asked.explain(data()).values
    matrix = GaussNewton(risk).to_dense() + 0.05 * torch.eye(risk.objective.space.size)
    batch, share = risk.rows(0, N)
    g = per_example(risk.objective, batch).dense()
    # Without the example's own part of L2: the same for all queries but for its share.
    theta = risk.objective.space.row()
    wanted = g @ torch.linalg.solve(matrix, (g + 0.1 * theta).T) * share
    close(found, wanted, rtol=1e-7, atol=1e-10)


@each_head
def test_little_memory_takes_pieces_and_changes_nothing(name, monkeypatch):
    risk = head_of(name)
    form = last_linear(risk.objective, one(risk))
    whole = form.seen(risk.rows(0, N)[0])
    monkeypatch.setattr("upweight.gradients.linear.budget", lambda: 16 * form.bytes)
    assert form.together(100) == 4
    for a, b in zip(whole, form.seen(risk.rows(0, N)[0]), strict=True):
        close(a, b)
    close(curvature("ggn", risk).to_dense(), Hessian(risk).to_dense())


def test_positions_that_do_not_fit_are_not_kept(monkeypatch):
    monkeypatch.setattr("upweight.curvature.linear.budget", lambda: 1000)
    assert isinstance(curvature("ggn", head_of("sequences")), GaussNewton)
    assert isinstance(curvature("ggn", head_of("logits of a picture")), LinearCurvature)


def test_lengths_may_differ_between_batches():
    x, y = letters()
    lengths = [2, 4, 5, 6] * 3  # of 3, the classes would not be known from the positions
    rows = [(x[i, :n], y[i, :n]) for i, n in enumerate(lengths)]

    def padded(items):
        sides = zip(*items, strict=True)
        return tuple(
            pad_sequence(list(side), batch_first=True, padding_value=fill)
            for side, fill in zip(sides, (0, -100), strict=True)
        )

    objective = uw.Objective(Tagger().double(), "cross_entropy", l2=0.1, parameters=["head.*"])
    loader = DataLoader(rows, batch_size=5, collate_fn=padded)
    risk = Risk(objective, uw.Data.of(loader))
    closed = curvature("ggn", risk)
    assert isinstance(closed, LinearCurvature)
    close(closed.to_dense(), GaussNewton(risk).to_dense())
    groups, places = draw(1, 2, closed.size), torch.tensor([[0, 3, 9]])
    wanted = torch.stack(
        [GaussNewton(risk).apply_sampled(groups, i[None, None]) for i in places[0]]
    )
    close(closed.apply_sampled(groups, places), wanted.mean(0))


# What only looks like a last layer


class Twice(Picture):
    def forward(self, x):
        return super().forward(x).logits + 0 * self.head.bias


class Tempered(Picture):
    def forward(self, x):
        return super().forward(x).logits / 2


class Masked(Picture):
    def forward(self, x):
        logits = super().forward(x).logits
        logits[:, 0] -= 3.0
        return logits


class Overwritten(Picture):
    def forward(self, x):
        features = self.filters(x).relu().flatten(1)
        logits = self.head(features)
        features.zero_()
        return logits


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(WIDTH, LETTERS, bias=False)

    def forward(self, letters):
        return self.head(nn.functional.embedding(letters, self.head.weight).tanh())


class Called(Picture):
    def forward(self, x):
        self.head(self.filters(x).relu().flatten(1))
        return super().forward(x).logits


def hooked():
    model = Picture()
    model.head.register_forward_hook(lambda module, inputs, outputs: 3 * outputs)
    return model


@pytest.mark.parametrize(
    "make", [Twice, Tempered, Masked, Overwritten, Tied, Called, hooked], ids=lambda m: m.__name__
)
def test_what_changes_the_layers_output_or_uses_it_elsewhere_has_no_closed_form(make):
    model, data = make().double(), letters() if make is Tied else pictures()
    names = uw.Selection(["head.*"], least_coverage=0.01)
    objective = uw.Objective(model, "cross_entropy", l2=0.1, parameters=names)
    risk = Risk(objective, uw.Data.of(data))
    assert last_linear(objective, one(risk)) is None
    if make is Overwritten:
        return  # which autograd refuses
    batch, _ = risk.rows(0, N)
    problem, theta = as_reference(risk)
    wanted = [reference.gradient(lambda t, i=i: problem.loss(t, i), theta) for i in range(N)]
    close(per_example(objective, batch).dense(), torch.stack(wanted))


def test_inputs_made_in_inference_mode_are_inputs():
    with torch.inference_mode():
        x, y = pictures()
        made = x.flatten(1) * 1.0
    model = nn.Linear(9, 3).double()
    scores = [
        uw.influence(
            model, (rows, y.clone()), (rows, y.clone()), loss="cross_entropy", l2=0.1
        ).values
        for rows in (made, made.clone())
    ]
    close(*scores)


def test_a_layer_used_in_another_way_later_is_refused():
    class Fickle(Picture):
        def forward(self, x):
            logits = super().forward(x).logits
            return logits if len(x) < 5 else 2 * logits

    risk = Risk(
        uw.Objective(Fickle().double(), "cross_entropy", parameters=["head.*"]),
        uw.Data.of(pictures()),
    )
    form = linear_form(risk.objective, one(risk))
    with pytest.raises(ModelError, match="did not on the first example"):
        form.seen(risk.rows(0, N)[0])
