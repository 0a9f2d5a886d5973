"""Hashes: the same for the same, different for different, and never of an address."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from upweight.fingerprints import fingerprint


def scaled(factor):
    return lambda outputs, targets: factor * (outputs - targets)


class Method:
    def __init__(self, factor):
        self.factor = factor

    def loss(self, outputs, targets):
        return self.factor * outputs


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
        "print(fingerprint([uw.CG(), uw.SmoothHinge(0.5), (lambda z: z + 1)]))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
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
