"""The benchmark harness on a task of three queries, with a contender that needs no peer."""

import importlib
import json
import re
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import (
    contenders,
    harness,
    iterations,
    networks,
    reference,
    report,
    retraining,
    transformer,
)
from benchmarks.contenders import Contender

TRUTH = np.arange(1.0, 13.0).reshape(3, 4)


class Tiny:
    """A problem whose contenders answer with the truth, scaled."""

    def __init__(self, queries=3):
        self.queries = queries

    def to(self, dtype):
        return self

    def first(self, queries):
        return Tiny(queries)


def run(problem, *, factor=None):
    return None if factor is None else factor * TRUTH[: problem.queries]


@pytest.fixture
def task(monkeypatch, tmp_path):
    """A fake task, its contenders, and folders of their own."""
    made = ModuleType("benchmarks.tiny")
    made.TITLE, made.ABOUT = "tiny", {"queries": 3}
    made.truth, made.prepare, made.load = lambda _: TRUTH, lambda _: None, lambda _: Tiny()
    rows = (
        Contender("floor", "tiny", repeats=3),
        Contender("good", "tiny", {"factor": 1.5}, "half too much"),
        Contender("few", "tiny", {"factor": 1.0}, queries=2),
        Contender("absent", "tiny", environment="nowhere"),
        Contender("broken", "tiny"),
    )
    monkeypatch.setitem(sys.modules, "benchmarks.tiny", made)
    monkeypatch.setitem(sys.modules, "benchmarks.contenders.tiny", SimpleNamespace(run=run))
    monkeypatch.setitem(contenders.CONTENDERS, "tiny", rows)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("UPWEIGHT_SCRATCH", str(tmp_path))
    (tmp_path / "tiny").mkdir()
    monkeypatch.setattr(harness, "run_once", _in_this_process)
    return made


def _in_this_process(task, contender, threads, gib):
    from benchmarks import measure

    if contender.name == "broken":
        return {"failed": "ValueError: no"}
    cost, scores = measure.measure(contender, Tiny())
    if scores is not None:
        np.save(harness.scratch(task) / f"{contender.name}.npy", scores)
    return cost | {"cpu_s": 0.5 * (contender.queries or 3), "versions": {"python": "3"}}


