"""Kronecker-factored curvatures equal their dense definition, and the GGN where they should."""

from dataclasses import replace
from typing import final

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from tests.cases import CASES, CONVOLUTIONS, Case, labels, rows
from upweight import engine, reference
from upweight.curvature import (
    EKFAC,
    KFAC,
    Axes,
    Columns,
    Draws,
    Expand,
    GaussNewton,
    Gradient,
    Labels,
    Reduce,
    Slopes,
    fitting,
    moments,
)
from upweight.data import Data
from upweight.errors import IndefiniteError, LossError
from upweight.gradients import Observation, layout_of
from upweight.linalg import Spectral
from upweight.linalg.gram import add_gram, gram, mirror
from upweight.methods import Method
from upweight.noise import random_signs
from upweight.objective import Objective
from upweight.risk import Risk


class Stored(nn.Module):
    """A weight stored ``[i, o]``, as in GPT-2, over positions; one more use by a plain product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 4))
        self.bias = nn.Parameter(torch.empty(4))
        self.scale = nn.Parameter(torch.empty(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        flat = torch.addmm(self.bias, x.reshape(-1, 3), self.weight).view(*x.shape[:-1], 4)
        return self.head(torch.tanh(flat) * self.scale)


def ignored(*shape):
    return labels(3, *shape).masked_fill(torch.rand(7, *shape) < 0.3, -100)


LAYERS = [
    *CONVOLUTIONS,
    Case("positions", Stored, lambda: (rows(5, 3), ignored(5)), "cross_entropy"),
]
EVERY = CASES + LAYERS
every_case = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
SLOPES = {"columns": Columns(), "labels": Labels(), "draws": Draws(3, seed=5)}


def named(name: str) -> Case:
    return next(case for case in EVERY if case.name == name)


def close(found, wanted, rtol=1e-8) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= rtol * wanted.norm()


def sequences(case: Case) -> bool:
    """Whether the loss has no short list of columns."""
    return case.name in ("tied transformer", "padded transformer", "positions")


@final
class Roots(Slopes):
    """All columns of the root of ∂²ℓ/∂z² of any loss, by autograd."""

    def gradients(self, seen):
        loss, z, targets = seen.objective.loss, seen.outputs.detach(), seen.batch.targets
        roots = []
        for n in range(len(z)):

            def single(flat, n=n):
                return loss(flat.view(1, *z.shape[1:]), targets[n : n + 1])[0]

            values, vectors = torch.linalg.eigh(
                torch.autograd.functional.hessian(single, z[n].flatten())
            )
            roots.append(vectors * values.clamp_min(0).sqrt())
        for column in torch.stack(roots).unbind(2):
            yield seen.pulled(column.view_as(z), keep=True), 1.0


def slopes_of(objective, batch, slopes) -> list[tuple[torch.Tensor, float]]:
    """Slopes of one example, from the loss itself, with their weights."""
    outputs = objective.outputs(objective.space.values(), batch).detach()
    if isinstance(slopes, Columns):
        return [(v, 1.0) for v in objective.loss.columns(outputs, batch.targets)]
    if isinstance(slopes, Labels):
        leaf = outputs.requires_grad_(True)
        loss = objective.loss(leaf, batch.targets).sum()
        return [(torch.autograd.grad(loss, leaf)[0], 1.0)]
    found = []
    for number in range(slopes.count):
        seed = slopes.seed * 1_000_003 + number
        signs = lambda shape, seed=seed: random_signs(batch.positions, shape, seed)  # noqa: E731
        found.append((objective.loss.draw(outputs, batch.targets, signs), 1 / slopes.count))
    return found


def factors_of(gradients, place) -> list[tuple[bool, list[list[tuple]]]]:
    """Of each term of a block: whether it is a lookup, and (l, r) of every position by group."""
    block, found = gradients.blocks[place], []
    for term in gradients.terms[place]:
        by_group = []
        for g in range(block.groups):
            positions = []
            for s in range(term.positions):
                if term.indexed:
                    left = torch.zeros(block.outputs, dtype=torch.float64)
                    left[term.left[0, s]] = 1.0
                else:
                    left = term.left[g, 0, s]
                right = term.right[g, 0, s]
                positions.append(
                    (left, torch.cat([right, right.new_ones(1)]) if term.ones else right)
                )
            by_group.append(positions)
        found.append((term.indexed, by_group))
    return found


class _Twin:
    """The samples of every block of a case, checked against autograd, example by example."""

    def __init__(self, risk: Risk, slopes) -> None:
        objective = risk.objective
        whole, shares = risk.at(torch.arange(len(risk.data)))
        layout = layout_of(objective, whole)
        self.l2, self.blocks = objective.l2, layout.blocks
        # (block, group) -> term -> samples
        self.terms: dict[tuple[int, int], dict[bool, reference.Samples]] = {}
        self.whole: dict[tuple[int, int], reference.Samples] = {}
        for i in range(len(risk.data)):
            batch, _ = risk.at(torch.tensor([i]))
            for v, weight in slopes_of(objective, batch, slopes):
                found = Observation(objective, layout, batch).pulled(v, keep=False)
                self._check(objective, batch, v, found)
                for place in range(len(layout.blocks)):
                    self._add(place, factors_of(found, place), float(shares[i]) * weight)

    @staticmethod
    def _check(objective, batch, v, found) -> None:
        def value(theta):
            return (objective.outputs(objective.space.unflatten(theta), batch) * v).sum()

        wanted = reference.gradient(value, objective.space.row())
        assert torch.allclose(found.dense()[0], wanted, rtol=1e-9, atol=1e-12)

    def _add(self, place, terms, share) -> None:
        for g in range(self.blocks[place].groups):
            joined = []
            for indexed, by_group in terms:
                samples = self.terms.setdefault((place, g), {}).setdefault(indexed, [])
                samples.append((share, by_group[g]))
                joined += by_group[g]
            self.whole.setdefault((place, g), []).append((share, joined))

    def moments(self, key, kind) -> reference.Moments:
        """Of the terms together; a side with a lookup keeps its axes."""
        if kind is Gradient:
            left, right, mass = reference.shampoo(self.whole[key])
        else:
            left, right, mass = 0.0, 0.0, 0.0
            for indexed, samples in self.terms[key].items():
                single = reference.lookup if indexed else reference.reduce
                made = (single if kind is Reduce else reference.expand)(samples)
                left, right, mass = left + made[0], right + made[1], mass + made[2]
        return (left.diag().diag() if True in self.terms[key] else left), right, mass

    def dense(self, block_of) -> torch.Tensor:
        """The matrix ``[p, p]`` with blocks ``block_of(key)`` and the L2."""
        matrix = self.l2.diag()
        for key in self.whole:
            places = self.blocks[key[0]].places()[key[1]].flatten()
            matrix[places[:, None], places] += block_of(key)
        return matrix


def is_basis_of(found, moment) -> None:
    """Orthonormal, and the moment is diagonal in it."""
    eye = torch.eye(len(moment), dtype=torch.float64)
    close(found.T @ found, eye, 1e-10)
    turned = found.T @ moment @ found
    assert (turned - turned.diag().diag()).norm() <= 1e-10 * moment.norm()


def simple(moment) -> bool:
    """Whether its eigenvectors are unique."""
    values = torch.linalg.eigvalsh(moment)
    return bool((values.diff() > 1e-4 * values[-1]).all())


def _all_equal(risk, twin, slopes) -> int:
    """Every fit against the twin; how many blocks had unique eigenvectors."""
    unique = 0
    for kind in (Expand, Reduce, Gradient):
        made = {key: twin.moments(key, kind) for key in twin.whole}
        product = KFAC(kind, slopes)(risk)
        close(product.to_dense(), twin.dense(lambda key, made=made: reference.kfac(made[key])))

        corrected = EKFAC(kind, slopes)(risk)
        bases = {}
        for place, g in twin.whole:
            part, (left, right, _) = corrected.blocks[place], made[place, g]
            assert part.block == twin.blocks[place]
            assert (part.left is None) == (True in twin.terms[place, g])
            eye = torch.eye(len(left), dtype=torch.float64)
            bases[place, g] = (eye if part.left is None else part.left[g], part.right[g])
            for vectors, moment in zip(bases[place, g], (left, right), strict=True):
                is_basis_of(vectors, moment)
        own = twin.dense(lambda key, bases=bases: reference.ekfac(twin.whole[key], *bases[key]))
        close(corrected.to_dense(), own)
        for key, (left, right, _) in made.items():
            if simple(left) and simple(right) and corrected.blocks[key[0]].left is not None:
                vectors = [torch.linalg.eigh(moment)[1] for moment in (left, right)]
                places = twin.blocks[key[0]].places()[key[1]].flatten()
                found = corrected.to_dense()[places[:, None], places] - twin.l2[places].diag()
                assert torch.allclose(
                    found, reference.ekfac(twin.whole[key], *vectors), rtol=0, atol=1e-8
                )
                unique += 1
    plain = EKFAC(Axes, slopes)(risk)
    close(plain.to_dense(), twin.dense(lambda key: reference.diagonal(twin.whole[key])))
    return unique


UNIQUE: dict[str, int] = {}


@pytest.fixture(autouse=True)
def _plain_attention():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@every_case
@pytest.mark.parametrize("name", list(SLOPES))
def test_operators_are_their_dense_definition(case, name):
    risk, slopes = case.risk(l2={"*": 0.03}), SLOPES[name]
    if name == "columns" and sequences(case):
        with pytest.raises(LossError, match="Draw from it instead"):
            EKFAC(slopes=slopes)(risk)
        return
    unique = _all_equal(risk, _Twin(risk, slopes), slopes)
    if case.name in ("mlp", "convolution", "recurrent") and name != "columns":
        assert unique >= 2  # eigenvectors of our own, not the operator's, were compared


def test_every_block_has_the_l2_of_its_pattern():
    risk = named("mlp").risk(l2={"0.*": 0.5, "2.weight": 0.25})
    plain = named("mlp").risk(l2=0.0)
    gap = EKFAC(Axes)(risk).to_dense() - EKFAC(Axes)(plain).to_dense()
    assert torch.allclose(gap, risk.objective.l2.diag(), atol=1e-14)
    gap = EKFAC(slopes=Columns())(risk).to_dense() - EKFAC(slopes=Columns())(plain).to_dense()
    assert torch.allclose(gap[:15, :15], risk.objective.l2[:15].diag(), atol=1e-12)


def hooked(model, x, weigh):
    """Inputs and gradients in the outputs of every layer with a weight, by module hooks."""
    seen, handles = [], []
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):

            def keep(module, inputs, out):
                out.retain_grad()
                seen.append((module, inputs[0], out))

            handles.append(module.register_forward_hook(keep))
    weigh(model(x)).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return [(module, inputs.detach(), out.grad) for module, inputs, out in seen]


def by_hand(module, x, slope, g):
    """(l, r) of one example in a group of channels."""
    if isinstance(module, nn.Embedding):
        one_hot = nn.functional.one_hot(x[0], module.num_embeddings).double()
        return list(zip(one_hot, slope[0], strict=True))
    if isinstance(module, nn.Linear):
        right, left = x.reshape(-1, x.shape[-1]), slope.reshape(-1, slope.shape[-1])
    else:
        channels = x.chunk(module.groups, 1)[g]
        right = nn.functional.unfold(channels, module.kernel_size, stride=module.stride)[0].T
        left = slope.chunk(module.groups, 1)[g].flatten(2)[0].T
    if module.bias is not None and not isinstance(module, nn.Embedding):
        right = torch.cat([right, right.new_ones(len(right), 1)], 1)
    return list(zip(left, right, strict=True))


@pytest.mark.parametrize("name", ["mlp", "convolution", "grouped convolution"])
def test_positions_are_those_of_module_hooks(name):
    risk = named(name).risk()
    objective, twin = risk.objective, _Twin(risk, Labels())
    weights = [p for p in objective.model.modules() if hasattr(p, "weight") and p.weight.dim() > 1]
    for place, module in zip(
        [k for k, b in enumerate(twin.blocks) if b.name.endswith("weight") and b.outputs > 1],
        weights,
        strict=True,
    ):
        for g in range(twin.blocks[place].groups):
            samples = []
            for i in range(len(risk.data)):
                batch, share = risk.at(torch.tensor([i]))
                calls = hooked(
                    objective.model,
                    batch.inputs[0],
                    lambda z, batch=batch: objective.loss(z, batch.targets).sum(),
                )
                _, x, slope = next(call for call in calls if call[0] is module)
                samples.append((float(share[0]), by_hand(module, x, slope, g)))
            for kind, single in ((Expand, reference.expand), (Reduce, reference.reduce)):
                for found, wanted in zip(
                    twin.moments((place, g), kind), single(samples), strict=True
                ):
                    assert torch.allclose(
                        torch.as_tensor(found), torch.as_tensor(wanted), rtol=1e-9, atol=1e-14
                    )


def test_a_tied_weight_is_a_lookup_and_a_product():
    risk = named("tied transformer").risk()
    objective, twin = risk.objective, _Twin(risk, Labels())
    left, right, mass = 0.0, 0.0, 0.0
    for i in range(len(risk.data)):
        batch, share = risk.at(torch.tensor([i]))
        calls = hooked(
            objective.model,
            batch.inputs[0],
            lambda z, batch=batch: objective.loss(z, batch.targets).sum(),
        )
        for module, x, slope in calls:
            if isinstance(module, nn.Embedding) or module is objective.model.out:
                pairs = by_hand(module, x, slope, 0)
                pairs = [(l, r[:4]) for l, r in pairs]
                made = reference.expand([(float(share[0]), pairs)])
                left, right, mass = left + made[0], right + made[1], mass + made[2]
    place = [b.name for b in twin.blocks].index("embed.weight")
    found = twin.moments((place, 0), Expand)
    close(found[0], left.diag().diag(), 1e-9)
    close(found[1], right, 1e-9)
    assert found[2] == pytest.approx(mass, rel=1e-12) == pytest.approx(6.0)


# Theory: what a factored curvature must share with the Gauss-Newton matrix.


@pytest.mark.parametrize("name", ["ridge", "ridge of two"])
@pytest.mark.parametrize("fit", [KFAC, EKFAC])
@pytest.mark.parametrize("kind", [Expand, Reduce])
def test_one_linear_layer_under_gaussian_loss_is_exact(name, fit, kind):
    risk = named(name).risk()
    close(fit(kind, Columns())(risk).to_dense(), GaussNewton(risk).to_dense())


def test_a_single_output_under_gradient_moments_is_exact():
    risk = named("logistic").risk()
    close(EKFAC(Gradient, Columns())(risk).to_dense(), GaussNewton(risk).to_dense())


def test_a_vector_block_under_gradient_moments_is_exact():
    risk = named("convolution").risk()
    operator, ggn = EKFAC(Gradient, Columns())(risk), GaussNewton(risk).to_dense()
    vectors = [part.block for part in operator.blocks if part.block.outputs == 1]
    assert len(vectors) == 2  # scale and shift of the normalisation
    for block in vectors:
        places = block.places().flatten()
        pick = (places[:, None], places)
        close(operator.to_dense()[pick], ggn[pick])


@every_case
def test_trace_and_diagonal_are_those_of_the_gauss_newton(case):
    risk = case.risk()
    slopes = Roots() if sequences(case) else Columns()
    ggn = GaussNewton(risk).to_dense()
    close(EKFAC(Axes, slopes)(risk).to_dense(), ggn.diag().diag())
    for kind in (Expand, Reduce, Gradient):
        assert float(EKFAC(kind, slopes)(risk).to_dense().trace()) == pytest.approx(
            float(ggn.trace()), rel=1e-10
        )


@pytest.mark.parametrize("name", ["mlp", "grouped convolution", "positions", "recurrent"])
@pytest.mark.parametrize("kind", [Expand, Reduce, Gradient])
def test_corrected_eigenvalues_come_nearest_to_the_gauss_newton(name, kind):
    risk = named(name).risk()
    slopes, ggn = Roots(), GaussNewton(risk).to_dense()
    corrected, product = EKFAC(kind, slopes)(risk), KFAC(kind, slopes)(risk)
    gap = (corrected.to_dense() - ggn).norm()
    assert gap < (product.to_dense() - ggn).norm()
    part = corrected.blocks[0]
    for factor in (0.9, 1.1):
        moved = replace(part, values=part.values * factor)
        other = type(corrected)([moved, *corrected.blocks[1:]], corrected.size)
        assert gap < (other.to_dense() - ggn).norm()


@pytest.mark.parametrize("name", ["mlp", "regression net", "positions"])
def test_draws_average_to_the_columns(name):
    risk = named(name).risk()
    exact = EKFAC(Axes, Roots())(risk).to_dense()
    gaps = [
        float((EKFAC(Axes, Draws(count, seed=1))(risk).to_dense() - exact).norm() / exact.norm())
        for count in (10, 1000)
    ]
    assert gaps[1] < 0.05
    assert gaps[1] < gaps[0]


# Invariance: what must not change a score.


def explained(objective, data, queries, method="ekfac"):
    return uw.Influence(objective, data, method=method).explain(queries)


def same(found, wanted, rtol=1e-10) -> None:
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) <= rtol * np.linalg.norm(wanted)


EXACT = Method("exact ekfac", "no expansion", curvature=EKFAC(), solver=Spectral(0.0))
METHODS = ["ekfac", "kfac", "kfac_reduce", "eshampoo", "diagonal", "empirical_ekfac"]
some_cases = pytest.mark.parametrize(
    "name", ["mlp", "convolution", "padded transformer", "grouped convolution"]
)


def setting(name):
    risk = named(name).risk(l2=0.1)
    torch.manual_seed(4)
    x, y = named(name).data()
    return risk.objective, risk.data, (x[:4], y[:4])


@some_cases
@pytest.mark.parametrize("method", METHODS)
def test_batches_of_the_data_change_nothing(name, method):
    objective, data, queries = setting(name)
    wanted = explained(objective, data, queries, method).values
    for size in (1, 3):
        split = Data(data.source, data.ids, batch_size=size)
        same(explained(objective, split, queries, method).values, wanted)


@some_cases
def test_batches_of_the_fit_change_nothing(name, monkeypatch):
    objective, data, queries = setting(name)
    wanted = explained(objective, data, queries).values
    for size in (1, 3):
        monkeypatch.setattr(fitting, "LARGE_BATCH", size)
        same(explained(objective, data, queries).values, wanted)


@some_cases
def test_splitting_the_queries_changes_nothing(name):
    objective, data, queries = setting(name)
    wanted = explained(objective, data, queries, EXACT).values
    for size in (1, 3):
        parts = Data.of(queries, batch_size=size)
        same(explained(objective, data, parts, EXACT).values, wanted)
    alone = [
        explained(objective, data, (queries[0][k : k + 1], queries[1][k : k + 1]), EXACT).values
        for k in range(4)
    ]
    same(np.concatenate(alone), wanted)


@some_cases
def test_threads_change_nothing(name):
    objective, data, queries = setting(name)
    wanted, threads = explained(objective, data, queries).values, torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        same(explained(objective, data, queries).values, wanted)
    finally:
        torch.set_num_threads(threads)


@some_cases
def test_gradients_made_again_are_those_that_were_kept(name, monkeypatch):
    objective, data, queries = setting(name)
    wanted = explained(objective, data, queries).values
    made, single = [], Observation.pulled
    monkeypatch.setattr(Observation, "pulled", lambda *a, **k: made.append(1) or single(*a, **k))
    explained(objective, data, queries)
    once = len(made)
    monkeypatch.setattr("upweight.curvature.fitting._room", lambda: 0)
    same(explained(objective, data, queries).values, wanted, 0.0)
    assert len(made) - once == 2 * once


class Causal(nn.Module):
    """Positions see what came before them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.cell = nn.GRU(3, 3, batch_first=True)
        self.inner = nn.Linear(3, 4)
        self.out = nn.Linear(4, 6)

    def forward(self, tokens):
        return self.out(torch.tanh(self.inner(self.cell(self.embed(tokens))[0])))


