"""The Scores result: labels, signs, tables, frames, files."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import upweight as uw
from upweight import errors
from upweight.meaning import Meaning
from upweight.scores import Provenance, Scores
from upweight.sinks import StoredSink
from upweight.store import publish, read_manifest, resume, write_manifest


def made(values=None, *, ids=("a", "b", "c"), helpful=1, identity="0123") -> Scores:
    values = np.array([[0.5, -1.0, 0.25], [0.0, 2.0, -3.0]]) if values is None else values
    return Scores(
        values,
        np.arange(10, 10 + len(values)),
        np.asarray(ids),
        shares=np.full(values.shape[1], 1 / values.shape[1]),
        meaning=Meaning("loss", "nats", helpful),
        provenance=Provenance(
            "exact", 0.1, "mean", 1.0, identity, np.full(len(values), 1e-12), ("a caveat",)
        ),
    )


def test_top_is_helpful_and_bottom_harmful():
    scores = made()
    assert scores.top(10, 2)["train"].tolist() == ["a", "c"]
    assert scores.bottom(10, 1)["train"].tolist() == ["b"]
    assert scores.top(10, 1)["effect"].tolist() == ["helpful"]
    assert scores.bottom(10, 1)["effect"].tolist() == ["harmful"]
    assert scores.for_train("c")["query"].tolist() == [11, 10]


def test_a_measure_where_more_is_better_turns_the_sides():
    scores = made(helpful=-1)
    assert scores.top(10, 1)["train"].tolist() == ["b"]
    assert scores.top(10, 1)["effect"].tolist() == ["helpful"]


def test_a_baseline_has_no_effect_of_removal():
    scores = made()
    scores.meaning = Meaning("training_loss", "loss", 0, change=False)
    for table in (scores.top(10, 1), scores.bottom(10, 1), scores.for_train("c")):
        assert "effect" not in table.columns


def test_upweight_is_minus_n_times_the_score():
    np.testing.assert_allclose(made().upweight, -3 * made().values)


def test_every_text_says_sign_and_unit():
    scores = made()
    for text in (repr(scores), scores._repr_html_(), repr(scores.top(10)), repr(scores.table())):
        assert "nats" in text
        assert "positive = helpful, negative = harmful" in text
    assert "loss_change_if_removed" in scores.table().columns
    assert "caveat: a caveat" in repr(scores)
    assert "residual ≤ 1.0e-12" in repr(scores)


def test_frames_and_files_agree(tmp_path):
    scores = made()
    frame = scores.to_pandas()
    assert list(frame.columns) == ["query", "train", "loss_change_if_removed"]
    assert frame.shape == (6, 3)
    other = scores.to_polars().to_pandas()
    assert frame.astype({"train": str}).equals(other.astype({"train": str}))
    assert scores.to_arrow().num_rows == 6
    read = pd.read_csv(scores.to_csv(tmp_path / "s.csv"))
    np.testing.assert_allclose(read["loss_change_if_removed"], scores.values.ravel())
    read = pl.read_parquet(scores.to_parquet(tmp_path / "s.parquet"))
    np.testing.assert_allclose(read["loss_change_if_removed"].to_numpy(), scores.values.ravel())
    assert sorted(os.listdir(tmp_path)) == ["s.csv", "s.parquet"]


def test_numpy_sees_the_values():
    scores = made()
    assert np.asarray(scores) is not None
    np.testing.assert_array_equal(np.asarray(scores), scores.values)
    assert np.asarray(scores, dtype=np.float32).dtype == np.float32
    assert np.array(scores).shape == scores.shape == (2, 3)


@settings(max_examples=20, deadline=None)
@given(
    q=st.integers(1, 4),
    n=st.integers(1, 5),
    text=st.booleans(),
    kind=st.sampled_from([np.float32, np.float64]),
)
def test_save_and_load_give_the_same(tmp_path_factory, q, n, text, kind):
    values = np.random.default_rng(q * n).normal(size=(q, n)).astype(kind)
    ids = [f"é{i}" for i in range(n)] if text else list(range(n))
    scores = made(values, ids=ids)
    place = tmp_path_factory.mktemp("scores") / "run"
    again = Scores.load(scores.save(place))
    np.testing.assert_array_equal(again.values, values)
    assert again.values.dtype == kind
    np.testing.assert_array_equal(again.train_ids, scores.train_ids)
    np.testing.assert_array_equal(again.shares, scores.shares)
    assert repr(again) == repr(scores)
    again.save(place)


def test_scores_of_a_model_round_trip(tmp_path):
    x, y = torch.randn(9, 3), torch.arange(9) % 3
    scores = uw.influence(nn.Linear(3, 3), (x, y), (x[:2], y[:2]), loss="cross_entropy", l2=0.1)
    again = Scores.load(scores.save(tmp_path / "run"))
    assert repr(again.top(1)) == repr(scores.top(1))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["schema"] == 1
    assert manifest["meaning"]["unit"] == "nats"
    assert manifest["worst_residual"] < 1e-5


def test_a_directory_of_another_run_is_refused(tmp_path):
    made().save(tmp_path / "run")
    with pytest.raises(errors.StoreError, match="belongs to another run"):
        made(identity="other").save(tmp_path / "run")
    assert read_manifest(tmp_path / "run")["identity"] == "0123"
    made(identity="other").save(tmp_path / "run", replace=True)
    assert read_manifest(tmp_path / "run")["identity"] == "other"


def test_places_that_are_not_runs_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(errors.StoreError, match="not a run"):
        made().save(tmp_path / "mine", replace=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StoreError, match="is a file"):
        made().save(tmp_path / "file")
    with pytest.raises(errors.StoreError, match="Cannot write"):
        made().save(tmp_path / "file" / "below")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), publish(tmp_path / "run", "id") as part:
        (part / "half").write_text("written")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_the_earlier_run(tmp_path):
    made().save(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), publish(tmp_path / "run", "0123") as part:
        write_manifest(part, {"identity": "0123"})
        raise ZeroDivisionError
    assert Scores.load(tmp_path / "run").shape == (2, 3)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_kill_in_the_middle_leaves_no_run(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from upweight.store import publish\n"
        "with publish(sys.argv[1], 'id') as part:\n"
        "    (part / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    place = tmp_path / "run"
    subprocess.run([sys.executable, "-c", code, str(place)], check=False)
    assert not place.exists()
    made().save(place)
    assert Scores.load(place).shape == (2, 3)


def test_what_a_kill_left_of_an_earlier_run_is_in_nobodys_way(tmp_path):
    def once():
        with resume(tmp_path / "run", "id") as part:
            write_manifest(part, {"identity": "id"})

    once()
    (tmp_path / ".run.id.old").mkdir()
    (tmp_path / ".run.id.old" / "half").write_text("not yet gone")
    once()
    assert [place.name for place in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    number = errno.ENOSPC
    with pytest.raises(errors.StoreError, match=r"scores.npy: No space left.*Free some space"):
        StoredSink(tmp_path, 2, 3, torch.float32)
    assert list(tmp_path.iterdir()) == []
    number = errno.EOPNOTSUPP  # some file systems cannot take room
    sink = StoredSink(tmp_path, 2, 3, torch.float32)
    sink.write(0, torch.ones(2, 3))
    assert StoredSink(tmp_path, 2, 3, torch.float32).first == 3


def test_damaged_and_foreign_directories_are_named(tmp_path):
    with pytest.raises(errors.StoreError, match="not a run"):
        Scores.load(tmp_path)
    place = made().save(tmp_path / "run")
    (place / "scores.npy").write_bytes(b"nonsense")
    with pytest.raises(errors.StoreError, match="damaged"):
        Scores.load(place)
    (place / "manifest.json").write_text("{")
    with pytest.raises(errors.StoreError, match="damaged"):
        Scores.load(place)
    (place / "manifest.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(errors.StoreError, match="schema 99"):
        Scores.load(place)


def test_pickles_are_never_read(tmp_path):
    place = made().save(tmp_path / "run")
    np.save(place / "scores.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(errors.StoreError):
        Scores.load(place)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(errors.StoreError, match="No space left"):
        made().save(tmp_path / "run")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(errors.StoreError, match="No space left"):
        made().to_parquet(tmp_path / "s.parquet")
    assert list(tmp_path.iterdir()) == []


def test_audit_has_cleanlabs_names_and_finds_a_flipped_label():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator).double()
    y = (x[:, 0] > 0).long()
    y[7] = 1 - y[7]
    x[7, 0] = 3.0 * (2 * (1 - y[7]) - 1)
    model = nn.Linear(2, 2).double()
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss = loss + 0.01 * sum(p.square().sum() for p in model.parameters()) / 2
        loss.backward()
        return loss

    optimiser.step(closure)
    data = uw.Data.of((x, y), ids=[f"row{i}" for i in range(60)])
    table = uw.Influence(model, data, loss="cross_entropy", l2=0.01).audit()
    assert table["id"][0] == "row7"
    assert table["label_quality"][0] == 0.0
    assert table["is_label_issue"][0]
    assert set(table.columns) == {
        "id",
        "label_quality",
        "is_label_issue",
        "given_label",
        "predicted_label",
        "self_influence",
        "loss",
        "margin",
    }
    assert (np.diff(table["self_influence"]) <= 0).all()


def test_plan_covers_every_method_before_anything_runs():
    x, y = torch.randn(40, 3), torch.arange(40) % 3
    for method in [name for name in uw.METHODS if name != "bm25"]:  # which counts tokens
        plan = uw.Influence(nn.Linear(3, 3), (x, y), loss="cross_entropy", l2=0.1, method=method)
        text = repr(plan.plan((x[:2], y[:2])))
        assert "100.0% of parameters covered" in text
        assert plan.plan((x[:2], y[:2])).seconds > 0


def test_the_validation_says_what_was_compared():
    x, y = torch.randn(30, 2).double(), torch.randn(30).double()
    model = nn.Linear(2, 1, bias=False).double()
    share = torch.full((30,), 1 / 30).double()
    from upweight import reference

    with torch.no_grad():
        model.weight.copy_(reference.ridge(x, y, 0.1, share)[None])
    inf = uw.Influence(model, (x, y), loss="mean_squared_error", l2=0.1)
    proof = inf.validate((x[:2], y[:2]), top=5, random=5)
    text = repr(proof)
    assert "most influential: r = " in text
    assert "random: r = " in text
    assert "refits" in text
    assert len(proof.table()) == 20
    axes = proof.plot()
    assert axes.get_xlabel() == "predicted change of loss (squared target units)"


def test_agreement_interval_holds_the_value_and_needs_three():
    from upweight.evaluation import agreement

    generator = np.random.default_rng(0)
    predicted = generator.normal(size=200)
    actual = 2 * predicted + generator.normal(size=200)
    found = agreement(predicted, actual)
    assert found.r_interval[0] < found.r < found.r_interval[1]
    assert found.slope_interval[0] < 2 < found.slope_interval[1]
    assert found == agreement(predicted, actual)
    with pytest.raises(errors.InputError, match="at least 3"):
        agreement(predicted[:2], actual[:2])


def test_progress_is_shown_and_hidden(capsys):
    from upweight.bars import track

    with uw.progress(True):
        assert list(track(range(3), "work")) == [0, 1, 2]
    with uw.progress(False):
        assert list(track(range(3), "work")) == [0, 1, 2]
    assert "work" not in capsys.readouterr().out