def test_results_and_table_are_well_formed(task, capsys):
    harness.update(task, "tiny", list(contenders.CONTENDERS["tiny"]), (1, 4.0))
    stored = json.loads((harness.RESULTS / "tiny.json").read_text())["contenders"]
    assert list(stored) == ["floor", "good", "few", "broken"]
    assert len(stored["floor"]["runs"]) == 3
    assert "relative_error" not in stored["floor"]
    assert stored["good"]["relative_error"] == stored["good"]["worst_query_error"] == 0.5
    assert stored["few"]["cpu_s"] == 1.5  # 1.0 for two queries, scaled to three
    assert "setup_peers.sh nowhere" in capsys.readouterr().out
    assert stored["broken"]["failed"] == "ValueError: no"
    assert {"cpu", "cores"} <= stored["good"]["machine"].keys()

    page = (harness.RESULTS / "tiny.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(stored)
    assert len({line.count("|") for line in rows}) == 1
    assert "~1.50" in page
    assert "failed" in rows[-1]


def test_other_results_are_kept(task):
    rows = contenders.CONTENDERS["tiny"]
    harness.update(task, "tiny", [rows[1]], (1, 4.0))
    harness.update(task, "tiny", [rows[0]], (1, 4.0))
    stored = json.loads((harness.RESULTS / "tiny.json").read_text())
    assert list(stored["contenders"]) == ["floor", "good"]


def test_no_path_of_a_machine_is_stored():
    for path in (harness.ROOT / "benchmarks" / "results").glob("*"):
        found = re.findall(r"(?<![\w.])/(?:home|root|tmp|work|opt|usr)/\S*", path.read_text())
        assert not found, (path.name, found)
    assert report.without_paths("in /tmp/a/b.py, a/b") == "in b.py, a/b"


def test_unknown_contender_is_named():
    with pytest.raises(SystemExit, match="no contender 'x'"):
        contenders.find("softmax", "x")


def test_exact_scores_solve_the_problem():
    from benchmarks import softmax

    generator = torch.Generator().manual_seed(0)
    x, q = torch.rand(40, 6, generator=generator), torch.rand(3, 6, generator=generator)
    y, z = torch.arange(40) % 10, torch.arange(3)
    problem = softmax.Problem(x, y, q, z, torch.randn(10, 6, generator=generator).double())
    from upweight import Influence, Objective

    objective = Objective(problem.model(torch.float64), "cross_entropy", l2=0.01, removal="sum")
    scores = Influence(objective, (x.double(), y)).explain((q.double(), z))
    assert np.allclose(np.asarray(scores), softmax.exact_scores(problem).numpy(), rtol=1e-9)


def test_agreement_ignores_what_it_should():
    random = np.random.default_rng(0)
    truth = random.normal(size=(3, 50))
    scaled = 5 * truth + np.array([[1.0], [2.0], [3.0]])
    found = report.agreement(scaled, truth)
    assert found["pearson"] == found["spearman"] == 1.0
    assert found["relative_error"] > 3
    monotone = report.agreement(np.exp(3 * truth), truth)
    assert monotone["spearman"] == 1.0 > monotone["pearson"]
    assert report.agreement(-truth, truth)["pearson"] == -1.0
    assert report.agreement(np.ones_like(truth), truth)["pearson"] == 0.0


def test_spearman_shares_ranks_of_equal_scores():
    from scipy.stats import spearmanr

    random = np.random.default_rng(1)
    scores = random.integers(0, 4, size=(2, 30)).astype(float)
    truth = random.normal(size=(2, 30))
    wanted = np.mean([spearmanr(a, b).statistic for a, b in zip(scores, truth, strict=True)])
    assert report.agreement(scores, truth)["spearman"] == pytest.approx(wanted, rel=5e-3)


def test_table_of_a_network_task(task):
    about = {"queries": 2, "residual": 5e-4, "products": 7, "dtype": "float64"}
    task.convergence = lambda _: about
    task.truth = lambda _: TRUTH[:2]  # of the first queries alone
    harness.update(task, "tiny", list(contenders.CONTENDERS["tiny"]), (1, 4.0))
    stored = json.loads((harness.RESULTS / "tiny.json").read_text())
    assert stored["reference"] == about
    good = stored["contenders"]["good"]
    assert (good["pearson"], good["spearman"], good["relative_error"]) == (1.0, 1.0, 0.5)
    page = (harness.RESULTS / "tiny.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert "| pearson | spearman |" in rows[0]
    assert len({line.count("|") for line in rows}) == 1
    assert "relative residual 5.0e-04" in page

    task.truth = lambda _: 3 * TRUTH[:2]  # a better reference: stored scores are judged again
    harness.update(task, "tiny", [], (1, 4.0))
    stored = json.loads((harness.RESULTS / "tiny.json").read_text())["contenders"]
    assert (good["cpu_s"], stored["good"]["relative_error"]) == (stored["good"]["cpu_s"], 0.5)
    assert stored["few"]["relative_error"] == pytest.approx(2 / 3, rel=1e-2)


def test_resume_leaves_out_what_the_commit_has_measured(task, monkeypatch, tmp_path):
    ran = []
    once = harness.run_once
    monkeypatch.setattr(
        harness, "run_once", lambda *given: (ran.append(given[1].name), once(*given))[1]
    )
    monkeypatch.setattr(harness, "_commit", lambda: "abc")
    monkeypatch.setattr(harness, "DOCS", tmp_path / "page.md")
    for words in (["--only", "good", "broken"], ["--resume", "--only", "few", "good", "broken"]):
        monkeypatch.setattr(sys, "argv", ["harness", "tiny", *words])
        harness.main()
    assert ran == ["good", "broken", "few", "broken"]  # what failed is tried again
    monkeypatch.setattr(harness, "_commit", lambda: "abc-dirty")
    harness.main()
    assert ran[4:] == ["few", "good", "broken"]
    assert "# tiny" in (tmp_path / "page.md").read_text()


def test_docs_have_the_tables_of_the_results():
    page = report.docs(harness.RESULTS, tuple(contenders.CONTENDERS))
    assert harness.DOCS.read_text() == page
    for task in contenders.CONTENDERS:
        path = harness.RESULTS / f"{task}.json"
        made = report.table(report.read(path))
        assert path.with_suffix(".md").read_text() == made
        assert made in page
    for name, write in (("retraining", retraining.page), ("iterations", iterations.table)):
        written = (harness.RESULTS / f"{name}.md").read_text()
        assert written == write(report.read(harness.RESULTS / f"{name}.json"))


def test_a_contender_may_restart_the_clock(task, monkeypatch):
    from benchmarks import measure

    def slow(problem, *, clock):
        sum(range(3_000_000))
        before = clock.read()["cpu_s"]
        clock.restart()
        return np.array([[before]])

    monkeypatch.setattr(sys.modules["benchmarks.contenders.tiny"], "run", slow)
    cost, scores = measure.measure(Contender("slow", "tiny"), Tiny())
    assert 0 <= cost["cpu_s"] < scores[0, 0]


def test_what_another_reference_judged_is_dropped(task):
    task.convergence = lambda _: {"queries": 3, "residual": 1e-3, "products": 7, "dtype": "float64"}
    harness.update(task, "tiny", list(contenders.CONTENDERS["tiny"]), (1, 4.0))
    task.convergence = lambda _: {"queries": 3, "residual": 1e-4, "products": 9, "dtype": "float64"}
    (harness.scratch("tiny") / "few.npy").unlink()
    harness.update(task, "tiny", [], (1, 4.0))
    stored = json.loads((harness.RESULTS / "tiny.json").read_text())["contenders"]
    assert stored["good"]["relative_error"] == 0.5
    assert not set(report.JUDGEMENTS) & stored["few"].keys()


def test_a_reference_far_from_converged_judges_nothing(task):
    about = {"queries": 3, "residual": 1e-3, "products": 7, "dtype": "float64"}
    task.convergence = lambda _: about
    harness.update(task, "tiny", list(contenders.CONTENDERS["tiny"]), (1, 4.0))
    task.convergence = lambda _: about | {"residual": 2 * report.USABLE}
    harness.update(task, "tiny", [], (1, 4.0))
    stored = json.loads((harness.RESULTS / "tiny.json").read_text())["contenders"]
    assert stored["good"]["cpu_s"] == 1.5
    assert not set(report.JUDGEMENTS) & stored["good"].keys()
    assert "judges nothing" in (harness.RESULTS / "tiny.md").read_text()


def small_transformer(monkeypatch):
    for name, value in {"LETTERS": 7, "CONTEXT": 6, "WIDTH": 8, "HEADS": 2}.items():
        monkeypatch.setattr(transformer, name, value)
    letters = torch.randint(7, (30, 7), generator=torch.Generator().manual_seed(0))
    train, asked = letters[:25], letters[25:]
    return train[:, :-1], train[:, 1:], asked[:, :-1], asked[:, 1:], transformer.Transformer


def small_perceptron():
    generator = torch.Generator().manual_seed(0)
    x, q = torch.rand(25, 5, generator=generator), torch.rand(5, 5, generator=generator)
    y, z = torch.arange(25) % 4, torch.arange(5) % 4
    return x, y, q, z, lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))


