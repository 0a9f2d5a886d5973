"""Models and losses that look like others and are not: each is right by value, or refused."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import upweight as uw
from upweight.errors import InputError, LossError, ModelError, NonFiniteError
from upweight.linalg.cost import Load

ROWS = 24


def own_influence(model, inputs, targets, loss):
    """‖∇ℓ_i‖² / n by one backward pass each, float64."""
    found = []
    for i in range(len(targets)):
        model.zero_grad()
        loss(model(*(x[i : i + 1] for x in inputs)), targets[i : i + 1]).sum().backward()
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        found.append(sum(float(s.square().sum()) for s in slopes) / len(targets))
    return np.array(found)


def cross_entropy(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.fixture
def points():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    return x, torch.arange(ROWS) % 2


def small(seed=0, out=2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out)).double()


class Twice(nn.Module):
    """One attribute, called twice: the same function as a block that stands in two places."""

    def __init__(self, block, head):
        super().__init__()
        self.block, self.head = block, head

    def forward(self, x):
        return self.head(self.block(torch.tanh(self.block(x))))


@pytest.mark.parametrize("method", ["exact", "ekfac", "ggn_cg", "last_layer", "no_hessian"])
def test_a_module_in_two_places_is_one_and_stays_it(method, points):
    torch.manual_seed(0)
    block, head = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
    damping = 0.0 if method == "no_hessian" else 0.5
    shared = nn.Sequential(block, nn.Tanh(), block, head)
    before = [(p, p.detach().clone()) for p in shared.parameters()]
    scores = [
        uw.Influence(model, points, loss="cross_entropy", l2=0.1, damping=damping, method=method)
        .explain((points[0][:2], points[1][:2]))
        .values
        for model in (shared, Twice(block, head))
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-9, atol=1e-14)
    assert all(p is q for (p, _), q in zip(before, shared.parameters(), strict=True))
    assert all(torch.equal(p, value) and p.requires_grad for p, value in before)


class Tasks(nn.Module):
    """Two heads by an operation without a rule; a row uses one."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.heads = nn.ParameterList([torch.randn(3, 2) for _ in range(2)])

    def forward(self, x, task):
        h = torch.tanh(self.body(x))
        first, second = (torch.einsum("ni,io->no", h, weight) for weight in self.heads)
        return torch.where(task[:, None] == 0, first, second)


def test_a_head_that_the_first_rows_do_not_use_counts(points):
    torch.manual_seed(0)
    model, (x, y) = Tasks().double(), points
    task = (torch.arange(ROWS) > 3).long()
    found = uw.Influence(model, (x, task, y), loss="cross_entropy", method="no_hessian")
    wanted = own_influence(model, (x, task), y, cross_entropy)
    np.testing.assert_allclose(found.self_influence(), wanted, rtol=1e-9)


class Ordered(nn.Module):
    """Rows put in another order and back, by torch or by NumPy."""

    def __init__(self, order):
        super().__init__()
        self.first, self.second, self.order = nn.Linear(3, 4), nn.Linear(4, 2), order

    def forward(self, x, lengths):
        order = self.order(lengths)
        back = np.argsort(np.asarray(order))
        return self.second(torch.tanh(self.first(x[order]))[back.copy()])


