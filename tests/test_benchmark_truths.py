"""Stored retrainings and what is judged by them, on a recipe of 24 examples."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks import contenders, harness, lds, lds_page, networks, reference, report, truths
from benchmarks.contenders import Contender
from benchmarks.datasets import scratch
from upweight.retraining import Trials


def recipe():
    generator = torch.Generator().manual_seed(0)
    x, q = torch.rand(24, 5, generator=generator), torch.rand(6, 5, generator=generator)
    arrays = (x, torch.arange(24) % 3, q, torch.arange(6) % 3)
    data = {name: x.numpy() for name, x in zip(networks.NAMES, arrays, strict=True)}
    return networks.Recipe(
        data=lambda: data,
        build=lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)),
        optimiser=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5),
        l2=1e-2,
        epochs=3,
        batch=5,
        queries=2,
        exact=reference.Plan(),
    )


@pytest.fixture
def task(monkeypatch, tmp_path):
    """A task of its own, with its scratch, results and truths in a folder of the test."""
    made = ModuleType("benchmarks.tiny")
    made.RECIPE, made.TITLE = recipe(), "tiny"
    made.ABOUT = {"objective": "o", "network": "n", "examples": 24, "queries": 6}
    made.load, made.convergence = made.RECIPE.load, made.RECIPE.convergence
    monkeypatch.setitem(sys.modules, "benchmarks.tiny", made)
    monkeypatch.setenv("UPWEIGHT_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(truths, "FOLDER", tmp_path)
    made.RECIPE.supply(scratch("tiny"))
    return made


def by_hand(kept, seed):
    """The losses of the queries after every step, by a loop of its own."""
    made = recipe()
    x, y, q, z = (torch.from_numpy(made.data()[name]) for name in networks.NAMES)
    x, y = x[kept], y[kept]
    torch.manual_seed(seed)
    model = made.build()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5, weight_decay=1e-2)
    found = []
    for _ in range(3):
        for rows in torch.randperm(len(x)).split(5):
            model.train()
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
            with torch.no_grad():
                outputs = model.eval()(q)
            found.append(nn.functional.cross_entropy(outputs, z, reduction="none").numpy())
    return np.array(found)


def test_outcomes_are_those_of_a_loop_by_hand(task, tmp_path):
    assert truths.go_on("tiny", 2, 2, 1.0, tmp_path)
    found = truths.read("tiny", tmp_path)
    assert found.measured.shape == (2, 2, 2, 6)
    trials = Trials.subsets(24, count=2, fraction=0.5, seeds=[0, 1])
    assert np.array_equal(found.gone, trials.gone[::2])
    for trial, seed in enumerate(trials.seeds):
        steps = by_hand(torch.from_numpy(~trials.gone[trial]), int(seed))
        final, last = found.measured[trial // 2, seed]
        assert np.allclose(final, steps[-1], rtol=1e-5)
        assert np.allclose(last, steps[-3:].mean(0), rtol=1e-5)  # 12 examples are 3 batches
    everything = by_hand(torch.ones(24, dtype=torch.bool), 1)
    assert np.allclose(found.whole[1, 0], everything[-1], rtol=1e-5)


def test_all_of_the_data_gives_the_model_that_is_explained(task, tmp_path):
    truths.go_on("tiny", 1, 1, 1.0, tmp_path)
    problem = task.load(scratch("tiny"))
    now = truths.losses(problem, problem.model()).numpy()
    assert np.array_equal(truths.read("tiny", tmp_path).whole[0, 0], now)
    again = problem.again(0, None)
    assert all(torch.equal(again[name], value) for name, value in problem.weights.items())


def test_stopped_and_gone_on_is_uninterrupted(task, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert truths.go_on("tiny", 3, 2, 1.0, tmp_path / "a")
    assert truths.go_on("tiny", 1, 1, 1.0, tmp_path / "b")
    assert not truths.go_on("tiny", 3, 2, -1.0, tmp_path / "b")  # no time at all
    assert truths.go_on("tiny", 3, 2, 1.0, tmp_path / "b")
    whole, parts = (truths.read("tiny", tmp_path / name) for name in "ab")
    assert np.array_equal(whole.measured, parts.measured)
    assert np.array_equal(whole.whole, parts.whole)
    assert json.loads((tmp_path / "b" / "tiny.json").read_text())["subsets"] == 3


def test_subsets_that_wait_for_a_seed_are_left_out():
    outcomes = truths.Outcomes.empty(10, 2, subsets=3, seeds=2)
    outcomes.measured[:2, 0], outcomes.measured[0, 1] = 1.0, 1.0
    assert len(outcomes.complete().gone) == 1


def test_other_subsets_are_not_gone_on_with(task, tmp_path):
    truths.go_on("tiny", 2, 1, 1.0, tmp_path)
    found = truths.read("tiny", tmp_path)
    with pytest.raises(ValueError, match="as many or more"):
        truths.go_on("tiny", 1, 1, 1.0, tmp_path)
    truths.Outcomes(~found.gone, found.measured, found.whole).write(tmp_path / "tiny.npz")
    with pytest.raises(ValueError, match="not what is drawn"):
        truths.go_on("tiny", 2, 1, 1.0, tmp_path)


@pytest.fixture
def judged(task, monkeypatch, tmp_path):
    """Contenders with scores of their own, judged by twelve retrainings of two seeds."""
    truths.go_on("tiny", 12, 2, 1.0, tmp_path)
    rows = (
        Contender("floor", "tiny"),
        Contender("peer", "tiny"),
        Contender("broken", "tiny"),
        Contender("absent", "tiny", environment="nowhere"),
    )
    monkeypatch.setitem(contenders.CONTENDERS, "tiny", rows)
    ours = (Contender("upweight fit", "tiny"), Contender(lds.SOLVED, "tiny"))
    monkeypatch.setitem(contenders.RANKED, "tiny", ours)
    made = scores_of(truths.read("tiny", tmp_path))

    def once(name, contender, threads, gib):
        if contender.name == "broken":
            return {"failed": "ValueError: no"}
        if contender.name in made:
            np.save(scratch("tiny") / f"{contender.name}.npy", made[contender.name])
        return {"cpu_s": 2.0, "wall_s": 2.0, "peak_mib": 1, "versions": {"python": "3"}}

    monkeypatch.setattr(harness, "run_once", once)
    lds.update("tiny", list(lds.rows("tiny")), (1, 4.0))
    return made


def scores_of(outcomes):
    """One contender knows the outcomes of the last epoch, by least squares; another nothing."""
    changes = (outcomes.measured - outcomes.whole)[:, :, 1].astype(np.float64).mean(1)
    gone = outcomes.gone.astype(np.float64)
    fit = np.linalg.lstsq(gone, changes, rcond=None)[0].T
    noise = np.random.default_rng(0).normal(size=fit.shape)
    return {"upweight fit": fit, "peer": noise, lds.SOLVED: 2 * fit}


def test_records_say_what_spearman_says(judged, tmp_path):
    stored = report.read(harness.RESULTS / "lds_tiny.json")
    assert list(stored["contenders"]) == ["floor", "peer", "broken", "upweight fit", lds.SOLVED]
    fit, peer = stored["contenders"]["upweight fit"], stored["contenders"]["peer"]
    assert fit["lds"][0] == 1.0
    assert fit["spearman"] == 1.0
    assert fit["relative_error"] == 0.5
    outcomes = truths.read("tiny", tmp_path)
    for kind, key in ((0, "lds_final"), (1, "lds")):
        changes = (outcomes.measured - outcomes.whole)[:, :, kind].astype(np.float64).mean(1)
        predicted = judged["peer"] @ outcomes.gone.T
        pairs = zip(predicted, changes.T, strict=True)
        wanted = np.mean([spearmanr(*pair).statistic for pair in pairs])
        assert peer[key][0] == pytest.approx(wanted, abs=1e-4)
        assert peer[key][1] <= peer[key][0] <= peer[key][2]
    assert stored["best"]["any weights"] == stored["best"]["final weights"]
    best = stored["best"]["final weights"]
    assert (best["ours"], best["peer"]) == ("upweight fit", "peer")
    assert best["lead"][0] == pytest.approx(1 - peer["lds"][0], abs=2e-4)


def test_ceiling_is_of_the_mean_over_seeds(judged, tmp_path):
    found = report.read(harness.RESULTS / "lds_tiny.json")["retraining"]
    outcomes = truths.read("tiny", tmp_path)
    one, other = (outcomes.measured[:, seed, 0].T for seed in (0, 1))
    r = np.mean([spearmanr(*pair).statistic for pair in zip(one, other, strict=True)])
    assert found["final"]["seed_to_seed"] == pytest.approx(r, abs=1e-4)
    assert found["final"]["ceiling"] == pytest.approx((2 * r / (1 + r)) ** 0.5, abs=1e-4)
    assert (found["subsets"], found["seeds"], found["queries"]) == (12, 2, 6)


def test_only_what_has_no_scores_is_run(judged):
    assert [row.name for row in lds.missing("tiny")] == ["broken", "absent"]


def test_other_retrainings_drop_what_cannot_be_judged_again(judged, tmp_path):
    (scratch("tiny") / "peer.npy").unlink()
    lds.update("tiny", [], (1, 4.0))
    stored = report.read(harness.RESULTS / "lds_tiny.json")["contenders"]
    assert "lds" in stored["peer"]  # the same trainings
    truths.go_on("tiny", 13, 2, 1.0, tmp_path)
    lds.update("tiny", [], (1, 4.0))
    stored = report.read(harness.RESULTS / "lds_tiny.json")["contenders"]
    assert "lds" not in stored["peer"]
    assert "lds" in stored["upweight fit"]


def test_few_subsets_judge_nothing(judged, tmp_path, capsys):
    found = truths.read("tiny", tmp_path)
    few = truths.Outcomes(found.gone[:7], found.measured[:7], found.whole)
    few.write(tmp_path / "tiny.npz")
    before = report.read(harness.RESULTS / "lds_tiny.json")
    lds.update("tiny", [], (1, 4.0))
    assert report.read(harness.RESULTS / "lds_tiny.json") == before
    assert "7 subsets are trained, judged from 8 on" in capsys.readouterr().out


def test_rows_of_few_queries_follow_the_reference(judged, monkeypatch):
    path = harness.RESULTS / "lds_tiny.json"
    stored = report.read(path)
    few = stored["contenders"]["peer"]
    few |= {"queries": 2, "relative_error": 9.0}
    report.dump(path, stored)
    monkeypatch.setattr(harness, "judged", lambda task, name: {"relative_error": 0.25})
    lds.update("tiny", [], (1, 4.0))
    found = report.read(path)["contenders"]
    assert found["peer"]["relative_error"] == 0.25
    assert found["upweight fit"]["relative_error"] == 0.5


def test_page_has_every_judged_row_best_first(judged):
    text = lds_page.page(harness.RESULTS, ("tiny", "nothing"))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    names = [line.split("|")[1].strip() for line in rows[2:]]
    assert set(names[:2]) == {"upweight fit", lds.SOLVED}
    assert names[2:] == ["peer", "broken"]
    assert "**failed: ValueError: no**" in rows[-1]
    assert "best of ours is upweight fit, best of the peers peer" in text
    assert "12 subsets x 2 seeds" in text


def test_rows_of_other_weights_are_told_apart():
    rows = [row.name for row in lds.rows("mlp")]
    others = [name for name in rows if not lds.final("mlp", name)]
    assert {name for name in rows if "epoch" in name or " x " in name} | {"upweight tracin"} == set(
        others
    )


def test_a_checkpoint_is_looked_at_instead(task):
    problem = task.load(scratch("tiny"))
    early = problem.at(1)
    assert not torch.equal(early.weights["0.weight"], problem.weights["0.weight"])
    whole = problem.at(3)
    assert all(torch.equal(whole.weights[name], value) for name, value in problem.weights.items())


def test_rows_that_retraining_judges_are_unique():
    for name in lds.TASKS:
        names = [row.name for row in lds.rows(name)]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", lds.TASKS)
def test_stored_truths_are_of_the_subsets_that_are_drawn(name):
    path = truths.FOLDER / f"{name}.npz"
    if not path.exists():
        pytest.skip("nothing trained yet")
    found, about = truths.read(name), json.loads(path.with_suffix(".json").read_text())
    drawn = Trials.subsets(
        found.gone.shape[1], count=len(found.gone), fraction=about["fraction"], seeds=[0]
    )
    assert np.array_equal(found.gone, drawn.gone)
    assert len(found.complete().gone) == about["subsets"]
    assert np.isfinite(found.complete().measured).all()


def test_page_is_made_from_the_stored_results():
    path = harness.RESULTS / "lds.md"
    if not path.exists():
        pytest.skip("nothing judged yet")
    assert path.read_text() == lds_page.page(harness.RESULTS, lds.TASKS)
