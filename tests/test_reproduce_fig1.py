"""Figure 1 on a slice: what the ablations lose, against real removal."""

import dataclasses

import pytest

from reproduce import fig1_components
from reproduce.experiment import Steps


@pytest.fixture(scope="module")
def found(data_folder):
    del data_folder
    small = dataclasses.replace(
        fig1_components.Settings(), n=2000, stride=5, top=40, random=40, shown=1
    )
    return fig1_components.run(small, Steps())


def test_only_full_influence_agrees_with_removal(found):
    """The ablations keep neither the size nor, on the largest, the correlation."""
    versions = found.values["versions"]
    for kind in fig1_components.KINDS:
        assert versions["exact"][kind]["r"] > 0.999
        assert 0.97 < versions["exact"][kind]["slope"] < 1.06
        for name in ("no_train_loss", "no_hessian", "neither", "euclidean"):
            assert abs(versions[name][kind]["r"]) < 0.95
            assert not 0.8 < versions[name][kind]["slope"] < 1.25


def test_signs_without_the_hessian(found):
    """x·x' ≥ 0 for pixels: without H and L2 the label alone decides the sign."""
    versions = found.values["versions"]
    for name in ("no_hessian, L2 apart", "neither"):
        assert versions[name]["same_label_helpful"] > 0.98
        assert versions[name]["other_label_harmful"] > 0.98
    full = versions["exact, L2 apart"]
    assert 0.2 < full["same_label_helpful"] < 0.9
    assert 0.2 < full["other_label_harmful"] < 0.9
    assert abs(found.values["sum_of_scores"]) < 1e-6


def test_a_range_off_the_paper_is_missed():
    """The verdict of a range comes from a condition that can fail."""
    inside = {"minimum": -15.5, "maximum": 18.9}
    assert fig1_components._range_claim("no_hessian", inside).verdict == "met"
    outside = {"minimum": -15.5, "maximum": 21.0}
    assert fig1_components._range_claim("no_hessian", outside).verdict == "missed"