@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_nothing(method):
    model = Causal().double()
    tokens, wanted = torch.randint(6, (9, 4)), torch.randint(6, (9, 4))
    wanted[2, 3:], wanted[5, 2:] = -100, -100
    objective = Objective(model, "cross_entropy", l2=0.1)

    def padded(by):
        x = torch.cat([tokens, torch.randint(6, (9, by))], 1)
        return x, torch.cat([wanted, torch.full((9, by), -100)], 1)

    plain = explained(objective, padded(0), padded(0), method).values
    same(explained(objective, padded(3), padded(0), method).values, plain)
    same(explained(objective, padded(0), padded(3), method).values, plain)
    rest = [{"tokens": tokens[k], "labels": wanted[k]} for k in range(9)]
    same(explained(objective, rest, padded(0), method).values, plain)


def test_a_side_that_is_too_large_keeps_its_axes(monkeypatch):
    monkeypatch.setattr(moments, "LARGEST_SIDE", 3)
    risk = named("mlp").risk()  # [3, 4 + 1], [3, 3 + 1]
    operator = EKFAC(slopes=Columns())(risk)
    assert all(part.left is not None and part.right is None for part in operator.blocks)
    twin = _Twin(risk, Columns())

    def corrected(key):
        left = operator.blocks[key[0]].left[0]
        is_basis_of(left, twin.moments(key, Expand)[0])
        eye = torch.eye(twin.blocks[key[0]].inputs, dtype=torch.float64)
        return reference.ekfac(twin.whole[key], left, eye)

    def product(key):
        left, right, mass = twin.moments(key, Expand)
        return reference.kfac((left, right.diag().diag(), mass))

    close(operator.to_dense(), twin.dense(corrected))
    close(KFAC(slopes=Columns())(risk).to_dense(), twin.dense(product))
    monkeypatch.setattr(moments, "LARGEST_SIDE", 2)
    for kind in (Expand, Gradient):
        close(EKFAC(kind, Columns())(risk).to_dense(), EKFAC(Axes, Columns())(risk).to_dense())


