"""Section 5.3 on the real data: the split of 2017, and where its training stopped."""

import dataclasses
import io
import zipfile

import numpy as np
import pytest

from reproduce import datasets, sec53_hospital, wards
from reproduce.datasets.hospital import MEMBER, _levels, _table
from reproduce.experiment import Steps
from reproduce.wards import HIDDEN, REMOVED


@pytest.fixture(scope="module")
def data(data_folder):
    del data_folder
    return datasets.hospital()


@pytest.fixture(scope="module")
def found(data):
    few = dataclasses.replace(
        sec53_hospital.Settings(), others=2, random=4, cap=200, iterations=200
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wards, "hospital", lambda: data)
        return sec53_hospital.run(few, Steps())


def test_features_and_split_are_those_of_2017(data):
    assert data.train_x.shape == (20_000, 127)
    assert data.test_x.shape == (81_766, 127)
    assert [data.train_y.sum(), data.test_y.sum()] == [10_000, 1_357]
    assert {"max_glu_serum_None", "A1Cresult_None", "diabetesMed_Yes"} <= set(data.names)
    children = np.flatnonzero(data.train_x[:, data.child])
    assert [len(children), data.train_y[children].sum()] == [24, 3]
    assert data.test_x[1742, data.child] == 1


def test_any_archive_of_the_table_will_do():
    for name in (MEMBER, f"folder/{MEMBER}"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("other.csv", "no")
            archive.writestr(name, "yes")
        assert _table(buffer.getvalue()) == b"yes"
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("other.csv", "no")
    with pytest.raises(zipfile.BadZipFile, match=MEMBER):
        _table(buffer.getvalue())


def test_levels_are_in_the_order_of_their_kind():
    assert _levels(["10", "9", "10"]) == ["9", "10"]
    assert _levels(["None", ">300", "Norm"]) == [">300", "None", "Norm"]


def test_the_four_children_lead_on_a_wrong_test_child(found):
    top = list(found.values["top"].items())
    assert {i for i, _ in top[:4]} == {13685, 9366, 19590, 11116}
    assert dict(top)[13685] == pytest.approx(-0.11921, abs=1e-4)
    assert dict(top)[19590] == pytest.approx(0.09756, abs=1e-4)
    assert 24 < abs(top[3][1] / top[4][1]) < abs(top[0][1] / top[4][1]) < 38


def test_the_harm_to_children_and_its_cause(found):
    values = found.values
    assert values["optimum_before"]["wrong_children"] == 0
    assert values["optimum_after"]["wrong_children"] == 30
    assert values["lbfgs"]["after 200"]["wrong_children"] < 30
    assert values["carrier"] == ["age_[0-10)"] * 4
    assert values["wrong_without_indicator"] < 10


def test_removal_is_what_was_predicted(found):
    removed = found.values["proof"][REMOVED]
    assert removed["r"] > 0.999
    assert 1.0 < removed["slope"] < 1.15
    assert found.values["off_with_leverage"] < 0.05 < found.values["off"]
    hidden = found.values["proof"][HIDDEN]["actual"] / np.array(removed["actual"])[:4]
    assert (hidden > 0.8).all()
