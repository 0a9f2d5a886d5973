"""Beyond the paper, on small slices of real data: groups, subsampling, the derivative in L2."""

import dataclasses

import numpy as np
import pytest

from reproduce import datasets, groups, l2_derivative, subsample
from reproduce.datasets.adult import _text
from reproduce.experiment import Steps


def test_adult_is_complete_with_or_without_the_comment_line(data_folder):
    del data_folder
    adult = datasets.adult()
    assert adult.train_x.shape == (32_561, 109)
    assert adult.test_x.shape == (16_281, 109)
    assert np.bincount(adult.train_y).tolist() == [24_720, 7_841]
    assert np.bincount(adult.test_y).tolist() == [12_435, 3_846]
    numbers = adult.train_x[:, [adult.names.index("age"), adult.names.index("capital-gain")]]
    np.testing.assert_allclose(numbers.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(numbers.std(0), 1, rtol=1e-9)
    assert adult.names[-1] == "constant"
    assert (adult.test_x[:, -1] == 1).all()


def test_the_comment_of_adults_test_file_is_left_out():
    assert _text(b"|1x3 Cross validator\n25, x\n") == b"25, x\n"
    assert _text(b"25, x\n") == b"25, x\n"


@pytest.fixture(scope="module")
def removed(data_folder):
    del data_folder
    small = dataclasses.replace(groups.Settings(), thin=6, stride=4, repeats=1, shares=(0.02, 0.1))
    return groups.run(small, Steps())


def test_first_order_ranks_groups_and_is_too_small(removed):
    for name in groups.NAMES:
        first = removed.values[name]["mean"]["first"]
        assert first["count"] == 8
        assert first["spearman"] > 0.9
        assert first["slope"] > 1.1
        assert first["relative_error"] > 0.25


def test_a_newton_step_takes_most_of_the_error_away(removed):
    for name, limit in (("digits", 0.55), ("adult", 0.1)):
        found = removed.values[name]["mean"]
        assert found["second"]["r"] > 0.99
        assert 0.85 < found["second"]["slope"] < 1.1
        assert found["second"]["relative_error"] < limit * found["first"]["relative_error"]
        assert removed.values[name]["refit_slope"] < 1e-8


def test_the_rank_correlation_is_one_for_any_rising_curve():
    values = np.array([3.0, -1.0, 2.0, 10.0])
    assert groups.spearman(values, np.exp(values)) == pytest.approx(1)
    assert groups.spearman(values, -values) == pytest.approx(-1)


def test_flipped_labels_are_sampled_away(data_folder):
    del data_folder
    small = dataclasses.replace(subsample.Settings(), thin=12, stride=3, seeds=2, kept=(0.6,))
    values = subsample.run(small, Steps()).values
    digits = values["digits"]
    full, sampled, chance = (
        digits[key][:, subsample.LOSS] for key in ("full", "sigmoid 0.6", "random 0.6")
    )
    assert (sampled < 0.6 * full).all()
    assert (np.abs(chance - full) < 0.2 * full).all()
    assert (digits["sigmoid 0.6"][:, subsample.ACCURACY] > 0.9).all()
    assert (digits["drop"][:, subsample.LOSS] < 0.3 * full).all()
    np.testing.assert_allclose(digits["sigmoid 0.6"][:, subsample.SIZE], 0.6, atol=5e-3)


def test_parts_are_disjoint_and_samples_keep_their_share():
    chance = np.concatenate([np.zeros(50), np.ones(50)])
    y = np.arange(100) % 2
    taken = subsample._sample(chance, y, 0.4, seed=0)
    assert len(taken) == 40
    assert (taken >= 50).all()
    assert np.bincount(y[taken]).tolist() == [20, 20]
    # Chances that cannot fill the share are completed at random.
    assert len(np.unique(subsample._sample(chance, y, 0.8, seed=0))) == 80


def test_the_derivative_in_l2_is_that_of_refits(data_folder):
    del data_folder
    small = dataclasses.replace(
        l2_derivative.Settings(), thin=10, stride=4, powers=(-3, -1, 0), descent_steps=6
    )
    values = l2_derivative.run(small, Steps()).values
    assert values["largest_mean_error"] < 1e-6
    assert values["largest_query_error"] < 1e-6
    assert (np.array([row.sum() for row in values["derivative"]]) > 0).all()
    path = values["path"]
    assert (np.diff(path[:, 1]) < 0).all()
    assert path[-1, 1] < 0.5 * path[0, 1]