@pytest.mark.parametrize("width", [1, 5, 6, 13])
@pytest.mark.parametrize("count", [0, 1, 2048, 2049])
def test_second_moments_are_plain_products(width, count):
    x, weights = torch.randn(count, width).double(), torch.rand(count).double()
    for given, wanted in ((weights, (x * weights[:, None]).T @ x), (None, x.T @ x)):
        found = gram(x, given)
        assert torch.equal(found, found.T)
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12 * count)


@pytest.mark.parametrize("width", [3, 200])
def test_second_moments_of_batches_add_up_to_those_of_all(width):
    x, weights = torch.randn(2100, width), torch.rand(2100)
    total = torch.zeros(width, width).double()
    for some in torch.arange(2100).split(1000):
        assert add_gram(total, x[some], weights[some]) is total
    wide = x.double()
    wanted = (wide * weights.double()[:, None]).T @ wide
    assert torch.allclose(mirror(total), wanted, rtol=1e-12, atol=1e-10)
    assert torch.equal(mirror(mirror(total)), mirror(total))
    if width > 192:  # what is not asked for is not computed
        assert not total[-1, 0]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("mlp", method) for method in METHODS),
        ("padded transformer", "empirical_ekfac"),
        ("padded transformer", "ekfac"),
    ],
)
def test_half_precision_is_near_double(name, method):
    risk = named(name).risk(l2=0.1)
    torch.manual_seed(4)
    x, y = named(name).data()
    wanted = explained(risk.objective, risk.data, (x, y), method).values
    low = Objective(risk.objective.model.bfloat16(), "cross_entropy", l2=0.1)
    found = explained(low, risk.data, (x, y), method).values
    assert np.linalg.norm(found - wanted) < 0.15 * np.linalg.norm(wanted)


