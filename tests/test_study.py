"""Studies: every part of the summary, reasons for what is missing, and the directory."""

import csv
import json

import numpy as np
import pytest
import torch
from torch import nn

from upweight import demo
from upweight.errors import IndefiniteError, InputError, RecipeError, StoreError
from upweight.recipe import Recipe
from upweight.report import render
from upweight.report.numbers import figure
from upweight.scores import Scores
from upweight.store import read_manifest
from upweight.study import SHOWN_QUERIES, Study, Wish, summary

L2 = 0.05


def rows(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]], dtype=torch.float64)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return centres[labels] + noise, labels


def trained(count: int = 60) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(2, 3, dtype=torch.float64)
    demo.minimise(model, rows(count), L2)
    return model


def recipe(**other) -> Recipe:
    known = {"model": trained(), "train": rows(60), "queries": rows(5, 1), "loss": "cross_entropy"}
    return Recipe(**{**known, "l2": L2, **other})


def page(study: Study) -> dict:
    content = summary("T", [study], study.identity)
    json.dumps(content, allow_nan=False)
    assert "<html" in render(content)
    return content["models"][0]


def test_a_whole_study():
    ids = [f"row {i}" for i in range(60)]
    study = Study(
        recipe(ids=ids, label_names=["top", "right", "left"], image_shape=(1, 2)),
        Wish(top=2, removals=6),
        name="M",
        facts=[("Kind", "clouds")],
        flipped=["row 0", "row 1"],
    )
    model = page(study)
    assert (model["name"], model["method"], model["unit"]) == ("M", "exact", "nats")
    assert model["facts"][0] == ["Kind", "clouds"]
    assert model["caveats"] == []
    assert len(model["queries"]) == 5
    for place, query in enumerate(model["queries"]):
        assert query["title"].startswith(
            f"labelled {['top', 'right', 'left'][place % 3]}, predicted"
        )
        assert all(example["score"] > 0 for example in query["helpful"])
        assert all(example["score"] < 0 for example in query["harmful"])
        assert len(query["helpful"]) == 2
        best = study.scores.top(place, 1)
        assert query["helpful"][0]["id"] == best["train"][0]
        assert query["helpful"][0]["score"] == best["loss_change_if_removed"][0]
        position = ids.index(query["helpful"][0]["id"])
        assert query["helpful"][0]["label"] == ["top", "right", "left"][position % 3]
        assert query["picture"].startswith("data:image/png")
    rows_ = model["suspects"]["rows"]
    assert [row["id"] for row in rows_] == study.audit["id"][:30].tolist()
    assert {row["id"] for row in rows_ if row["flipped"]} <= {"row 0", "row 1"}
    assert model["suspects"]["found"]["checked"] == 6
    assert model["suspects"]["found"]["total"] == 2
    evidence = model["evidence"]
    assert [a["name"] for a in evidence["agreements"]] == ["most influential", "random"]
    assert len(evidence["points"]) == 5 * 12
    point = evidence["points"][0]
    where = study.scores.train_ids.tolist().index(point["removed"])
    assert point["x"] == study.scores.values[int(point["query"]), where]
    assert evidence["agreements"][1]["r"] > 0.99


def test_query_measure_is_the_measure():
    asked = recipe(measure="margin")
    inputs, labels = asked.queries
    with torch.no_grad():
        outputs = asked.model(inputs)
    hot = nn.functional.one_hot(labels, 3).bool()
    expected = outputs[hot] - outputs.masked_fill(hot, -torch.inf).logsumexp(1)
    model = page(Study(asked, Wish(removals=0)))
    found = [query["measure"] for query in model["queries"]]
    assert found == pytest.approx(expected.tolist())
    # A margin falls when a helpful example goes.
    assert all(e["score"] < 0 for query in model["queries"] for e in query["helpful"])


def test_no_removals_and_many_queries():
    study = Study(recipe(queries=rows(20, 1)), Wish(removals=0))
    model = page(study)
    assert study.proof is None
    assert model["caveats"] == ["Not proved by removal: no removals were asked for."]
    assert model["evidence"] is None
    assert len(model["queries"]) == SHOWN_QUERIES
    assert ["Queries", f"20 (the first {SHOWN_QUERIES} shown)"] in model["facts"]
    assert study.scores.shape == (20, 60)


def test_a_model_that_is_not_at_a_minimum_is_explained_but_not_proved():
    model = trained()
    with torch.no_grad():
        model.weight.mul_(6)
    study = Study(recipe(model=model, l2=0.0), Wish(damping=0.01))
    off, unproved = study.notes
    assert off.startswith(f"The model: gradient norm {study.slope:.1e}, more than 1e-05: not at")
    assert unproved.startswith("Not proved by removal: ")
    assert page(study)["caveats"] == [off, unproved]