def recipe(arrays, build):
    data = {name: x.numpy() for name, x in zip(networks.NAMES, arrays, strict=True)}
    return networks.Recipe(
        data=lambda: data,
        build=build,
        optimiser=lambda p: torch.optim.SGD(p, lr=0.05),
        l2=1e-2,
        epochs=1,
        batch=5,
        queries=2,
        exact=reference.Plan(batch=10, together=1, tolerance=1e-9),
    )


def dense_scores(problem):
    """(1/n) g_q . (G + damping)^-1 g_i with G from the whole Jacobian."""
    flat = reference.Flat(problem, torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs = flat(flat.theta, problem.inputs)
        rows = torch.func.jacrev(lambda t: flat(t, problem.inputs))(flat.theta)
    p = torch.softmax(outputs.flatten(0, -2), -1)
    rows = rows.reshape(*p.shape, -1)
    bend = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    matrix = torch.einsum("nap,nab,nbq->pq", rows, bend, rows) / len(p)
    matrix.diagonal().add_(problem.damping)
    pairs = ((problem.query_inputs, problem.query_labels), (problem.inputs, problem.labels))
    asked, given = (reference.gradients(problem, flat, *pair) for pair in pairs)
    return asked @ torch.linalg.solve(matrix, given.T) / len(problem.inputs)


@pytest.mark.parametrize("kind", ["perceptron", "transformer"])
def test_task_protocol_and_reference(kind, monkeypatch, tmp_path):
    made = small_perceptron() if kind == "perceptron" else small_transformer(monkeypatch)
    task = recipe(made[:4], made[4])
    task.prepare(tmp_path)
    problem = task.load(tmp_path).to(torch.float64)
    assert problem.model()(problem.inputs).dtype == torch.float64
    assert problem.losses(problem.model()(problem.inputs), problem.labels).shape == (25,)
    assert len(problem.first(3).query_inputs) == 3
    wanted = dense_scores(problem.first(2)).numpy()
    assert task.convergence(tmp_path)["residual"] < 1e-8
    assert np.allclose(task.truth(tmp_path), wanted, rtol=1e-6, atol=1e-9 * abs(wanted).max())


def test_reference_goes_on_where_it_was_left(tmp_path):
    made = small_perceptron()
    task = recipe(made[:4], made[4])
    task = replace(task, exact=replace(task.exact, minutes=0.0))
    task.prepare(tmp_path)
    assert task.convergence(tmp_path)["products"] == 0
    task.refine(tmp_path, minutes=1.0)
    assert task.convergence(tmp_path)["residual"] < 1e-8


def test_reference_of_another_damping_is_made_again(tmp_path):
    made = small_perceptron()
    task = recipe(made[:4], made[4])
    task.prepare(tmp_path)
    stronger = replace(task, damping=0.5)
    stronger.prepare(tmp_path)
    assert stronger.convergence(tmp_path)["damping"] == 0.5
    problem = stronger.load(tmp_path).to(torch.float64)
    wanted = dense_scores(problem.first(2)).numpy()
    assert np.allclose(stronger.truth(tmp_path), wanted, rtol=1e-6, atol=1e-9 * abs(wanted).max())


def test_every_network_task_has_the_protocol():
    for name in set(contenders.CONTENDERS) - {"softmax", "tiny"}:
        module = importlib.import_module(f"benchmarks.{name}")
        network = module.RECIPE.build()
        assert sum(p.numel() for p in network.parameters()) == module.ABOUT["parameters"]
        for needed in ("TITLE", "prepare", "load", "truth", "convergence"):
            assert hasattr(module, needed)


def test_contenders_rows_are_unique():
    for rows in contenders.CONTENDERS.values():
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)
        assert names[0] == contenders.FLOOR
