"""The benchmark harness on a task of three queries, with a contender that needs no peer."""

import json
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from benchmarks import contenders, harness, report
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

    if contender.environment:
        try:
            harness.interpreter(contender)
        except FileNotFoundError as error:
            return {"failed": str(error)}
    cost, scores = measure.measure(contender, Tiny())
    if scores is not None:
        np.save(harness.scratch(task) / f"{contender.name}.npy", scores)
    return cost | {"cpu_s": 0.5 * (contender.queries or 3), "versions": {"python": "3"}}


def test_results_and_table_are_well_formed(task):
    harness.update(task, "tiny", list(contenders.CONTENDERS["tiny"]), (1, 4.0))
    stored = json.loads((harness.RESULTS / "tiny.json").read_text())["contenders"]
    assert list(stored) == ["floor", "good", "few", "absent"]
    assert len(stored["floor"]["runs"]) == 3
    assert "relative_error" not in stored["floor"]
    assert stored["good"]["relative_error"] == stored["good"]["worst_query_error"] == 0.5
    assert stored["few"]["cpu_s"] == 1.5  # 1.0 for two queries, scaled to three
    assert "setup_peers" in stored["absent"]["failed"]
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
    import torch

    from benchmarks import softmax

    generator = torch.Generator().manual_seed(0)
    x, q = torch.rand(40, 6, generator=generator), torch.rand(3, 6, generator=generator)
    y, z = torch.arange(40) % 10, torch.arange(3)
    problem = softmax.Problem(x, y, q, z, torch.randn(10, 6, generator=generator).double())
    from upweight import Influence, Objective

    objective = Objective(problem.model(torch.float64), "cross_entropy", l2=0.01, removal="sum")
    scores = Influence(objective, (x.double(), y)).explain((q.double(), z))
    assert np.allclose(np.asarray(scores), softmax.exact_scores(problem).numpy(), rtol=1e-9)