def test_sums_over_many_batches_do_not_stagnate_in_half_precision(monkeypatch):
    monkeypatch.setattr(fitting, "LARGE_BATCH", 1)
    objective, data = many(1500)
    whole = EKFAC(Axes)(Risk(objective, Data.of(data))).to_dense().diag()
    low = Objective(objective.model.bfloat16(), "cross_entropy", l2=0.1)
    found = EKFAC(Axes)(Risk(low, Data.of(data))).to_dense().diag().double()
    assert (found - whole).norm() < 0.02 * whole.norm()


# Samples of the rows.


def many(count=400):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(count, 3, dtype=torch.float64)
    return Objective(model, "cross_entropy", l2=0.1), (x, torch.randint(2, (count,)))


def test_a_sample_of_rows_says_so_and_is_reproducible():
    objective, data = many()
    risk = Risk(objective, Data.of(data))
    method = Method("sampled", "", curvature=EKFAC(rows=100, seed=3), solver=Spectral())
    first, again = (explained(objective, data, data, method) for _ in range(2))
    (note,) = [c for c in first.provenance.caveats if "fitted on" in c]
    assert "curvature fitted on 100 of 400 examples (standard error of its eigenvalues " in note
    same(first.values, again.values, 0.0)
    other, whole = EKFAC(rows=100, seed=4)(risk), EKFAC(rows=400)(risk)
    assert not torch.allclose(other.blocks[0].values, EKFAC(rows=100)(risk).blocks[0].values)
    assert whole.notes == EKFAC()(risk).notes == ()
    assert torch.equal(whole.to_dense(), EKFAC()(risk).to_dense())
    assert KFAC(rows=100)(risk).notes == ("curvature fitted on 100 of 400 examples",)


