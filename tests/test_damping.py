"""Dampings by name and by training, and many dampings from one fit."""

import numpy as np
import pytest
import torch

import upweight as uw
from tests.cases import small_network as network
from tests.cases import small_rows as rows
from upweight import errors
from upweight.damping import FiniteTraining
from upweight.risk import Risk

METHODS = ["ekfac", "kfac", "diagonal", "ggn"]


def influence(**settings):
    return uw.Influence(network(), rows(), loss="cross_entropy", **settings)


def test_auto_adds_nothing_to_a_model_trained_with_l2():
    settings = {"l2": 0.01, "method": "ekfac"}
    auto = influence(damping="auto", **settings).explain(rows(3, 1))
    plain = influence(**settings).explain(rows(3, 1))
    np.testing.assert_array_equal(auto.values, plain.values)
    assert auto.provenance.damping == 0.0
    assert auto.provenance.identity != plain.provenance.identity


@pytest.mark.parametrize("method", METHODS)
def test_auto_is_a_tenth_of_the_mean_eigenvalue_without_l2(method):
    auto = influence(damping="auto", method=method).explain(rows(3, 1))
    inf = influence(method=method)
    dense = inf.method.fit(inf.risk).to_dense()
    wanted = 0.1 * float(dense.trace()) / len(dense)
    # Cholesky's trace is estimated from signs.
    assert auto.provenance.damping == pytest.approx(wanted, rel=1e-12 if method != "ggn" else 0.5)
    stated = influence(damping=auto.provenance.damping, method=method).explain(rows(3, 1))
    np.testing.assert_allclose(auto.values, stated.values, rtol=1e-12)


def test_l2_on_some_parameters_is_not_l2_on_all():
    auto = influence(l2={"0.*": 0.01}, damping="auto", method="ekfac").explain(rows(2, 1))
    assert auto.provenance.damping > 0


def test_trace_is_estimated_without_bias():
    inf = influence(method="ggn")
    operator = inf.method.fit(inf.risk)
    dense = operator.to_dense()
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(2, (32, len(dense)), generator=generator) * 2 - 1).double()
    wanted = float(((signs @ dense) * signs).sum(1).mean())
    assert operator.trace() == pytest.approx(wanted, rel=1e-10)


def test_a_finite_training_answers_as_its_damping_says():
    """T steps of gradient descent on a quadratic, from 0, to a change of its linear part."""
    spectrum = torch.logspace(-4, 0, 9, dtype=torch.float64)
    rate, steps = 0.5, 200
    moved = torch.zeros_like(spectrum)
    for _ in range(steps):
        moved = moved - rate * (spectrum * moved - 1)
    damping = FiniteTraining(rate, steps).damping
    assert damping == 1 / (rate * steps)
    ratio = moved * (spectrum + damping)
    # Right at both ends, and within a third between them; without damping it is off by 100 x.
    assert float(ratio.min()) > 0.99
    assert float(ratio.max()) < 1.34
    assert float((moved * spectrum).min()) < 0.02


def test_momentum_lengthens_steps():
    assert FiniteTraining(0.1, 10, momentum=0.9).damping == pytest.approx(0.1 / 1.0)
    scores = influence(damping=FiniteTraining(0.1, 100), method="ekfac").explain(rows(2, 1))
    stated = influence(damping=0.1, method="ekfac").explain(rows(2, 1))
    np.testing.assert_array_equal(scores.values, stated.values)
    assert scores.provenance.damping == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", [(0, 10), (-1.0, 10), (0.1, 0), (float("nan"), 3)])
def test_a_training_that_cannot_be(wrong):
    with pytest.raises(errors.InputError, match="positive learning rate"):
        FiniteTraining(*wrong)
    with pytest.raises(errors.InputError, match="momentum"):
        FiniteTraining(0.1, 10, momentum=1.0)


