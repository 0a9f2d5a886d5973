"""How a model runs: under autocast, compiled, in part, or with layers that change themselves."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import upweight as uw
from upweight import errors
from upweight.curvature import curvature
from upweight.data import Batch, Data
from upweight.gradients import linear_form, observe
from upweight.gradients.capture import layout_of
from upweight.guard import Guard
from upweight.objective import Objective
from upweight.risk import Risk

LOW = 0.01  # bfloat16 has 8 bits: a few roundings of 0.4 %


class Sentence(nn.Module):
    """A small transformer that classifies sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer(self.table(x)).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2), nn.PReLU(), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


MODELS = {
    "mlp": (mlp, lambda n: torch.randn(n, 6)),
    "convolutional": (convolutional, lambda n: torch.randn(n, 2, 6, 6)),
    "transformer": (Sentence, lambda n: torch.randint(11, (n, 5))),
}


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def made(name, n=7, *, seed=0):
    make, feed = MODELS[name]
    torch.manual_seed(seed)
    return make(), Batch((feed(n),), torch.randint(3, (n,)), torch.arange(n))


def looped(model, batch, *, autocast):
    """Gradients of single examples, one backward pass each."""
    found = []
    for i in range(len(batch)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = model(batch.inputs[0][i : i + 1])
        loss = F.cross_entropy(outputs.float(), batch.targets[i : i + 1])
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        found.append(torch.cat([slope.flatten() for slope in slopes]))
    return torch.stack(found)


def gap(found, wanted):
    found, wanted = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
    return float((found - wanted).norm() / wanted.norm())


# Autocast


@pytest.mark.parametrize("name", MODELS)
def test_gradients_under_autocast_are_those_of_a_loop_under_autocast(name):
    model, batch = made(name)
    with bfloat16():
        objective = Objective(model, "cross_entropy")
    seen = observe(objective, batch)
    assert seen.outputs.dtype == torch.float32
    assert layout_of(objective, batch).general == frozenset()
    gradients = seen.gradients()
    factors = [term for terms in gradients.terms for term in terms]
    assert {term.right.dtype for term in factors} == {torch.float32}
    assert {term.left.dtype for term in factors if not term.indexed} == {torch.float32}
    wanted = looped(model, batch, autocast=True)
    assert gap(gradients.dense(), wanted) < LOW
    # It is not float32 either: the model did run in bfloat16.
    assert gap(looped(model, batch, autocast=False), wanted) > 1e-3
    weights = torch.randn(2, len(batch))
    assert gap(gradients.combine(weights), weights @ wanted) < LOW


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_model_under_autocast(name):
    model, batch = made(name)
    with bfloat16():
        objective = Objective(model, "cross_entropy")
        wanted = model(batch.inputs[0]).float()
    assert not torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        for outputs in (objective.call(batch), objective.outputs(objective.space.values(), batch)):
            torch.testing.assert_close(outputs, wanted, rtol=LOW, atol=LOW)
            assert torch.equal(outputs, outputs.bfloat16().float())
    assert objective.precision == "model run under autocast bfloat16"


@pytest.mark.parametrize("name", ["hessian", "ggn", "fisher", "empirical_fisher"])
def test_products_under_autocast_are_near_those_of_float32(name):
    model, batch = made("mlp", 12)
    data = Data.of((batch.inputs[0], batch.targets))
    with bfloat16():
        low = curvature(name, Risk(Objective(model, "cross_entropy", l2=0.1), data))
    rows = torch.randn(3, low.size)
    found = low.apply(rows)
    assert found.dtype == torch.float32
    wanted = curvature(name, Risk(Objective(model, "cross_entropy", l2=0.1), data)).apply(rows)
    assert 0 < gap(found, wanted) < 0.03


@pytest.mark.parametrize(
    ("name", "method"),
    [*itertools.product(MODELS, ["ekfac"]), ("mlp", "ggn")],
)
def test_scores_under_autocast_are_near_those_of_float32(name, method):
    model, batch = made(name, 24)
    train, queries = (batch.inputs[0], batch.targets), (batch.inputs[0][:3], batch.targets[:3])
    settings = {"loss": "cross_entropy", "l2": 0.05, "method": method, "damping": 0.05}
    with bfloat16():
        inf = uw.Influence(model, train, **settings)
        inside = inf.explain(queries).values
    np.testing.assert_array_equal(inf.explain(queries).values, inside)
    wanted = uw.Influence(model, train, **settings)
    assert 1e-5 < gap(inside, wanted.explain(queries).values) < 0.05
    assert gap(inf.self_influence(), wanted.self_influence()) < 0.05
    assert inf.identity != wanted.identity


def test_linear_models_under_autocast_follow_it():
    """No closed form then: it would compute in float32 what the model computes in bfloat16."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(20, 6), torch.randint(3, (20,))
    batch = Batch((x,), y, torch.arange(20))
    with bfloat16():
        objective = Objective(model, "cross_entropy", l2=0.1)
    assert linear_form(objective, batch) is None
    assert linear_form(objective.in_full_precision(), batch) is not None
    found = uw.Influence(objective, (x, y)).explain((x[:2], y[:2])).values
    wanted = uw.influence(model, (x, y), (x[:2], y[:2]), loss="cross_entropy", l2=0.1).values
    assert 0 < gap(found, wanted) < 0.03


def test_outputs_keep_their_containers():
    class Named(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            setattr(self, key, value)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x):
            found = Named()
            found["logits"], found["rest"] = self.inner(x), (x.sum(1), [self.inner(x), None])
            return found

    with bfloat16():
        objective = Objective(Model(), lambda outputs, y: outputs.logits.square().sum(1) * y)
    outputs = objective.call(Batch((torch.ones(4, 3),), torch.ones(4), torch.arange(4)))
    assert type(outputs) is Named
    assert outputs.logits.dtype == outputs["logits"].dtype == torch.float32
    assert outputs.rest[1][0].dtype == torch.float32
    assert outputs.rest[1][1] is None


def test_autocast_that_the_objective_does_not_know_is_refused():
    model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
    inf = uw.Influence(model, (x, y), loss="cross_entropy", l2=0.1)
    with bfloat16(), pytest.raises(errors.InputError, match="Make the Influence inside"):
        inf.explain((x, y))
    with bfloat16():
        low = uw.Influence(model, (x, y), loss="cross_entropy", l2=0.1)
    for half in (lambda: low.explain((x, y)), lambda: Objective(model, "cross_entropy")):
        with (
            torch.autocast("cpu", torch.float16),
            pytest.raises(errors.InputError, match="float16, where small gradients"),
        ):
            half()


def test_answering_switches_autocast_off_and_on_again():
    model = nn.Linear(3, 2)
    with bfloat16():
        guard = Guard(Objective(model, "cross_entropy"))
        with guard.answering():
            assert not torch.is_autocast_enabled("cpu")
            assert model(torch.ones(1, 3)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
        assert model(torch.ones(1, 3)).dtype == torch.bfloat16
    plain = Guard(Objective(model, "cross_entropy"))
    assert plain.fingerprint != guard.fingerprint
    with bfloat16(), pytest.raises(errors.InputError), plain.answering():
        pass
    nn.init.zeros_(model.weight)
    with pytest.raises(errors.ModelError, match="changed after"), guard.answering():
        pass


def test_refits_are_in_double_without_autocast():
    with bfloat16():
        objective = Objective(mlp(), "cross_entropy")
    assert objective.in_double().precision is None
    assert objective.of_part(["0.weight"]).precision == objective.precision


# Compiled models


def whole(model):
    return torch.compile(model, backend="eager")


def part(model):
    model[0] = torch.compile(model[0], backend="eager")
    return model


def in_place(model):
    model.compile(backend="eager")
    return model


def part_in_place(model):
    model[0].compile(backend="eager")
    return model


@pytest.mark.parametrize("method", ["ekfac", "ggn"])
@pytest.mark.parametrize("compiled", [whole, part, in_place, part_in_place])
def test_compiled_models_are_what_was_compiled(compiled, method):
    """The backend runs torch's operations, but the code that calls them is compiled."""
    model, batch = made("mlp", 12)
    data, queries = (batch.inputs[0], batch.targets), (batch.inputs[0][:2], batch.targets[:2])
    settings = {"loss": "cross_entropy", "l2": 0.1, "method": method}
    wanted = uw.Influence(model, data, **settings).explain(queries).values
    names = [name for name, _ in model.named_parameters()]
    other = compiled(model)
    inf = uw.Influence(other, data, **settings)
    assert layout_of(inf.objective, batch).general == frozenset()
    np.testing.assert_array_equal(inf.explain(queries).values, wanted)
    if compiled is not part:
        assert inf.objective.model is model
        assert list(inf.objective.space.shapes) == names
    with torch.no_grad():  # it is compiled as before
        torch.testing.assert_close(other(batch.inputs[0]), inf.objective.call(batch))


# A part of the parameters


def wide():
    return nn.Sequential(nn.Linear(50, 20), nn.Tanh(), nn.Linear(20, 20), nn.Linear(20, 1))


def test_a_small_part_must_be_meant():
    model, loss = wide(), "mean_squared_error"
    with pytest.raises(errors.InputError, match=r"covers 1\.44% .* 10%: 0\.weight, 0\.bias, ") as e:
        Objective(model, loss, parameters=["3.*"])
    assert "2.weight, 2.bias would be left out" in str(e.value)
    assert "least_coverage=0.01)" in str(e.value)
    meant = Objective(model, loss, parameters=uw.Selection(["3.*"], least_coverage=0.01))
    assert list(meant.space.shapes) == ["3.weight", "3.bias"]
    assert meant.in_double().space.size == 21
    with pytest.raises(errors.InputError, match="less than 50%: 0.weight, 0.bias, 3.weight"):
        Objective(model, loss, parameters=uw.Selection(["2.*"], least_coverage=0.5))
    with pytest.raises(errors.InputError, match="between 0 and 1"):
        uw.Selection(["2.*"], least_coverage=10)
    assert Objective(model, loss, parameters=["2.*"]).space.size == 420


def test_what_the_message_says_passes():
    for width in (1, 7, 30, 400):
        model = nn.Sequential(nn.Linear(50, width), nn.Linear(width, 1), nn.PReLU())
        with pytest.raises(errors.InputError) as refused:
            Objective(model, "mean_squared_error", parameters=["2.*"])
        least = float(str(refused.value).split("least_coverage=")[1].split(")")[0])
        assert least > 0
        Objective(model, "mean_squared_error", parameters=uw.Selection(["2.*"], least))


def test_frozen_parameters_are_not_missed():
    model = wide()
    model[:3].requires_grad_(False)
    assert Objective(model, "mean_squared_error").space.coverage < 0.1
    assert Objective(model, "mean_squared_error", parameters=["3.*"]).space.size == 21


# Layers that change their own weights


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Embedding(5, 3, max_norm=0.4),
        lambda: nn.Sequential(nn.EmbeddingBag(5, 3, max_norm=1.0), nn.Linear(3, 2)),
    ],
)
def test_renormalising_tables_are_refused_and_left_alone(make):
    model = make()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(errors.ModelError, match="max_norm=None"):
        Objective(model, "cross_entropy")
    assert all(map(torch.equal, before, model.parameters()))
    for module in model.modules():
        if hasattr(module, "max_norm"):
            module.max_norm = None
    Objective(model, "cross_entropy")