@pytest.mark.parametrize("slopes", [Columns(), Labels(), Draws(2)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("count", [33, 100])
def test_the_standard_error_is_what_samples_vary_by(slopes, count):
    objective, data = many()
    risk = Risk(objective, Data.of(data))
    whole = EKFAC(Axes, slopes)(risk).to_dense().diag() - objective.l2
    stated, real = [], []
    for seed in range(30):
        sample = EKFAC(Axes, slopes, rows=count, seed=seed)(risk)
        stated.append(float(sample.notes[0].split()[-1].rstrip("%)")) / 100)
        real.append(float((sample.to_dense().diag() - objective.l2 - whole).norm() / whole.norm()))
    ratio = np.square(stated).mean() / np.square(real).mean()
    assert 0.5 < ratio < 2.5  # the sample is drawn without replacement, of few rows


def test_one_row_has_an_unknown_error():
    objective, data = many()
    (note,) = EKFAC(rows=1)(Risk(objective, Data.of(data))).notes
    assert "eigenvalues unknown" in note


# The model is only read.


@final
class _Fails(Slopes):
    """Breaks in the middle of a fit."""

    def __init__(self) -> None:
        self.left = 3

    def gradients(self, seen):
        self.left -= 1
        if not self.left:
            raise RuntimeError("in the middle")
        yield from Draws(1).gradients(seen)


def state(model):
    return {
        name: (value.clone(), value.requires_grad, value.grad)
        for name, value in model.state_dict(keep_vars=True).items()
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_bit_identical_afterwards(fails, monkeypatch):
    monkeypatch.setattr(fitting, "LARGE_BATCH", 2)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(6, 2))
    model = model.double().eval()
    model[0].bias.requires_grad_(False)
    objective = Objective(model, "cross_entropy", l2=0.1)
    risk = Risk(objective, Data.of((rows(2, 3), labels(2))))
    before, hooks = state(model), [len(m._forward_hooks) for m in model.modules()]
    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            EKFAC(slopes=_Fails())(risk)
    else:
        EKFAC(slopes=Draws(2))(risk)
    after = state(model)
    assert before.keys() == after.keys()
    for name, (value, asks, grad) in before.items():
        assert torch.equal(value, after[name][0]), name
        assert (asks, grad) == after[name][1:], name
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert not model.training
    assert torch.is_grad_enabled()


def test_auto_fits_on_as_many_examples_as_the_largest_matrix_needs():
    """16 positions per side and 128 examples."""
    x, y = torch.randn(300, 20), torch.arange(300) % 3
    wide = nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 3))
    narrow = nn.Sequential(nn.Linear(20, 2), nn.Tanh(), nn.Linear(2, 3))
    part = nn.Sequential(nn.Unflatten(1, (4, 5)), nn.Linear(5, 2), nn.Flatten(), nn.Linear(8, 3))
    asked = {"wide": (wide, 300), "narrow": (narrow, 300), "part": (part, 144)}
    for model, count in asked.values():
        risk = Risk(Objective(model, "cross_entropy", l2=0.1), Data.of((x, y)))
        assert EKFAC(rows="auto").fitted(risk) == count
        assert EKFAC().fitted(risk) == 300
        assert bool(EKFAC(rows="auto")(risk).notes) == (count < 300)