@pytest.mark.parametrize("wrong", ["automatic", True, None, -0.1, float("inf"), [0.1]])
def test_a_damping_that_cannot_be(wrong):
    with pytest.raises(errors.InputError, match="damping must be a finite number"):
        influence(damping=wrong)


@pytest.mark.parametrize("method", METHODS)
def test_a_sweep_is_what_each_damping_gives_alone(method):
    dampings = [1e-3, 0.1, 3.0]
    found = influence(method=method, l2=0.01).sweep(rows(3, 1), dampings)
    assert found.dampings == tuple(dampings)
    for damping in dampings:
        alone = influence(method=method, l2=0.01, damping=damping).explain(rows(3, 1))
        np.testing.assert_allclose(found[damping].values, alone.values, rtol=1e-9, atol=1e-15)
        assert found[damping].provenance.damping == damping
    table = found.table()
    assert np.isnan(table["correlation_with_previous"][0])
    first, second = (found[value].values for value in dampings[:2])
    wanted = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(first, second, strict=True)])
    assert table["correlation_with_previous"][1] == pytest.approx(wanted)
    assert "Scores by damping" in repr(found)


@pytest.mark.parametrize("method", METHODS)
def test_a_sweep_makes_no_pass_of_its_own(method, monkeypatch):
    inf = influence(method=method, l2=0.01)
    seen = []
    whole = Risk.rows
    monkeypatch.setattr(Risk, "rows", lambda *a: (seen.append(a[1:]), whole(*a))[1])
    inf.sweep(rows(3, 1), [0.1])
    once = len(seen)
    inf.sweep(rows(3, 1), [0.1, 0.2, 0.3, 0.4])
    assert len(seen) <= once  # the training gradients are kept from the first


def test_dampings_of_a_sweep_by_default_follow_the_curvature():
    inf = influence(method="ekfac")
    mean = inf.method.fit(inf.risk).trace() / inf.objective.space.size
    found = inf.sweep(rows(3, 1)).dampings
    assert len(found) == 9
    assert found[0] == pytest.approx(1e-3 * mean, rel=1e-2)
    assert found[-1] == pytest.approx(10 * mean, rel=1e-2)


def test_a_damping_that_gives_no_answer_is_named_and_the_others_go_on():
    torch.manual_seed(1)
    inf = uw.Influence(network(), rows(), loss="cross_entropy", method="exact")
    found = inf.sweep(rows(3, 1), [0.0, 10.0])
    assert found.dampings == (10.0,)
    assert "not positive definite" in found.refused[0.0] or "singular" in found.refused[0.0]
    assert "Refused at 0" in repr(found)
    with pytest.raises(errors.NumericalError, match="No damping gives an answer"):
        inf.sweep(rows(3, 1), [0.0])


@pytest.mark.parametrize("wrong", [[], [-1.0], [float("nan")]])
def test_sweeps_that_cannot_be(wrong):
    with pytest.raises(errors.InputError, match="finite numbers"):
        influence(method="ekfac", l2=0.1).sweep(rows(2, 1), wrong)


def test_methods_without_a_damping_have_no_sweep():
    with pytest.raises(errors.InputError):
        influence(method="no_hessian").sweep(rows(2, 1), [0.1])
    with pytest.raises(errors.InputError):
        influence(method="euclidean").sweep(rows(2, 1), [0.1])


def test_a_sweep_is_drawn():
    pytest.importorskip("matplotlib").use("Agg")
    axes = influence(method="ekfac", l2=0.1).sweep(rows(2, 1), [0.0, 0.1, 1.0]).plot()
    assert axes.get_xlabel() == "damping"


def test_group_effects_take_the_resolved_damping():
    auto = influence(method="ggn", damping="auto")
    stated = influence(method="ggn", damping=auto.explain(rows(2, 1)).provenance.damping)
    groups = [[0, 1], [2]]
    wanted = stated.group_effects(groups, on=rows(2, 1))
    np.testing.assert_allclose(
        auto.group_effects(groups, on=rows(2, 1)).second, wanted.second, rtol=1e-10
    )
