"""Appendix B on a slice: the Newton step's derivative, and the baseline that influence means."""

import dataclasses

import numpy as np
import pytest

from reproduce import appendix_newton
from reproduce.experiment import Steps
from reproduce.stopped import newton, stop


@pytest.fixture(scope="module")
def found(data_folder):
    del data_folder
    logistic = dataclasses.replace(
        appendix_newton.LOGISTIC, every=20, pool=4, rate=0.2, steps=60, others=(600,)
    )
    network = dataclasses.replace(
        appendix_newton.NETWORK, hidden=2, every=40, steps=60, others=(600,)
    )
    small = appendix_newton.Settings(logistic, network, counts=(8, 3))
    return appendix_newton.run(small, Steps()).values


@pytest.mark.parametrize("name", ["logistic", "network"])
def test_the_derivative_of_the_newton_step(found, name):
    assert all(0 < at["error"] < 1e-7 for at in found[name]["stops"])
    first, last = found[name]["stops"]
    assert last["gradient_norm"] < first["gradient_norm"]
    assert last["third"] / last["upweight"] < 0.3 * first["third"] / first["upweight"]


@pytest.mark.parametrize("name", ["logistic", "network"])
def test_equal_training_is_the_baseline(found, name):
    """Against the frozen weights the constant swamps the effect of a removal."""
    compared = found[name][appendix_newton.NEWTON]
    equal = compared["equally long"]["score, slope ahead"]
    frozen = compared["frozen"]["score, slope ahead"]
    assert equal["r"] > 0.95
    assert 0.8 < equal["slope"] < 1.25
    assert frozen["error"] > 10 * equal["error"]
    assert compared["constant"] > 2 * compared["typical_change"]


def test_the_third_term_matters_where_the_gradient_is_large(found):
    """The Newton step of the logistic loss is nearly linear in ε: its derivative says it all."""
    compared = found["logistic"][appendix_newton.NEWTON]["equally long"]
    assert compared["with third term"]["error"] < 0.3 * compared["score, slope ahead"]["error"]


def test_descent_has_its_own_inverse(found):
    """Few steps of descent are predicted by the inverse of those steps, not by H⁻¹."""
    for name in ("logistic", "network"):
        own, newtons = (
            found[name][kind]["equally long"]["score, slope ahead"]
            for kind in (
                appendix_newton.DESCENT,
                f"{appendix_newton.DESCENT}, as after a Newton step",
            )
        )
        assert own["r"] > 0.95
        assert own["error"] < 0.8 * newtons["error"]
    logistic = found["logistic"][appendix_newton.DESCENT]["equally long"]["score, slope ahead"]
    assert 0.8 < logistic["slope"] < 1.35


def test_a_wrong_formula_is_noticed(data_folder):
    """Without its third term the formula is far from the differences."""
    del data_folder
    small = dataclasses.replace(appendix_newton.LOGISTIC, every=40, pool=4)
    case = stop(small, 30, (4, 2))
    terms = newton(case, 1e-6, case.gone)
    moved = (terms["moved"] - terms["constant"]) * -len(case.risk.data)
    with_third = (terms["upweight"] + terms["third"] - moved).norm(dim=1) / moved.norm(dim=1)
    without = (terms["upweight"] - moved).norm(dim=1) / moved.norm(dim=1)
    assert np.all(with_third.numpy() < 0.5 * without.numpy())