def test_thinned_moments_are_near_the_whole_ones(monkeypatch):
    """Where a picture has many positions, a part of the pictures gives the moments."""
    monkeypatch.setattr("upweight.curvature.fitting.LEAST_ROWS", 4)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(300, 3)).double()
    x, y = torch.randn(400, 1, 12, 12, dtype=torch.float64), torch.arange(400) % 3
    risk = Risk(Objective(model, "cross_entropy", l2=0.1), Data.of((x, y)))
    whole, thin = (KFAC(rows=rows)(risk).blocks[0] for rows in (None, "auto"))
    dense = [
        part.back(part.turn(torch.eye(30).double().view(30, 1, 3, 10)) * part.values)
        for part in (whole, thin)
    ]
    gap = (dense[0] - dense[1]).norm() / dense[0].norm()
    assert 0 < gap < 0.2


@pytest.mark.parametrize("fit", [EKFAC, KFAC])
def test_blocks_that_need_few_examples_are_fitted_as_if_alone(fit, monkeypatch):
    """Each group of blocks has the values of a fit to its own examples, and says how many."""
    monkeypatch.setattr("upweight.curvature.fitting.LEAST_ROWS", 4)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(300, 3)).double()
    x, y = torch.randn(400, 1, 12, 12, dtype=torch.float64), torch.arange(400) % 3
    objective, data = Objective(model, "cross_entropy", l2=0.1), Data.of((x, y))
    risk = Risk(objective, data)
    found = fit(slopes=Draws(seed=5), rows="auto", seed=3)(risk)
    rows = fitting.MARGIN * 4
    chosen = torch.randperm(400, generator=torch.Generator().manual_seed(3))[:rows].sort().values
    few = fit(slopes=Draws(seed=5))(Risk(objective, data.take(chosen)))
    all_of_them = fit(slopes=Draws(seed=5))(risk)
    assert found.notes[0].startswith(f"curvature of 1 of 2 blocks fitted on {rows} of 400 examples")
    assert len(found.notes) == 1
    basis = torch.eye(objective.space.size, dtype=torch.float64)
    wanted = few.apply(basis), all_of_them.apply(basis)
    conv = sum(parameter.numel() for parameter in model[0].parameters())
    dense = found.apply(basis)
    same(dense[:conv, :conv], wanted[0][:conv, :conv], 1e-9)
    same(dense[conv:, conv:], wanted[1][conv:, conv:], 1e-9)


