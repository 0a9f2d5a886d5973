"""Intervals of what-ifs: the bounds by their definition, what they rest on, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from benchmarks import coverage
from tests.cases import CASES, LINEAR_CASES, as_reference
from tests.test_influence import front, measures, ridge_problem
from upweight import errors, reference
from upweight.calibration import LEAST, bounds
from upweight.data import Data
from upweight.meaning import Meaning
from upweight.outcomes import Asked, Outcomes
from upweight.retraining import Refit, Trials, Truth

MEANING = Meaning("loss", "nats", 1)


def naive(predicted, actual, sizes, new, size):
    """The interval of one query, by its definition."""
    u = len(predicted)
    typical = (
        (sum(p * p / k for p, k in zip(predicted, sizes, strict=True)) + new * new / size) / (u + 1)
    ) ** 0.5
    errors = sorted(
        (1 if p >= 0 else -1) * (a - p) / (abs(p) + typical * k**0.5)
        for p, a, k in zip(predicted, actual, sizes, strict=True)
    )
    if u >= 19:
        place = int(np.ceil(0.95 * (u + 1) - 1e-9))
        least, most = errors[u - place], errors[place - 1]
    else:
        most = sorted(map(abs, errors))[int(np.ceil(0.9 * (u + 1) - 1e-9)) - 1]
        least = -most
    scale, sign = abs(new) + typical * size**0.5, 1 if new >= 0 else -1
    return sorted([new + sign * least * scale, new + sign * most * scale])


def drawn(u, q=3, seed=0):
    draw = np.random.default_rng(seed)
    predicted = draw.normal(size=(q, u))
    actual = 1.4 * predicted + 0.3 * draw.normal(size=(q, u))
    return predicted, actual, draw.integers(1, 9, u)


@pytest.mark.parametrize("u", [9, 10, 18, 19, 20, 39, 60])
def test_bounds_are_their_definition(u):
    predicted, actual, sizes = drawn(u + 1)
    predicted[0, 3] = 0
    new = predicted[:, -1]
    low, high = bounds(
        predicted[:, :-1], actual[:, :-1], sizes[:-1], new=new, size=float(sizes[-1])
    )
    for q in range(3):
        wanted = naive(predicted[q, :-1], actual[q, :-1], sizes[:-1], new[q], sizes[-1])
        np.testing.assert_allclose([low[q], high[q]], wanted, rtol=1e-12)


@pytest.mark.parametrize(("u", "outside"), [(9, 1), (18, 1), (19, 2), (39, 4), (49, 4)])
def test_of_exchangeable_changes_exactly_so_many_are_outside(u, outside):
    """Each of u + 1 changes in turn is the new one: the guarantee, without any distribution."""
    predicted, actual, sizes = drawn(u + 1, q=5)
    count = np.zeros(5, dtype=int)
    for new in range(u + 1):
        rest = np.arange(u + 1) != new
        low, high = bounds(
            predicted[:, rest],
            actual[:, rest],
            sizes[rest],
            new=predicted[:, new],
            size=float(sizes[new]),
        )
        count += (actual[:, new] < low) | (actual[:, new] > high)
    assert (count == outside).all()


def test_predictions_of_nothing_have_intervals_of_what_happened():
    actual = np.arange(1.0, 10.0)[None]
    low, high = bounds(np.zeros((1, 9)), actual, np.ones(9), new=np.zeros(1), size=1.0)
    assert (low[0], high[0]) == (-9.0, 9.0)


@pytest.fixture(scope="module")
def problem():
    """A fitted softmax model, queries, and the truth of 24 groups."""
    torch.manual_seed(3)
    x, y = torch.randn(30, 4).double(), torch.randint(3, (30,))
    objective = uw.Objective(nn.Linear(4, 3).double(), "cross_entropy", l2=0.3)
    minimum = reference.train(*as_reference(uw.Risk(objective, Data.of((x, y)))))
    named = dict(objective.model.named_parameters())
    with torch.no_grad():
        for name, value in objective.space.unflatten(minimum).items():
            named[name].copy_(value)
    queries = Data.of((torch.randn(3, 4).double(), torch.tensor([0, 1, 2])), ids=["a", "b", "c"])
    groups = [np.random.default_rng(s).choice(30, 2 + s % 4, replace=False) for s in range(24)]
    inf = uw.Influence(objective, (x, y))
    return inf, queries, inf.retrain(queries, Trials.without(groups, 30, [0]), Refit())


def fresh(problem, **settings):
    inf, queries, truth = problem
    return uw.Influence(inf.objective, inf.data, **settings), queries, truth


def some(truth, rows):
    rows = np.asarray(rows)
    return replace(
        truth, trials=truth.trials.take(rows), measured=truth.measured[rows], failures={}
    )


def test_what_a_calibration_rests_on(problem):
    """Predictions of both orders and what happened, each by a naive loop."""
    inf, queries, truth = fresh(problem)
    found = inf.calibrate(queries, truth)
    naive_problem, theta = as_reference(inf.risk)
    asked = measures(inf.risk, queries)
    scores = inf.explain(queries).values
    for u, gone in enumerate(truth.trials.gone):
        ids = np.flatnonzero(gone).tolist()
        np.testing.assert_allclose(
            found.predicted.first[:, u], scores[:, ids].sum(1), rtol=1e-9, atol=1e-13
        )
        refitted = reference.train(naive_problem.without(ids), theta)
        step = theta + reference.newton_step(naive_problem, theta, ids, 0.0)
        for row, ask in enumerate(asked):
            assert found.outcomes.actual[row, u] == pytest.approx(
                float(ask(refitted) - ask(theta)), rel=1e-6
            )
            assert found.predicted.second[row, u] == pytest.approx(
                float(ask(step) - ask(theta)), rel=1e-7
            )
    assert found.order == "second"
    assert found.outcomes.words == "this model"
    assert found.slope == pytest.approx(1, abs=0.1)
    table = found.table()
    assert table["changes"].tolist() == [24] * 3
    assert (table["mean_error"] < 0.1 * table["mean_change"]).all()
    assert "refits" in repr(found)


def test_an_interval_is_that_of_the_bounds(problem):
    inf, queries, truth = fresh(problem)
    alone = inf.whatif(on=queries, remove=[1, 5, 7])
    assert np.isnan(alone.low).all()
    assert "nothing was retrained" in alone.notes[-1]
    assert "low" not in alone.table().columns
    known = inf.calibrate(queries, truth)
    found = inf.whatif(on=queries, remove=[1, 5], reweight={7: 0.0})
    low, high = bounds(
        known.predicted.second,
        known.outcomes.actual,
        truth.trials.gone.sum(1),
        new=found.second,
        size=3.0,
    )
    np.testing.assert_array_equal(found.low, low)
    np.testing.assert_array_equal(found.high, high)
    assert found.table()["low"].tolist() == low.tolist()
    assert "24 that were retrained" in found.notes[-1]


def test_to_first_order_where_no_factorisation_is_at_hand(problem):
    inf, queries, truth = fresh(problem, method=uw.CG(rtol=1e-10))
    known = inf.calibrate(queries, truth)
    assert known.order == "first"
    assert known.predicted.second is None
    # What first order leaves out, the interval holds.
    assert known.slope > 1.1
    found = inf.whatif(on=queries, remove=[1, 5, 7])
    assert found.second is None
    low, high = bounds(
        known.predicted.first,
        known.outcomes.actual,
        truth.trials.gone.sum(1),
        new=found.change,
        size=3.0,
    )
    np.testing.assert_array_equal(np.stack([found.low, found.high]), np.stack([low, high]))


def test_a_queries_interval_is_its_own(problem):
    """Some of the queries, in another order, have the same intervals."""
    inf, queries, truth = fresh(problem)
    inf.calibrate(queries, truth)
    whole = inf.whatif(on=queries, remove=[1, 5])
    part = inf.whatif(on=queries.take(torch.tensor([2, 0])), remove=[1, 5])
    np.testing.assert_allclose(part.low, whole.low[[2, 0]], rtol=1e-9)
    few = fresh(problem)[0]
    few.calibrate(queries.take(torch.tensor([2])), truth)
    found = few.whatif(on=queries, remove=[1, 5])
    np.testing.assert_allclose(found.low, [np.nan, np.nan, whole.low[2]], rtol=1e-9)
    assert any("queries a, b: calibrated with other queries" in note for note in found.notes)


def test_other_rows_under_the_same_ids_have_no_interval(problem):
    inf, queries, truth = fresh(problem)
    inf.calibrate(queries, truth)
    other = Data.of((torch.randn(3, 4).double(), torch.tensor([0, 1, 2])), ids=["a", "b", "c"])
    assert np.isnan(inf.whatif(on=other, remove=[1, 5]).low).all()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"remove": [3]}, "1 examples are removed, and 2 to 5"),
        ({"remove": list(range(9))}, "9 examples are removed, and 2 to 5"),
        ({"remove": [1, 2], "relabel": {3: 0}}, "1 examples are given another label, and 0"),
        ({"relabel": {3: 0}}, "0 examples are removed"),
        ({"remove": [1, 2], "reweight": {4: 2.0}}, "only removals and new labels"),
        ({"replace": {4: (torch.ones(4).double(), 1)}}, "only removals and new labels"),
    ],
)
def test_changes_unlike_those_that_were_retrained_have_no_interval(problem, change, why):
    inf, queries, truth = fresh(problem)
    inf.calibrate(queries, truth)
    found = inf.whatif(on=queries, **change)
    assert np.isnan(found.low).all()
    assert np.isnan(found.high).all()
    assert any(why in note for note in found.notes), found.notes


def test_a_larger_change_than_any_that_was_retrained_has_no_interval(problem):
    inf, queries, truth = fresh(problem)
    known = inf.calibrate(queries, truth)
    scores = inf.explain(queries).values
    worst = np.argsort(-scores[1])[:5].tolist()
    found = inf.whatif(on=queries, remove=worst)
    assert found.change[1] > np.abs(known.predicted.first[1]).max()
    assert np.isnan(found.low[1])
    assert any("larger change is predicted" in note for note in found.notes)


def test_too_few_changes_are_refused_with_what_it_takes(problem):
    inf, queries, truth = fresh(problem)
    with pytest.raises(
        errors.InputError, match=r"at least 9 changes.*got 8.*Retrain 1 more, or 11"
    ):
        inf.calibrate(queries, some(truth, range(8)))
    assert "nothing was retrained" in inf.whatif(on=queries, remove=[1, 5]).notes[-1]
    inf.calibrate(queries, some(truth, range(LEAST)))
    assert np.isfinite(inf.whatif(on=queries, remove=[4, 5]).low).any()


def test_a_trial_that_changes_nothing_is_refused(problem):
    inf, queries, truth = fresh(problem)
    gone = truth.trials.gone.copy()
    gone[4] = False
    idle = replace(truth, trials=Trials("groups", gone, truth.trials.seeds))
    with pytest.raises(errors.InputError, match="removes and relabels nothing"):
        inf.calibrate(queries, idle)


def test_failed_trainings_are_left_out_and_counted(problem):
    inf, queries, truth = fresh(problem)
    measured = truth.measured.copy()
    measured[[3, 7], 1] = np.nan
    lost = replace(truth, measured=measured, failures={3: "NaN", 7: "NaN"})
    known = inf.calibrate(queries, lost)
    assert len(known.outcomes) == 22
    assert "2 changes failed" in repr(known)
    np.testing.assert_array_equal(
        known.predicted.removed, np.delete(truth.trials.gone.sum(1), [3, 7])
    )


def test_a_truth_of_something_else_is_refused(problem):
    inf, queries, truth = fresh(problem)
    other = Data.of((torch.randn(3, 4).double(), torch.tensor([0, 1, 2])), ids=["a", "b", "c"])
    unknown = Data.of((torch.randn(1, 4).double(), torch.tensor([0])), ids=["z"])
    small = uw.Influence(inf.objective, inf.data.take(torch.arange(20)))
    margin = uw.Influence(
        uw.Objective(inf.objective.model, "cross_entropy", l2=0.3, measure="margin"), inf.data
    )
    for who, asked, why in (
        (inf, other, "another model, or of other queries with the same ids"),
        (inf, unknown, "'z' among them"),
        (small, queries, "of 30 training examples, the model of 20"),
        (margin, queries, "measured loss"),
    ):
        with pytest.raises(errors.InputError, match=why):
            who.calibrate(asked, truth)
    with pytest.raises(errors.InputError, match="baseline"):
        fresh(problem, method="euclidean")[0].calibrate(queries, truth)
    with pytest.raises(errors.InputError, match="ablation"):
        fresh(problem, method="no_train_loss")[0].calibrate(queries, truth)


def by_hand(own=None, at_hand=None):
    """Two queries, three changes and two seeds; what the second seed finds is doubled."""
    trials = Trials.without([[0], [1], [2]], 4, seeds=[5, 6])
    whole = np.array([[1.0, 2.0], [3.0, 4.0]])
    change = np.arange(1.0, 7.0).reshape(3, 2)
    measured = np.stack([whole[s] + change[u] * (1 + s) for u in range(3) for s in range(2)])
    return Truth(
        trials, np.array([7, 8]), measured, whole, np.array([5, 6]), MEANING, "by hand", {}, own,
        at_hand,
    )  # fmt: skip


def asked(ids=(7, 8), now=(1.0, 2.0)):
    return Asked(np.array(ids), np.array(now), MEANING, 4)


def test_outcomes_are_of_this_model_where_it_was_trained_again():
    change = np.arange(1.0, 7.0).reshape(3, 2)
    mean = Outcomes.of(by_hand(), asked())
    np.testing.assert_array_equal(mean.actual, 1.5 * change.T)
    assert mean.words == "the mean of 2 trainings"
    own = Outcomes.of(by_hand(5, np.array([1.0, 2.0])), asked())
    np.testing.assert_array_equal(own.actual, change.T)
    assert own.words == "this model"
    # Its own seed, but it gives another model.
    drifted = Outcomes.of(by_hand(6, np.array([1.0, 2.0])), asked())
    np.testing.assert_array_equal(drifted.actual, 1.5 * change.T)
    swapped = Outcomes.of(by_hand(), asked((8, 7), (2.0, 1.0)))
    np.testing.assert_array_equal(swapped.actual, 1.5 * change.T[::-1])


def test_a_truth_without_any_outcome_is_refused():
    nothing = replace(by_hand(), measured=np.full((6, 2), np.nan))
    with pytest.raises(errors.InputError, match="Every training"):
        Outcomes.of(nothing, asked())


def test_new_labels_are_calibrated_like_removals(problem):
    inf, queries, _ = fresh(problem)
    places = np.arange(12)
    old = inf.data.rows().targets.numpy()[places]
    trials = Trials.relabelled(places, (old + 1) % 3, 30, seeds=[0])
    truth = inf.retrain(queries, trials, Refit())
    known = inf.calibrate(queries, truth)
    assert known.order == "first"
    for place in places:
        wanted = inf.whatif(on=queries, relabel={int(place): int((old[place] + 1) % 3)}).change
        np.testing.assert_allclose(known.predicted.first[:, place], wanted, rtol=1e-9)
    found = inf.whatif(on=queries, relabel={20: 1}, retrain=Refit())
    assert np.isfinite(found.low).any()
    assert np.isnan(inf.whatif(on=queries, remove=[20]).low).all()


@pytest.mark.parametrize("removal", ["mean", "sum"])
def test_the_second_order_of_a_ridge_fit_is_the_refit(removal):
    x, y, model = ridge_problem()
    objective = uw.Objective(model, "mean_squared_error", l2=0.1, removal=removal)
    asked = (x[:5] + 1, y[:5])
    gone = [3, 8, 21]
    found = uw.Influence(objective, (x, y)).whatif(on=asked, remove=gone)
    share = torch.full((30,), 1 / 30, dtype=torch.float64)
    share[gone] = 0
    share = share / share.sum() if removal == "mean" else share
    after = (asked[0] @ reference.ridge(x, y, 0.1, share) - asked[1]) ** 2
    before = (asked[0] @ model.weight[0].detach() - asked[1]) ** 2
    np.testing.assert_allclose(found.second, after - before, rtol=1e-10, atol=1e-12)
    gap = np.abs(found.change - found.second).sum() / np.abs(found.second).sum()
    assert any(f"off the second by {gap:.1%}" in note for note in found.notes)


@pytest.mark.parametrize("name", ["softmax", "logistic", "mlp", "softmax weighted"])
def test_the_second_order_is_that_of_group_effects(name):
    risk = next(c for c in CASES if c.name == name).risk()
    inf, queries = front(risk, damping=20.0), risk.data.take(torch.arange(3))
    found = inf.whatif(on=queries, remove=[0, 2, 5])
    wanted = inf.group_effects([[0, 2, 5]], on=queries)
    np.testing.assert_allclose(found.second, wanted.second[:, 0], rtol=1e-10)
    assert inf.whatif(on=queries, relabel={0: 1}).second is None
    assert inf.whatif(on=queries, remove=[0], reweight={2: 2.0}).second is None
    for method in ("cg", "ekfac", "no_hessian"):
        settings = {"damping": 20.0} if method != "no_hessian" else {}
        assert front(risk, method, **settings).whatif(on=queries, remove=[0]).second is None


def test_nothing_left_to_train_on_is_refused():
    risk = LINEAR_CASES[0].risk()
    with pytest.raises(errors.DataError, match="nothing is left"):
        front(risk).whatif(on=risk.data, remove=range(7))


def test_a_what_if_beside_what_really_happens(problem):
    inf, queries, _ = fresh(problem)
    naive_problem, theta = as_reference(inf.risk)
    gone = [2, 11, 17]
    found = inf.whatif(on=queries, remove=gone, retrain=Refit())
    refitted = reference.train(naive_problem.without(gone), theta)
    wanted = [float(ask(refitted) - ask(theta)) for ask in measures(inf.risk, queries)]
    np.testing.assert_allclose(found.actual, wanted, rtol=1e-6)
    np.testing.assert_array_equal(found.table()["actual_change"], found.actual)
    assert any(note.startswith("actual change: refits") for note in found.notes)
    assert inf.whatif(on=queries, remove=gone).actual is None


def test_a_new_label_beside_what_really_happens(problem):
    inf, queries, _ = fresh(problem)
    found = inf.whatif(on=queries, relabel={4: 2}, retrain=Refit())
    x, y = inf.data.rows().inputs[0], inf.data.rows().targets.clone()
    y[4] = 2
    other = uw.Risk(inf.objective, Data.of((x, y)))
    changed, theta = as_reference(other)
    refitted = reference.train(changed, theta)
    wanted = [float(ask(refitted) - ask(theta)) for ask in measures(inf.risk, queries)]
    np.testing.assert_allclose(found.actual, wanted, rtol=1e-6)


def test_what_cannot_be_retrained_is_refused(problem):
    inf, queries, _ = fresh(problem)
    for change in ({"reweight": {3: 2.0}}, {"replace": {3: (torch.ones(4).double(), 1)}}):
        with pytest.raises(errors.InputError, match="removes examples and gives others new labels"):
            inf.whatif(on=queries, retrain=Refit(), **change)
    with pytest.raises(errors.InputError, match="cannot give examples other labels"):
        inf.whatif(on=queries, relabel={3: 0}, retrain=lambda kept, seed: inf.objective.model)


def test_a_function_that_trains_is_called_with_and_without(problem):
    inf, queries, _ = fresh(problem)
    calls = []

    def train(kept, seed):
        calls.append((len(kept), seed))
        torch.manual_seed(seed)
        return nn.Linear(4, 3).double().eval()

    found = inf.whatif(on=queries, remove=[0, 1], retrain=train)
    np.testing.assert_array_equal(found.actual, 0)
    assert {size for size, _ in calls} == {28, 30}
    assert {seed for _, seed in calls} == {0}
    assert any("does not give the model at hand" in note for note in found.notes)


@pytest.mark.parametrize(
    ("model", "kind", "experiments"),
    [
        ("softmax, first order", "one example", 12),
        ("logistic", "groups of 2 to 14", 6),
        ("network", "one example", 6),
    ],
)
def test_intervals_hold_nine_of_ten(model, kind, experiments):
    """A small part of ``benchmarks/coverage.py``, whose results are stored."""
    total = coverage.Tally(0, 0, [])
    for seed in range(100, 100 + experiments):
        for found, actual in coverage.experiment(model, kind, seed=seed, changes=24):
            total.add(found, actual, 1.0)
    assert total.asked > 300
    assert 0.85 <= total.held / total.asked <= 0.95


def test_stored_coverage_is_that_of_the_intervals():
    """All rows of the stored results, of changes drawn as those that calibrate."""
    if not coverage.RESULTS.exists():
        pytest.skip("not measured yet: python -m benchmarks.coverage")
    rows = json.loads(coverage.RESULTS.read_text())["rows"]
    assert {row["model"] for row in rows} == set(coverage.PROBLEMS)
    drawn = [row for row in rows if not row["changes"].startswith("chosen")]
    assert len(drawn) == 19
    for row in drawn:
        assert 0.85 <= row["coverage"] <= 0.95, row
        assert row["with_interval"] > 0.75