def test_an_indefinite_curvature_is_not_proved_or_refused():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with pytest.raises(IndefiniteError):
        _ = Study(recipe(model=model, l2=0.0)).scores
    study = Study(recipe(model=model, l2=0.0), Wish(method="ggn", damping=0.1))
    assert study.proof is None
    # The scores' curvature is positive already, so that is not what to change.
    _, note = study.notes
    assert "at no minimum of its objective" in note
    assert f"gradient norm {study.slope:.1e}, and its Hessian is not positive definite" in note
    assert "'upweight validate RECIPE.py'" in note
    assert "method='ggn'" not in note
    assert page(study)["method"] == "ggn"


def test_large_models_are_not_refitted():
    model = nn.Sequential(nn.Linear(2, 2000), nn.Linear(2000, 3)).double()
    model[0].requires_grad_(True)
    study = Study(recipe(model=model), Wish(method="no_hessian"))
    assert "12,003 parameters are more than 10,000" in study.notes[-1]


def test_a_baseline_has_neighbours_and_no_audit():
    study = Study(recipe(), Wish(method="euclidean", top=3, removals=5))
    model = page(study)
    assert model["suspects"] is None
    assert (model["change"], model["helpful"]) == (False, 0)
    assert model["worst_residual"] is None
    assert any("No suspicious labels" in caveat for caveat in model["caveats"])
    inputs, _ = rows(60)
    nearest = torch.cdist(rows(5, 1)[0], inputs).argsort(1)[:, :3].tolist()
    assert [[e["id"] for e in query["helpful"]] for query in model["queries"]] == nearest


def test_scores_that_only_rank_have_the_losss_unit_beside_the_query_and_no_slope(tmp_path):
    study = Study(recipe(), Wish(method="relatif", damping=0.1, removals=6))
    model = page(study)
    assert (model["unit"], model["per"]) == ("nats", "‖H⁻¹∇ℓ‖")
    assert [row["slope"] for row in model["evidence"]["agreements"]] == [None, None]
    assert all(0.5 < row["r"] <= 1 for row in model["evidence"]["agreements"])
    text = render(summary("T", [study], study.identity))
    assert f"loss {figure(model['queries'][0]['measure'])} nats</p>" in text
    assert "nats per ‖H⁻¹∇ℓ‖" in text
    for said in (*study.proof.lines(), repr(study.proof)):
        assert "slope" not in said
        assert "rank r = " in said
    assert "nats per ‖H⁻¹∇ℓ‖, an order" in repr(study.proof)
    assert "predicted in nats per ‖H⁻¹∇ℓ‖" in study.proof.table().caption
    study.save(tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "validation.json").read_text())["agreements"]
    assert kept["random"]["slope"] is None
    assert Scores.load(tmp_path / "run").meaning == study.scores.meaning


def test_an_audit_says_which_labels_differ_and_how_many():
    flipped = rows(60)
    flipped[1][:3] = (flipped[1][:3] + 1) % 3
    study = Study(recipe(train=flipped), Wish(removals=0))
    suspects = page(study)["suspects"]
    issues = dict(zip(study.audit["id"].tolist(), study.audit["is_label_issue"], strict=True))
    assert suspects["differing"] == {"count": int(sum(issues.values())), "of": 60}
    assert suspects["differing"]["count"] >= 3
    assert [row["issue"] for row in suspects["rows"]] == [issues[r["id"]] for r in suspects["rows"]]
    assert suspects["caption"].startswith("Suspicious labels")


def test_an_audit_without_a_label_that_differs_calls_none_suspicious():
    asked = recipe()
    inputs, _ = rows(60)
    with torch.no_grad():
        said = asked.model(inputs).argmax(1)
    study = Study(recipe(train=(inputs, said)), Wish(removals=0))
    model = page(study)
    assert model["suspects"]["differing"] == {"count": 0, "of": 60}
    assert model["suspects"]["caption"].startswith("Most influential on themselves")
    text = render(summary("T", [study], study.identity))
    assert "Suspicious labels" not in text


def test_regression_has_targets_and_no_predicted_label():
    inputs, _ = rows(40)
    targets = (inputs @ torch.tensor([1.0, -2.0], dtype=torch.float64))[:, None]
    plain = Recipe(
        nn.Linear(2, 1, dtype=torch.float64),
        (inputs, targets),
        (inputs[:2], targets[:2]),
        "mean_squared_error",
        l2=0.1,
    )
    model = page(Study(plain, Wish(removals=0)))
    assert model["queries"][0]["title"] == f"labelled {float(targets[0]):.4g}"
    assert model["suspects"]["rows"][0]["predicted"] is None
    assert model["suspects"]["rows"][0]["issue"] is None
    assert model["suspects"]["differing"] is None


