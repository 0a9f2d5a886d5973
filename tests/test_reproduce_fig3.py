"""Figure 3 on a slice: an SVM solved to its optimum, and influence through a smoothed hinge."""

import dataclasses

import numpy as np
import pytest

from reproduce import fig3_hinge
from reproduce.experiment import Steps
from reproduce.svm import LOOSE, Machine, duality_gap, smooth_minimum


@pytest.fixture(scope="module")
def small(data_folder):
    del data_folder
    return dataclasses.replace(
        fig3_hinge.Settings(),
        n=1500,
        stride=7,
        count=40,
        temperatures=(0.0, 1e-3, 1e-1),
        seeds=(1,),
    )


@pytest.fixture(scope="module")
def found(small):
    return fig3_hinge.run(small, Steps()).values


def test_smoothing_predicts_what_the_kink_does_not(found):
    kink, sharp, soft = found["temperatures"]
    assert kink["overshoot"] > 5
    assert sharp["paper"]["r"] > 0.93
    assert sharp["paper"]["r"] > kink["paper"]["r"] + 0.2
    assert min(sharp["support"]["r"], soft["support"]["r"]) > kink["support"]["r"] + 0.2
    assert 0.5 < sharp["paper"]["slope"] < 1.25
    assert kink["paper"]["slope"] < 0.2 * sharp["paper"]["slope"]


def test_the_truth_is_sharper_than_what_it_judges(found):
    assert 0 <= found["gap"] < 1e-9
    assert found["noise"]["change_over_seeds"] < 1e-4 * found["median_change"]
    # All images that are no support vectors leave the same fit behind.
    assert found["others"]["spread"] < 1e-6


def test_the_gap_bounds_the_distance_to_the_minimum(small):
    """A point off the minimum has a gap of at least its excess objective."""
    machine = fig3_hinge._task(small)
    best = machine.fit(0)

    def objective(weights: np.ndarray) -> float:
        hinges = np.maximum(0, 1 - machine.margins(weights))
        return 0.5 * machine.l2 * float(weights @ weights) + float(hinges.mean())

    off = 1.01 * best
    assert duality_gap(machine, off) >= objective(off) - objective(best) > 1e-7
    assert duality_gap(machine, machine.fit(0, LOOSE)) > duality_gap(machine, best)


def test_the_smoothed_minimum_has_no_gradient_and_scores_of_sum_zero():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(80, 4)), generator.choice([-1.0, 1.0], 80)
    machine = Machine(x, y, x[0], y[0], 0.01)
    weights = smooth_minimum(machine, machine.fit(0), 0.1)
    assert machine.influence(weights, 0.1).risk.gradient().norm() < 1e-10
    assert abs(machine.scores(weights, 0.1).sum()) < 1e-9
    assert abs(machine.scores(machine.fit(0), 0.1).sum()) > 1e-6