ORDERS = {
    "argsort": lambda n: n.argsort(descending=True, stable=True),
    "sort": lambda n: n.sort(dim=0, descending=True, stable=True).indices,
    "topk": lambda n: (n + torch.arange(len(n)) / 1000).topk(len(n)).indices,
    "numpy": lambda n: np.argsort(-n.numpy(), kind="stable"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_rows_that_a_model_sorts_keep_their_gradients(order, points):
    torch.manual_seed(0)
    model, (x, y) = Ordered(ORDERS[order]).double(), points
    # The rows by which the layout is proved tie, so that their order is no evidence.
    lengths = torch.cat([torch.full((12,), 9), torch.arange(12) % 7]).double()
    lengths[[0, 7, 15, 23]] = 9.0
    found = uw.Influence(model, (x, lengths, y), loss="cross_entropy", method="no_hessian")
    wanted = own_influence(model, (x, lengths), y, cross_entropy)
    np.testing.assert_allclose(found.self_influence(), wanted, rtol=1e-9)


def test_a_model_that_runs_a_batch_in_parts_is_refused(points):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small()

        def forward(self, x):
            return torch.cat([self.inner(part) for part in x.split(16)])

    with pytest.raises(ModelError, match="runs 24 rows in parts"):
        uw.Influence(
            Parts(), points, loss="cross_entropy", l2=0.1, method="no_hessian"
        ).self_influence()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, on packing itself
def test_packed_sequences_have_first_derivatives_and_no_second():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.cell = nn.Embedding(7, 3), nn.LSTM(3, 3, batch_first=True)
            self.head = nn.Linear(3, 2)

        def forward(self, words, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(
                self.words(words), lengths, batch_first=True, enforce_sorted=False
            )
            return self.head(self.cell(packed)[1][0][-1])

    torch.manual_seed(0)
    words, lengths = torch.randint(0, 7, (12, 5)), torch.arange(12) % 5 + 1
    y, model = torch.arange(12) % 2, Text().double()

    def asked(method):
        data = (words, lengths, y)
        return uw.Influence(model, data, loss="cross_entropy", l2=0.1, method=method)

    plain = uw.Influence(model, (words, lengths, y), loss="cross_entropy", method="no_hessian")
    wanted = own_influence(model, (words, lengths), y, cross_entropy)
    np.testing.assert_allclose(plain.self_influence(), wanted, rtol=1e-9)
    assert np.isfinite(asked("ekfac").self_influence()).all()
    with pytest.raises(ModelError, match="pack_padded_sequence"):
        asked("ggn_cg").explain((words[:1], lengths[:1], y[:1]))


def dense_scores(model, data, loss, l2, damping, queries):
    """∇ℓ(q) (H + λ)⁻¹ ∇ℓ(i) / n with the Hessian of plain autograd, without L2 in ∇ℓ."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    row = torch.cat([p.detach().flatten() for p in model.parameters()])

    def losses(theta, rows):
        parts = theta.split([shape.numel() for shape in shapes])
        named = {k: v.view(s) for k, v, s in zip(names, parts, shapes, strict=True)}
        return loss(functional_call(model, named, (data[0][rows],)), data[1][rows])

    everything = torch.arange(len(data[1]))
    hessian = torch.autograd.functional.hessian(lambda t: losses(t, everything).mean(), row)
    hessian = hessian + (l2 + damping) * torch.eye(len(row), dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(lambda t: losses(t, everything), row)
    return (slopes[:queries] @ torch.linalg.solve(hessian, slopes.T) / len(everything)).numpy()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("mean_squared_error", lambda z, y: (z - y) ** 2),
        (nn.PoissonNLLLoss(reduction="none"), lambda z, y: z.exp() - y * z),
        ("binary_cross_entropy", lambda z, y: F.softplus(z) - y * z),
    ],
    ids=["squared", "poisson", "binary"],
)
def test_outputs_without_an_axis_of_their_own(name, function, points):
    x, y = points[0], points[1].double()
    net = nn.Sequential(*small(out=1), nn.Flatten(0))
    found = uw.Influence(
        uw.Objective(net, function if isinstance(name, nn.Module) else name, l2=0.1, removal="sum"),
        (x, y),
        damping=2.0,
        method="exact",
    )
    wanted = dense_scores(net, (x, y), function, 0.1, 2.0, 2)
    np.testing.assert_allclose(found.explain((x[:2], y[:2])).values, wanted, rtol=1e-9)
    for method in ("ggn_cg", "ekfac", "last_layer", "nystrom"):
        other = uw.Influence(net, (x, y), loss=name, l2=0.1, damping=2.0, method=method)
        assert np.isfinite(other.explain((x[:2], y[:2])).values).all()


@pytest.mark.parametrize(
    "loss",
    [nn.NLLLoss(), F.nll_loss, functools.partial(F.nll_loss, reduction="none")],
    ids=["criterion", "function", "partial"],
)
@pytest.mark.parametrize("method", ["ggn", "ekfac", "last_layer", "empirical_fisher"])
def test_nll_of_log_probabilities_is_cross_entropy(loss, method, points):
    net = small()
    settings = {"l2": 0.1, "damping": 0.5, "method": method}
    logged = nn.Sequential(*net, nn.LogSoftmax(1))
    queries = (points[0][:2], points[1][:2])
    found = uw.Influence(logged, points, loss=loss, **settings).explain(queries)
    wanted = uw.Influence(net, points, loss="cross_entropy", **settings).explain(queries)
    np.testing.assert_allclose(found.values, wanted.values, rtol=1e-9, atol=1e-15)


def test_nll_of_other_outputs_is_refused(points):
    with pytest.raises(LossError, match="expects log-probabilities"):
        uw.Influence(small(), points, loss=nn.NLLLoss(), l2=0.1).explain(points)


@pytest.mark.parametrize("method", ["ggn_cg", "ekfac"])
def test_a_loss_without_curvature_has_no_gauss_newton_matrix(method, points):
    net = nn.Sequential(*small(), nn.LogSoftmax(1))
    x, y = points

    def nll(outputs, targets):
        return F.nll_loss(outputs, targets, reduction="none")

    for data, loss, model in (
        (points, nll, net),
        ((x, y.double()[:, None]), nn.L1Loss(), small(out=1)),
    ):
        with pytest.raises(LossError, match="no second derivative"):
            uw.Influence(model, data, loss=loss, l2=0.1, method=method).self_influence()
    # One that is straight far away only bends where it is looked at.
    huber = uw.Influence(
        small(out=1), (x, 100 * y.double()[:, None]), loss=nn.HuberLoss(), l2=0.1, method=method
    )
    assert np.isfinite(huber.self_influence()).all()


def test_a_sum_in_a_partial_is_refused_as_in_a_criterion(points):
    with pytest.raises(LossError, match="trains on a sum"):
        uw.Influence(small(), points, loss=functools.partial(F.cross_entropy, reduction="sum"))


def test_what_is_true_or_false_stays_so_for_a_users_loss(points):
    x, happened = points[0], points[1] > 0
    net = nn.Sequential(*small(out=1), nn.Flatten(0))

    def censored(outputs, targets):
        return outputs.exp() - outputs * (1 - 1.0 * ~targets)

    inf = uw.Influence(net, (x, happened), loss=censored)
    assert inf.risk.value() == pytest.approx(float(censored(net(x), happened).mean().detach()))
    labelled = uw.Influence(small(), (x, happened), loss="cross_entropy", damping=1.0)
    whole = uw.Influence(small(), points, loss="cross_entropy", damping=1.0)
    assert np.array_equal(labelled.explain((x, happened)).values, whole.explain(points).values)


@pytest.mark.parametrize("method", ["ekfac", "diagonal", "kfac"])
def test_a_convex_loss_of_a_sure_model_is_convex(method, points):
    net = small().float()
    with torch.no_grad():
        net[2].weight.mul_(200)
    x, y = points[0].float(), points[1]
    queries = (x[:2], y[:2])
    own = uw.Influence(net, (x, y), loss=cross_entropy, l2=0.1, method=method).explain(queries)
    named = uw.Influence(net, (x, y), loss="cross_entropy", l2=0.1, method=method).explain(queries)
    assert np.isfinite(own.values).all()
    assert own.values.shape == named.values.shape


@pytest.mark.parametrize("method", ["ekfac", "kfac", "ggn_cg", "cg", "diagonal", "leading_ekfac"])
def test_nan_in_a_later_row_is_named(method, points):
    x, y = points[0].clone(), points[1]
    x[13, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="row 13"):
        uw.Influence(small(), (x, y), loss="cross_entropy", l2=0.1, method=method).explain(
            (points[0][:1], y[:1])
        )


def test_half_precision_is_no_ground_for_conjugate_gradients(points):
    net, data = small().bfloat16(), (points[0].bfloat16(), points[1])
    with pytest.raises(InputError, match="need single precision"):
        uw.Influence(net, data, loss="cross_entropy", l2=0.1, method="ggn_cg").explain(data)


@pytest.mark.parametrize("method", ["exact", "cg", "arnoldi"])
def test_second_derivatives_that_are_none_are_refused(method, points):
    class Wrong(torch.autograd.Function):
        """A square whose second derivative is half of what it should be, and one-sided."""

        @staticmethod
        def forward(x):
            return x * x.roll(1, -1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0], inputs[0].detach().clone())

        @staticmethod
        def backward(ctx, slope):
            x, held = ctx.saved_tensors
            return slope * held.roll(1, -1) + (slope * x).roll(-1, -1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second(Wrong.apply(self.first(x)))

    torch.manual_seed(0)
    inf = uw.Influence(Net().double(), points, loss="cross_entropy", damping=5.0, method=method)
    with pytest.raises(ModelError, match="not symmetric"):
        inf.explain((points[0][:1], points[1][:1]))


def test_complex_parameters_are_refused():
    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))

        def forward(self, x):
            return (x.to(self.weight.dtype) @ self.weight).abs()

    with pytest.raises(ModelError, match="complex"):
        uw.Objective(Waves(), "cross_entropy")


def test_a_label_that_a_margin_cannot_be_of_is_named(points):
    x, y = points
    wrong = y.clone()
    wrong[7] = 5
    inf = uw.Influence(small(), points, loss="cross_entropy", l2=0.1, damping=1.0)
    with pytest.raises(LossError, match="The label 5 is unknown"):
        inf.explain((x, wrong), measure="margin")


def test_a_series_costs_its_steps():
    cost = uw.LiSSA(depth=100, repeats=3, batch_size=8).cost(Load(size=5, rows=2, examples=50))
    assert (cost.products, cost.steps, cost.drawn) == (1, 300, 8)
