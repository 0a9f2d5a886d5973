"""Small slices of the experiments on real data, and the page made from the stored results."""

import dataclasses

import numpy as np
import pytest

from reproduce import fig2_logistic
from reproduce.experiment import RESULTS, Experiment, Findings, Steps, conduct
from reproduce.page import PAGE, page, records


@pytest.fixture(scope="module")
def figure_2(data_folder):
    del data_folder
    small = dataclasses.replace(fig2_logistic.Settings(), n=2000, stride=6, removals=40)
    return fig2_logistic.run(small, Steps()).values


def test_figure_2_on_a_slice(figure_2):
    """r and slope of exact scores against real refits, for influential and random removals."""
    exact = figure_2["methods"]["exact"]
    for found in exact["agreement"].values():
        assert found["r"] > 0.999
        assert 0.97 < found["slope"] < 1.1
    assert abs(exact["sum_of_scores"]) < 1e-6


def test_stochastic_scores_on_a_slice(figure_2):
    found = {
        name: one["agreement"]["most influential"]["r"] for name, one in figure_2["methods"].items()
    }
    assert found["lissa (25, 5000, 10)"] > 0.98
    assert found["lissa (default)"] > max(0.995, found["lissa (25, 5000, 10)"])


@dataclasses.dataclass(frozen=True)
class Count:
    n: int = 3


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = []

    def run(settings, steps):
        def step(i):
            made.append(i)
            if len(made) == 2:
                raise KeyboardInterrupt
            return {"square": i * i}

        total = sum(int(steps.once(f"{i}", lambda i=i: step(i))["square"]) for i in range(3))
        drawing, _ = fig2_logistic.panels(1)
        return Findings({"total": total, "array": np.arange(2)}, [], [], drawing)

    experiment = Experiment("counting", "Nowhere", "counts", Count(), run)
    with pytest.raises(KeyboardInterrupt):
        conduct(experiment, tmp_path)
    record = conduct(experiment, tmp_path)
    assert made == [0, 1, 1, 2]
    assert record["values"]["total"] == 5
    assert record["resumed"]
    assert (tmp_path / "counting.png").stat().st_size > 1000
    conduct(experiment, tmp_path)
    assert made == [0, 1, 1, 2, 0, 1, 2]


def test_the_page_is_what_the_stored_results_say():
    assert PAGE.read_text() == page(records())
    for record in records():
        assert (RESULTS / f"{record['name']}.png").exists()