@pytest.mark.parametrize("method", [EXACT, "ggn", "no_hessian"], ids=["ekfac", "ggn", "dot"])
@some_cases
def test_queries_in_pieces_score_as_all_at_once(name, method, monkeypatch):
    """Many queries of a large model are preconditioned a few at a time."""
    objective, data, queries = setting(name)
    whole = explained(objective, data, queries, method)
    monkeypatch.setattr(engine, "QUERY_BYTES", 1)
    pieces = explained(objective, data, queries, method)
    same(pieces.values, whole.values)
    assert pieces.provenance.residual.shape == (4,)


@pytest.mark.parametrize("share", [1e-6, 1e-8, 1e-9])
def test_single_precision_resolves_dampings_far_below_the_largest_eigenvalue(share):
    """The basis is known, so that no direction is divided by another's rounding."""
    case = next(case for case in CASES if case.name == "mlp")
    batch = case.risk().at(torch.arange(7))[0]
    top = max(float(part.values.max()) for part in EKFAC()(case.risk()).blocks)
    found = []
    for dtype in (torch.float64, torch.float32):
        model, x = case.risk().objective.model.to(dtype), batch.inputs[0].to(dtype)
        front = uw.Influence(
            Objective(model, "cross_entropy", l2=share * top), (x, batch.targets), method="ekfac"
        )
        found.append(front.explain((x, batch.targets)).values)
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5 * np.abs(found[0]).max())


def test_eigenvalues_that_are_0_up_to_rounding_are_refused():
    risk = next(case for case in CASES if case.name == "mlp").risk()
    objective = Objective(risk.objective.model.float(), "cross_entropy", l2=0.0)
    operator = EKFAC()(Risk(objective, risk.data))
    top = max(float(part.values.max()) for part in operator.blocks)
    with pytest.raises(IndefiniteError, match="0 up to rounding. Add damping above"):
        Spectral().init(operator + 1e-12 * top)
