"""Scores as they stream by: extremes, files that a killed run goes on with, bounded memory."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import upweight as uw
from tests.cases import small_network as network
from tests.cases import small_rows as rows
from upweight import errors
from upweight.budget import budget, in_steps
from upweight.gradients import TrainingGradients, batch_rows
from upweight.risk import Risk
from upweight.sinks import ExtremesSink, StoredSink


def influence(n=20, batch_size=None, **settings):
    data = uw.Data.of(rows(n), batch_size=batch_size)
    settings = {"method": "ekfac", "l2": 0.01, **settings}
    return uw.Influence(network(), data, loss="cross_entropy", **settings)


# Extremes.


@given(
    matrix=st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=3),
    size=st.integers(1, 7),
    k=st.integers(1, 9),
)
def test_extremes_are_those_of_a_stable_sort_however_blocks_are_cut(matrix, size, k):
    values = torch.tensor(matrix).double()
    sink = ExtremesSink(len(values), k)
    for start in range(0, 7, size):
        sink.write(start, values[:, start : start + size])
    for found, sign in ((sink.largest, -1), (sink.smallest, 1)):
        order = np.argsort(sign * values.numpy(), axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(found[1], order)
        np.testing.assert_array_equal(found[0], np.take_along_axis(values.numpy(), order, 1))


@pytest.mark.parametrize("measure", ["loss", "margin"])
def test_extremes_of_queries_are_the_ends_of_all_scores(measure):
    inf = influence(batch_size=6)
    scores = inf.explain(rows(3, 1), measure=measure)
    found = inf.extremes(rows(3, 1), 4, measure=measure)
    for query in range(3):
        for side in ("top", "bottom"):
            whole, some = getattr(scores, side)(query, 4), getattr(found, side)(query)
            assert list(whole.columns) == list(some.columns)
            assert whole.caption == some.caption
            for name in whole.columns:
                np.testing.assert_array_equal(whole[name], some[name])
    assert found.provenance.identity == scores.provenance.identity


def test_extremes_that_cannot_be():
    with pytest.raises(errors.InputError, match="k is at least 1"):
        influence().extremes(rows(2, 1), 0)
    with pytest.raises(errors.DataError, match="unknown"):
        influence().extremes(rows(2, 1), 1).top(9)


# Files.


def test_scores_written_as_they_come_are_those_in_memory(tmp_path):
    inf = influence(batch_size=7)
    wanted = inf.explain(rows(3, 1))
    found = inf.explain_into(tmp_path / "run", rows(3, 1))
    np.testing.assert_array_equal(found.values, wanted.values)
    assert isinstance(found.values, np.memmap)
    assert found.summary() == wanted.summary()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


class KilledError(Exception):
    """Stands for a kill in the middle of a pass."""


@pytest.mark.parametrize("later_batch", [5, 3, 20])
def test_a_killed_pass_goes_on_where_it_was(tmp_path, monkeypatch, later_batch):
    write, looked = StoredSink.write, []

    def dies(self, start, block):
        if start >= 10:
            raise KilledError
        write(self, start, block)

    monkeypatch.setattr(StoredSink, "write", dies)
    with pytest.raises(KilledError):
        influence(batch_size=5).explain_into(tmp_path / "run", rows(3, 1))
    monkeypatch.setattr(StoredSink, "write", write)
    assert not (tmp_path / "run").exists()
    fetch = Risk.rows
    monkeypatch.setattr(Risk, "rows", lambda *a: (looked.append(a[1:]), fetch(*a))[1])
    inf = influence(batch_size=5)
    inf.data.batch_size = later_batch
    _ = inf.inverse
    looked.clear()
    found = inf.explain_into(tmp_path / "run", rows(3, 1))
    assert looked[0][0] == 10
    assert looked[-1][1] == 20
    wanted = influence().explain(rows(3, 1)).values
    np.testing.assert_allclose(found.values, wanted, rtol=1e-9, atol=1e-14)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_what_another_run_left_is_not_taken_up(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(StoredSink, "write", lambda *a: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            influence().explain_into(tmp_path / "run", rows(3, 1))
    other = influence(l2=0.5)
    np.testing.assert_array_equal(
        other.explain_into(tmp_path / "run", rows(3, 1)).values, other.explain(rows(3, 1)).values
    )
    with pytest.raises(errors.StoreError, match="another run"):
        influence().explain_into(tmp_path / "run", rows(3, 1))
    influence().explain_into(tmp_path / "run", rows(3, 1), replace=True)


def test_a_file_of_another_shape_is_refused(tmp_path):
    StoredSink(tmp_path, 2, 5, torch.float64)
    with pytest.raises(errors.StoreError, match="is to be written"):
        StoredSink(tmp_path, 3, 5, torch.float64)


# Memory.


def test_a_budget_is_text_or_bytes_and_ends_with_its_block():
    before = budget()
    with uw.memory("2 GiB"):
        assert budget() == 2**31
        with uw.memory(2**21):
            assert budget() == 2**21
    assert budget() == before
    for wrong in ("much", 0, "-1 GiB", "1.2.3 GB", "3"):
        with pytest.raises(errors.InputError, match="at least 1 MiB"), uw.memory(wrong):
            pass


def test_a_smaller_budget_makes_smaller_batches_and_keeps_less():
    inf = influence(4000)
    with uw.memory("1 MiB"):
        few = batch_rows(inf.risk)
        training = TrainingGradients(inf.risk)
        list(training.each(lambda seen: None, ""))
        assert training.keeper.get(0, few) is None
    assert few < batch_rows(inf.risk)
    np.testing.assert_array_equal(
        influence(4000).explain(rows(3, 1)).values, inf.explain(rows(3, 1)).values
    )
    with uw.memory("1 MiB"):
        small = influence(4000).explain(rows(3, 1)).values
    np.testing.assert_allclose(small, inf.explain(rows(3, 1)).values, rtol=1e-6, atol=1e-14)


@given(count=st.integers(1, 40), size=st.integers(1, 50), room=st.integers(1, 50))
def test_steps_halve_until_they_fit_and_cover_every_row_once(count, size, room):
    def work(start, stop):
        if stop - start > room:
            raise torch.OutOfMemoryError("not enough memory")
        return range(start, stop)

    done = [row for part in in_steps(count, size, work) for row in part]
    assert done == list(range(count))


def test_a_row_that_does_not_fit_is_named_and_other_errors_pass():
    def full(start, stop):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    with pytest.raises(errors.ResourceError, match=r"single example \(row 0\).*fewer parameters"):
        list(in_steps(4, 4, full))

    def broken(start, stop):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(in_steps(4, 4, broken))


@pytest.mark.parametrize("method", ["ekfac", "no_hessian"])
def test_scores_and_self_influence_where_memory_runs_out_on_large_batches(method, monkeypatch):
    wanted = influence(method=method)
    scores, own = wanted.explain(rows(3, 1)).values, wanted.self_influence()
    whole, sizes = TrainingGradients._seen, []

    def narrow(self, start, stop):
        sizes.append(stop - start)
        if stop - start > 6:
            raise torch.OutOfMemoryError("not enough memory")
        return whole(self, start, stop)

    monkeypatch.setattr(TrainingGradients, "_seen", narrow)
    inf = influence(method=method)
    np.testing.assert_allclose(inf.explain(rows(3, 1)).values, scores, rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(inf.self_influence(), own, rtol=1e-10)
    assert sizes[:3] == [20, 10, 5]


def test_gradients_are_kept_from_the_first_pass_when_they_fit(monkeypatch):
    inf, passes = influence(batch_size=8), []
    fetch = Risk.rows
    monkeypatch.setattr(Risk, "rows", lambda *a: (passes.append(a[1:]), fetch(*a))[1])
    first = inf.explain(rows(3, 1)).values
    assert passes[-3:] == [(0, 8), (8, 16), (16, 20)]
    passes.clear()
    np.testing.assert_array_equal(inf.explain(rows(3, 1)).values, first)
    inf.self_influence()
    assert passes == []
