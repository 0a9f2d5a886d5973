"""Loaders give the real content, and refuse what is not."""

import gzip
import hashlib
import io
import tarfile
import zipfile

import numpy as np
import pytest

from reproduce import datasets
from reproduce.datasets.files import content, members, unpacked_tar, unpacked_zip
from upweight.errors import DataError


def test_mnist_is_complete_and_in_order(data_folder):
    del data_folder
    digits = datasets.mnist()
    assert digits.train_x.shape == (60_000, 784)
    assert np.bincount(digits.train_y).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert digits.test_y[8] == 5


def test_ones_and_sevens_are_split_as_in_the_paper(data_folder):
    del data_folder
    digits = datasets.ones_and_sevens()
    assert [(digits.train_y == 1).sum(), (digits.train_y == -1).sum()] == [6179, 5715]
    assert len(digits.test_y) == 2163
    assert digits.test_y[30] == -1


def packed(folder, inside):
    path = folder / "file.gz"
    path.write_bytes(gzip.compress(inside))
    return path, hashlib.sha256(inside).hexdigest()


def test_a_wrong_file_is_refused_with_both_checksums(tmp_path):
    path, right = packed(tmp_path, b"right")
    assert content(path, "unused", right) == b"right"
    wrong = "0" * 64
    with pytest.raises(DataError, match=f"file.gz.*{right}, expected {wrong}"):
        content(path, "unused", wrong)


def test_a_truncated_file_is_refused_with_its_name_and_both_checksums(tmp_path):
    path, right = packed(tmp_path, b"right" * 1000)
    path.write_bytes(path.read_bytes()[:-9])
    own = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=rf"file.gz is truncated.*{own}.*{right}"):
        content(path, "unused", right)


def test_a_missing_file_is_fetched_once_and_checked(tmp_path):
    path, right = packed(tmp_path, b"right")
    place = tmp_path / "cache" / "file.gz"
    assert content(place, path.as_uri(), right) == b"right"
    assert place.exists()
    with pytest.raises(DataError, match="expected"):
        content(tmp_path / "other" / "file.gz", path.as_uri(), "0" * 64)
    assert not (tmp_path / "other").exists()


def test_a_file_that_cannot_be_fetched_is_named_with_what_to_do(tmp_path):
    place = tmp_path / "file.gz"
    with pytest.raises(DataError, match=r"file.gz is missing.*UPWEIGHT_DATA"):
        content(place, (tmp_path / "nowhere").as_uri(), "0" * 64)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_checked_by_their_files(tmp_path, kind):
    inside = {"b/two.txt": b"2" * 500, "a.txt": b"", "c.txt": b"3\0\0"}
    path = tmp_path / f"file.{kind}"
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, value in inside.items():
                archive.writestr(name, value)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, value in inside.items():
                item = tarfile.TarInfo(name)
                item.size = len(value)
                archive.addfile(item, io.BytesIO(value))
    path.write_bytes(buffer.getvalue())
    unpack = {"zip": unpacked_zip, "tar": unpacked_tar}[kind]
    joined = unpack(path.read_bytes())
    assert members(joined) == inside
    assert content(path, "unused", hashlib.sha256(joined).hexdigest(), unpack) == joined
    path.write_bytes(buffer.getvalue()[:40])
    with pytest.raises(DataError, match="truncated or no archive"):
        content(path, "unused", "0" * 64, unpack)