def test_custom_loss_and_mapping_data():
    inputs, labels = rows(30)
    data = {"input": inputs, "labels": labels}

    def squared(outputs, targets):
        return (outputs - nn.functional.one_hot(targets, 3)).square().sum(1)

    plain = Recipe(nn.Linear(2, 3, dtype=torch.float64), data, data, squared, l2=0.1)
    model = page(Study(plain, Wish(removals=0)))
    assert model["queries"][0]["title"] == "labelled 0"


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"removals": 2}, "removals must be 0, or from 3 to half of the 60"),
        ({"removals": 31}, "removals must be 0, or from 3 to half of the 60"),
        ({"removals": -1}, "removals must be 0"),
        ({"top": 0}, "top must be at least 1"),
        ({"damping": -1.0}, "damping must be a finite number"),
        ({"damping": float("nan")}, "damping must be a finite number"),
    ],
)
def test_wrong_wishes_are_refused_at_once(wish, says):
    with pytest.raises(InputError, match=says):
        Study(recipe(), Wish(**wish))


def test_a_wrong_image_shape_is_refused_at_once():
    with pytest.raises(RecipeError, match="does not hold the 2 values"):
        Study(recipe(image_shape=(8, 8)))


def test_default_removals_follow_the_data():
    assert Wish().count(1000) == 20
    assert Wish().count(12) == 4
    assert Wish().count(8) == 0
    assert "too few training examples" in Study(recipe(train=rows(6))).notes[-1]


def test_the_directory(tmp_path):
    study = Study(recipe(), Wish(top=2, removals=4))
    out = study.save(tmp_path / "run")
    assert sorted(path.name for path in out.iterdir()) == [
        "audit.csv",
        "manifest.json",
        "query_ids.npy",
        "report.html",
        "residual.npy",
        "scores.npy",
        "shares.npy",
        "top.csv",
        "train_ids.npy",
        "validation.csv",
        "validation.json",
    ]
    manifest = read_manifest(out)
    assert manifest["identity"] == study.identity
    assert manifest["settings"] == {"top": 2, "removals": 4, "seed": 0}
    loaded = Scores.load(out)
    assert np.array_equal(loaded.values, study.scores.values)
    assert loaded.meaning == study.scores.meaning
    with (out / "top.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 * 4
    assert lines[0]["query"] == "0"
    best = study.scores.top(0, 1)
    assert float(lines[0]["loss_change_if_removed"]) == best["loss_change_if_removed"][0]
    with (out / "audit.csv").open() as file:
        assert [int(row["id"]) for row in csv.DictReader(file)] == study.audit["id"].tolist()
    proof = json.loads((out / "validation.json").read_text())
    assert proof["agreements"]["random"]["count"] == 5 * 4
    assert study.identity in (out / "report.html").read_text()


def test_the_directory_of_another_run_is_refused_before_anything_is_computed(tmp_path):
    Study(recipe(), Wish(removals=0)).save(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    other = Study(recipe(), Wish(top=1, removals=0))
    with pytest.raises(StoreError, match="belongs to another run"):
        other.save(tmp_path / "run")
    assert "scores" not in vars(other)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    other.save(tmp_path / "run", replace=True)
    assert read_manifest(tmp_path / "run")["identity"] == other.identity


def test_the_same_run_again_has_the_same_identity_and_numbers(tmp_path):
    first, second = Study(recipe()), Study(recipe())
    assert first.identity == second.identity
    first.save(tmp_path / "run")
    second.save(tmp_path / "run")
    assert np.array_equal(first.scores.values, second.scores.values)
    assert Study(recipe(queries=rows(5, 2))).identity != first.identity


def test_the_digits_are_those_of_the_origin():
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    pixels, labels = demo.pixels_and_labels()
    assert np.array_equal(pixels.numpy() * 16, bunch.data)
    assert np.array_equal(labels.numpy(), bunch.target)


def test_the_split_flips_what_it_says():
    digits, (_, truth) = demo.split(4), demo.pixels_and_labels()
    wrong = digits.train[1] != truth[digits.train_ids]
    assert sorted(digits.train_ids[wrong.numpy()]) == sorted(digits.flipped)
    assert torch.equal(digits.test[1], truth[digits.test_ids])
    assert not set(digits.train_ids) & set(digits.test_ids)
    assert torch.equal(digits.train[1], demo.split(4).train[1])
    assert not np.array_equal(demo.split(5).train_ids, digits.train_ids)
