"""Scores in other programs' layouts: the numbers, their sign, and the order of the lists."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upweight as uw
from upweight.cli.app import main
from upweight.demo import minimise
from upweight.errors import DataError, InputError, NonFiniteError, StoreError
from upweight.meaning import Meaning
from upweight.scores import Provenance, Scores

THEIRS = ["label", "num_in_dataset", "time_calc_influence_s", "influence", "harmful", "helpful"]
BY_HAND = np.array([[0.5, -1.0, 0.25], [0.0, 2.0, -3.0]])


def made(values=BY_HAND, *, queries=(10, 11), meaning=None) -> Scores:
    return Scores(
        values,
        np.asarray(queries),
        np.asarray(["a", "b", "c"]),
        shares=np.full(values.shape[1], 1 / values.shape[1]),
        meaning=meaning or Meaning("loss", "nats", 1),
        provenance=Provenance(
            "exact", 0.1, "mean", 1.0, "0123", np.full(len(values), np.nan), ("a caveat",)
        ),
    )


def written(scores, tmp_path, **options) -> dict:
    return json.loads(uw.influence_json(scores, tmp_path / "r.json", **options).read_text())


def test_by_hand(tmp_path):
    content = written(made(), tmp_path, labels=[7, 3], seconds=0.5)
    assert list(content) == ["10", "11"]
    assert [list(entry) for entry in content.values()] == [[*THEIRS, "upweight"]] * 2
    first, second = content.values()
    assert {key: first[key] for key in THEIRS} == {
        "label": 7,
        "num_in_dataset": 0,
        "time_calc_influence_s": 0.5,
        "influence": [-0.5, 1.0, -0.25],
        "harmful": [1, 2, 0],
        "helpful": [0, 2, 1],
    }
    assert (second["label"], second["num_in_dataset"]) == (3, 1)
    assert (second["helpful"], second["harmful"]) == ([1, 0, 2], [2, 0, 1])
    assert "-0.0" not in (tmp_path / "r.json").read_text()


def test_it_says_what_it_holds(tmp_path):
    says = written(made(), tmp_path)["10"]["upweight"]
    assert "minus the predicted change of the query's loss (nats)" in says["says"]
    assert "negative = helpful, positive = harmful" in says["says"]
    assert (says["method"], says["damping"], says["identity"]) == ("exact", 0.1, "0123")
    assert says["caveats"] == ["a caveat"]
    assert (says["helpful_ids"], says["harmful_ids"]) == (["a", "c", "b"], ["b", "c", "a"])


def test_values_come_back_bit_by_bit(tmp_path):
    for dtype in (np.float32, np.float64):
        values = np.random.default_rng(0).normal(size=(2, 3)).astype(dtype) * 1e-5
        content = written(made(values), tmp_path)
        read = np.array([entry["influence"] for entry in content.values()], dtype)
        np.testing.assert_array_equal(-read, values)


def test_it_is_the_papers_influence_by_n_without_their_scale(tmp_path):
    scores = made()
    content = written(scores, tmp_path)
    read = np.array([entry["influence"] for entry in content.values()])
    np.testing.assert_allclose(read, scores.upweight / 3, atol=1e-15)


def test_lists_stop_at_k(tmp_path):
    entry = written(made(), tmp_path, k=1)["10"]
    assert (entry["helpful"], entry["harmful"]) == ([0], [1])
    assert entry["upweight"]["helpful_ids"] == ["a"]
    assert len(entry["influence"]) == 3


@pytest.mark.parametrize(
    ("labels", "read"),
    [
        (None, [None, None]),
        (torch.tensor([4, 9]), [4, 9]),
        (np.array([0.5, np.nan]), [0.5, None]),
        (["cat", "ship"], ["cat", "ship"]),
        (torch.eye(2), [[1, 0], [0, 1]]),
    ],
    ids=str,
)
def test_labels(tmp_path, labels, read):
    content = written(made(), tmp_path, labels=labels)
    assert [entry["label"] for entry in content.values()] == read


def refused(tmp_path, error, match, scores, **options):
    with pytest.raises(error, match=match):
        uw.influence_json(scores, tmp_path / "r.json", **options)
    assert not list(tmp_path.iterdir())


def test_refusals_leave_nothing_behind(tmp_path):
    likeness = Meaning("similarity", "minus input distance", 0, change=False)
    refused(tmp_path, InputError, "no effect of removal", made(meaning=likeness))
    refused(tmp_path, InputError, "margin", made(meaning=Meaning("margin", "logits", -1)))
    refused(tmp_path, InputError, "k must be at least 1", made(), k=0)
    refused(tmp_path, DataError, "3 labels for 2 queries", made(), labels=[1, 2, 3])
    twins = np.array([1, "1"], dtype=object)
    refused(tmp_path, DataError, "read the same", made(queries=twins))
    for bad in (np.nan, np.inf):
        values = BY_HAND.copy()
        values[1, 2] = bad
        refused(tmp_path, NonFiniteError, "query .*11.* not all finite", made(values))


def test_a_baseline_of_similarities_is_refused(tmp_path):
    rows = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    model = nn.Linear(2, 2)
    scores = uw.Influence(model, rows, loss="cross_entropy", method="euclidean").explain(rows)
    refused(tmp_path, InputError, "changes of a loss", scores)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    written(made(), tmp_path)
    assert written(made(2 * BY_HAND), tmp_path)["10"]["influence"] == [-1.0, 2.0, -0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    with pytest.raises(StoreError):
        uw.influence_json(made(), tmp_path / "absent" / "r.json")


def test_sign_and_order_hold_when_examples_are_really_removed(tmp_path):
    torch.manual_seed(0)
    n = 120
    x = torch.randn(n + 2, 3, dtype=torch.float64)
    y = (x[:, 0] + 0.7 * torch.randn(n + 2, dtype=torch.float64) > 0).long()
    (train, labels), queries = (x[:n], y[:n]), (x[n:], y[n:])

    def fitted(kept):
        model = nn.Linear(3, 2, dtype=torch.float64)
        minimise(model, (train[kept], labels[kept]), 0.1)
        return model, F.cross_entropy(model(queries[0]), queries[1], reduction="none").detach()

    places = torch.arange(n)
    model, before = fitted(places)
    actual = torch.stack([fitted(places[places != gone])[1] for gone in range(n)], 1)
    actual = (actual - before[:, None]).numpy()
    scores = uw.influence(model, (train, labels), queries, loss="cross_entropy", l2=0.1)
    content = written(scores, tmp_path, labels=queries[1])
    for place, (key, entry) in enumerate(content.items()):
        assert (key, entry["label"]) == (str(place), int(queries[1][place]))
        best, worst = entry["helpful"][0], entry["harmful"][0]
        assert (best, worst) == (int(actual[place].argmax()), int(actual[place].argmin()))
        assert actual[place, best] > 0 > actual[place, worst]
        removal = -np.array(entry["influence"])
        np.testing.assert_allclose(removal, actual[place], rtol=0.15, atol=1e-4)


def test_a_run_is_exported_from_the_command_line(tmp_path, capsys):
    made().save(tmp_path / "run")
    out = tmp_path / "influence_results_0_1.json"
    assert main(["export", str(tmp_path / "run"), "--out", str(out), "--format", "ptif"]) == 0
    assert "2 queries by 3 training examples" in capsys.readouterr().out
    assert json.loads(out.read_text())["11"]["helpful"] == [1, 0, 2]
    assert main(["export", str(tmp_path / "absent")]) == 1
    assert main(["export", str(tmp_path / "run"), "--format", "csv"]) == 2


def test_caveats_of_accepted_solves_travel(tmp_path):
    scores = made()
    scores.provenance = replace(scores.provenance, caveats=("1 of 2 solves accepted",))
    assert written(scores, tmp_path)["10"]["upweight"]["caveats"] == ["1 of 2 solves accepted"]