class Renormalised(nn.Module):
    """A lookup that scales its table down by itself."""

    def __init__(self, *, step: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3).double() * 4)
        self.register_buffer("seen", torch.zeros(()))
        self.step = step

    def forward(self, x):
        if self.step:
            self.seen += 1
            return F.embedding(x, self.weight)
        return F.embedding(x, self.weight, max_norm=0.4)


@pytest.mark.parametrize(("step", "name"), [(False, "weight"), (True, "seen")])
def test_models_that_write_to_themselves_are_refused(step, name):
    x, y = torch.randint(5, (6, 2)), torch.randint(3, (6, 2))
    inf = uw.Influence(Renormalised(step=step), (x, y), loss="cross_entropy", l2=0.1)
    with pytest.raises(errors.ModelError, match=f"changes its own {name} in the forward pass"):
        inf.explain((x, y))


# Activation checkpoints


class Checkpointed(nn.Module):
    """A network whose first part is run again in the backward pass."""

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.log = nn.Parameter(torch.zeros(1)) if scaled else None
        self.on = True

    def inner(self, x):
        out = torch.tanh(self.first(x))
        return out if self.log is None else out * self.log.exp()  # exp has no rule

    def forward(self, x):
        run_twice = checkpoint(self.inner, x, use_reentrant=False) if self.on else self.inner(x)
        return self.last(run_twice)


@pytest.mark.parametrize(
    ("scaled", "method", "taken"),
    [
        *((False, "ekfac", True), (False, "ggn", True), (False, "exact", False)),
        *((True, "ekfac", False), (True, "cg", False)),
    ],
)
def test_checkpoints_are_right_or_refused(scaled, method, taken):
    torch.manual_seed(0)
    model = Checkpointed(scaled=scaled).double()
    data = torch.randn(10, 4).double(), torch.randint(3, (10,))
    settings = {"loss": "cross_entropy", "l2": 0.1, "damping": 0.5, "method": method}
    if not taken:
        with pytest.raises(errors.ModelError, match="Switch checkpointing off"):
            uw.Influence(model, data, **settings).explain(data)
        return
    found = uw.Influence(model, data, **settings).explain(data).values
    model.on = False
    wanted = uw.Influence(model, data, **settings).explain(data).values
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
