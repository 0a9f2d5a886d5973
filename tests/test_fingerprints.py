"""Hashes: the same for the same, different for different, and never of an address."""

import dataclasses
import functools
import logging
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from upweight.errors import ModelError
from upweight.fingerprints import fingerprint
from upweight.guard import Guard

ROOT = Path(__file__).parent.parent


def scaled(factor):
    return lambda outputs, targets: factor * (outputs - targets)


class Method:
    def __init__(self, factor):
        self.factor = factor

    def loss(self, outputs, targets):
        return self.factor * outputs


CONFIG, RATES, HELPERS = {"lr": 0.5}, [0.1, 0.2], types.ModuleType("helpers_of_a_test")


@dataclasses.dataclass
class Settings:
    depth: int = 3


SETTINGS, NET, CELL = Settings(), nn.LeakyReLU(0.1), np.arange(3.0)


def helper():
    return 20


@functools.cache
def cached():
    return helper()


class Kind:
    steps = 3

    @property
    def rate(self):
        return 1

    def run(self):
        return 1


def training(kept, seed):
    def inner():
        return CONFIG["lr"], RATES, SETTINGS.depth, NET, CELL, Kind().run(), HELPERS.power

    return [inner() for _ in range(cached())]


def swapped(monkeypatch, name):
    if name == "module":
        monkeypatch.setattr(HELPERS, "power", lambda: 3)
    elif name in ("run", "steps", "rate"):
        monkeypatch.setattr(Kind, name, {"run": lambda self: 2, "steps": 4,
                                         "rate": property(lambda self: 2)}[name])  # fmt: skip
    else:
        other = {
            "CONFIG": {"lr": 0.1}, "RATES": [0.1, 0.3], "SETTINGS": Settings(4), "CELL": CELL + 1,
            "NET": nn.LeakyReLU(0.2), "helper": lambda: 21,
        }[name]  # fmt: skip
        monkeypatch.setitem(globals(), name, other)


@pytest.mark.parametrize(
    "name",
    ["CONFIG", "RATES", "SETTINGS", "CELL", "NET", "helper", "run", "steps", "rate", "module"],
)
def test_a_function_counts_with_all_that_it_names(monkeypatch, name):
    monkeypatch.setattr(HELPERS, "power", lambda: 2, raising=False)
    before = fingerprint(training)
    assert fingerprint(training) == before
    swapped(monkeypatch, name)
    assert fingerprint(training) != before


def test_what_a_function_does_not_name_is_nothing_to_it(monkeypatch):
    before = fingerprint(training)
    monkeypatch.setitem(globals(), "PAIRS", [])
    logging.getLogger("another of a test")
    assert fingerprint(training) == before


