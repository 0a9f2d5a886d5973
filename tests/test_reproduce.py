"""Small slices of the experiments on real data, and loaders that refuse what is not the data."""

import gzip
import hashlib

import numpy as np
import pytest
import torch

import upweight as uw
from reproduce import datasets
from reproduce.fig2_logistic import L2, trained
from upweight.errors import DataError


@pytest.fixture(scope="module")
def slice_of_mnist(data_folder):
    del data_folder
    digits = datasets.mnist()
    x = torch.from_numpy(digits.train_x[5000:7000]).double()
    y = torch.from_numpy(digits.train_y[5000:7000])
    query = (torch.from_numpy(digits.test_x[[8]]).double(), torch.from_numpy(digits.test_y[[8]]))
    seen = x.amax(0) > 0
    x, query = x[:, seen][:, ::6], (query[0][:, seen][:, ::6], query[1])
    return trained(x, y), (x, y), query


def test_the_real_files_have_the_real_content(data_folder):
    del data_folder
    digits = datasets.mnist()
    assert digits.train_x.shape == (60_000, 784)
    assert np.bincount(digits.train_y).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert digits.test_y[8] == 5


def test_figure_2_on_a_slice(slice_of_mnist):
    """r and slope of exact scores against real refits, for influential and random removals."""
    model, train, query = slice_of_mnist
    inf = uw.Influence(model, train, loss="cross_entropy", l2=L2)
    proof = inf.validate(query, top=40, random=40)
    for found in proof.agreements.values():
        assert found.r > 0.999
        assert 0.97 < found.slope < 1.1
    scores = inf.explain(query)
    assert abs(scores.values.sum()) < 1e-6 * np.abs(scores.values).sum()


def test_stochastic_scores_on_a_slice(slice_of_mnist):
    model, train, query = slice_of_mnist
    exact = uw.Influence(model, train, loss="cross_entropy", l2=L2).explain(query).values[0]
    paper = uw.LiSSA(scale=25.0, depth=5000, repeats=10, batch_size=1, tail=0.0, seed=17)
    found = {}
    for name, solver in {"paper": paper, "default": uw.LiSSA(seed=17)}.items():
        inf = uw.Influence(model, train, loss="cross_entropy", l2=L2, method=solver)
        values = inf.explain(query, accept=True).values[0]
        found[name] = np.corrcoef(values, exact)[0, 1]
    assert found["paper"] > 0.98
    assert found["default"] > max(0.995, found["paper"])


def packed(folder, content):
    path = folder / "file.gz"
    path.write_bytes(gzip.compress(content))
    return path, hashlib.sha256(content).hexdigest()


def test_a_wrong_file_is_refused_with_both_checksums(tmp_path):
    path, right = packed(tmp_path, b"right")
    assert datasets._content(tmp_path, path.name, "unused", right) == b"right"
    wrong = "0" * 64
    with pytest.raises(DataError, match=f"file.gz.*{right}, expected {wrong}"):
        datasets._content(tmp_path, path.name, "unused", wrong)


def test_a_truncated_file_is_refused_with_its_name(tmp_path):
    path, right = packed(tmp_path, b"right" * 1000)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"file.gz is truncated"):
        datasets._content(tmp_path, path.name, "unused", right)


def test_a_missing_file_is_fetched_once_and_checked(tmp_path):
    _, right = packed(tmp_path, b"right")
    source = tmp_path.as_uri() + "/"
    place = tmp_path / "cache"
    assert datasets._content(place, "file.gz", source, right) == b"right"
    assert (place / "file.gz").exists()
    with pytest.raises(DataError, match="expected"):
        datasets._content(tmp_path / "other", "file.gz", source, "0" * 64)
    assert not (tmp_path / "other").exists()