class Heated(nn.Module):
    """A model whose outputs hang on more than its parameters."""

    def __init__(self):
        super().__init__()
        self.layer, self.heat, self.calls, self._private = nn.Linear(3, 2), 1.0, 0, 0
        self.scale = torch.ones(2)
        self.register_buffer("shift", torch.zeros(1), persistent=False)
        self.register_buffer("mask", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.count()
        self.seen, self._private = x, self._private + 1
        self.register_buffer("mask", torch.ones(len(x)), persistent=False)
        return (self.layer(x) * self.scale + self.shift) / self.heat

    def count(self):
        self.calls += 1


def heated():
    torch.manual_seed(0)
    return Heated()


CHANGES = {
    "heat": lambda model: setattr(model, "heat", 0.2),
    "scale": lambda model: model.scale.mul_(2),
    "shift": lambda model: model.shift.add_(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_is_what_it_computes_and_a_guard_names_what_changed(name):
    model = heated()
    objective = uw.Objective(model, "cross_entropy")
    guard, known = Guard(objective), fingerprint(model)
    assert Guard(uw.Objective(heated(), "cross_entropy")).fingerprint == guard.fingerprint
    model(torch.ones(4, 3))  # what forward sets itself is no change
    guard.check()
    assert fingerprint(model) == known
    assert Guard(objective).fingerprint == guard.fingerprint
    CHANGES[name](model)
    assert fingerprint(model) != known
    assert Guard(objective).fingerprint != guard.fingerprint
    with pytest.raises(ModelError, match=f"model's {name} was .* Make a new Influence"):
        guard.check()


def test_the_code_and_the_places_of_modules_count(monkeypatch):
    one, act = heated(), nn.Tanh()
    before = fingerprint(one)
    monkeypatch.setattr(Heated, "forward", lambda self, x: self.layer(x))
    assert fingerprint(one) != before
    assert fingerprint(nn.Sequential(act, act)) != fingerprint(nn.Sequential(act))
    assert fingerprint(nn.Sequential(act, act)) != fingerprint(nn.Sequential(act, nn.Tanh()))


def test_hooks_may_keep_what_they_saw():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))

    def hook(module, inputs, output):
        module.kept = output.detach()

    model[0].register_forward_hook(hook)
    guard = Guard(uw.Objective(model, "cross_entropy"))
    model(torch.ones(2, 3))
    guard.check()


def test_a_module_counts_with_its_tables():
    def loss(table):
        found = nn.L1Loss()
        found.table = {"weights": table}
        return found

    assert fingerprint(loss([1, 2])) == fingerprint(loss([1, 2]))
    assert fingerprint(loss([1, 2])) != fingerprint(loss([1, 3]))


def test_a_parent_may_count_for_its_child():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Linear(2, 1)
            self.child.asked = 0

        def forward(self, x):
            self.child.asked += 1
            return self.child(x)

    model = Parent()
    guard = Guard(uw.Objective(model, "mean_squared_error"))
    model(torch.ones(1, 2))
    guard.check()


def test_sparse_tensors_have_hashes():
    one = torch.eye(3).to_sparse()
    assert fingerprint(one) == fingerprint(torch.eye(3).to_sparse())
    assert fingerprint(one) != fingerprint((2 * torch.eye(3)).to_sparse())


PAIRS = [
    (torch.zeros(2), torch.zeros(3)),
    (torch.zeros(2), torch.zeros(2).double()),
    (np.arange(3), np.arange(3.0)),
    ({"a": 1}, {"a": 2}),
    ([1, [2]], [[1], 2]),
    ("1", 1),
    (scaled(1), scaled(2)),
    (functools.partial(pow, 2), functools.partial(pow, 3)),
    (Method(1).loss, Method(2).loss),
    (max, min),
    (uw.CrossEntropy(weight=torch.ones(2)), uw.CrossEntropy(weight=torch.zeros(2))),
    (uw.SmoothHinge(0.1), uw.SmoothHinge(0.2)),
    (uw.CG(rtol=1e-3), uw.CG(rtol=1e-4)),
    ({1, 2}, {1, 3}),
    ((1, 12), (11, 2)),
    (functools.partial(scaled, factor=1), functools.partial(scaled, factor=2)),
    (lambda z: z.sum((1, 2)), lambda z: z.sum((2, 3))),
    (lambda z: [w * 3 for w in z], lambda z: [w * 4 for w in z]),
    (np.int64(3), np.int64(4)),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=range(len(PAIRS)))
def test_different_values_differ_and_equal_ones_agree(one, other):
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)


def test_equal_objects_made_twice_agree():
    for make in (
        lambda: scaled(3),
        lambda: Method(3).loss,
        uw.LiSSA,
        lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda: functools.partial(scaled(1), 2),
    ):
        assert fingerprint(make()) == fingerprint(make())


def test_cycles_end():
    loop = []
    loop.append(loop)
    assert fingerprint(loop) == fingerprint(loop)

    def recursive(n):
        return recursive(n - 1)

    assert fingerprint(recursive) == fingerprint(recursive)
    owner = Method(1)
    owner.self = owner
    assert fingerprint(owner.loss) == fingerprint(owner.loss)


def test_another_process_finds_the_same():
    code = (
        "import upweight as uw; from upweight.fingerprints import fingerprint; "
        "from tests.test_fingerprints import heated, training; "
        "print(fingerprint([uw.CG(), uw.SmoothHinge(0.5), (lambda z: z in {'a', 'b', 'c'}), "
        "training, heated()]))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        )
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout


def test_settings_that_matter_make_another_run():
    x, y, model = torch.randn(6, 3), torch.arange(6) % 2, nn.Linear(3, 2)

    def identity(**settings):
        return uw.Influence(
            model, (x, y), **{"loss": "cross_entropy", "l2": 0.1, **settings}
        ).identity

    base = identity()
    assert base == identity()
    for settings in (
        {"l2": 0.2},
        {"damping": 0.1},
        {"method": "cg"},
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
    ):
        assert identity(**settings) != base
    assert uw.Influence(model, (x + 1, y), loss="cross_entropy", l2=0.1).identity != base
    sums = uw.Objective(model, "cross_entropy", l2=0.1, removal="sum")
    assert uw.Influence(sums, (x, y)).identity != base
