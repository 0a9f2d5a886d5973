"""Metrics of evidence against naive loops, SciPy and scikit-learn; ties, gaps and refusals."""

import itertools

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from upweight import evaluation as ev
from upweight.errors import InputError
from upweight.evaluation.agreement import agreement
from upweight.evaluation.ranks import sampled_rank_correlations
from upweight.evaluation.resampling import LEAST, Resamples, Sampled
from upweight.retraining import Trials

close = np.testing.assert_allclose


def tied(*shape, seed=0, kinds=4):
    """Few distinct values, so that most are tied."""
    return np.random.default_rng(seed).integers(0, kinds, shape).astype(float)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


few_values = arrays.arrays(
    np.float64,
    arrays.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=7),
    elements=st.sampled_from([-1.5, -0.0, 0.0, 1e-300, 0.25, 7.0]),
)


# Ranks and correlations


@given(few_values)
@settings(max_examples=100, deadline=None)
def test_midranks_are_scipys(values):
    close(ev.midranks(values), scipy.stats.rankdata(values, axis=-1), rtol=0)


@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_correlations_of_rows_are_scipys(count, rows, seed):
    x, y = tied(rows, count, seed=seed), tied(rows, count, seed=seed + 1) * 1e-170
    for ours, theirs in (
        (ev.correlations, scipy.stats.pearsonr),
        (ev.rank_correlations, scipy.stats.spearmanr),
    ):
        found = ours(x, y)
        for row in range(rows):
            if np.ptp(x[row]) == 0 or np.ptp(y[row]) == 0:
                assert np.isnan(found[row])
            else:
                # Pearson's r does not see the unit; SciPy's would underflow.
                wanted = theirs(x[row], y[row] * 1e170).statistic
                close(found[row], wanted, rtol=1e-9, atol=1e-12)


def test_a_constant_row_is_not_a_rounded_one():
    row = np.full(3, 0.1)
    assert np.isnan(ev.correlations(row, np.array([1.0, 2.0, 4.0])))
    assert np.isnan(ev.pearson(row, np.array([1.0, 2.0, 4.0])))


@given(st.integers(2, 9), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_ranks_of_samples_are_ranks_of_what_was_drawn(count, seed):
    x, y = tied(count, seed=seed), tied(count, seed=seed + 1)
    counts = np.random.default_rng(seed).integers(0, 3, (5, count))
    counts[:, 0] += 1
    found = sampled_rank_correlations(x, y, counts)
    for row, often in zip(found, counts, strict=True):
        wanted = ev.rank_correlations(np.repeat(x, often), np.repeat(y, often))
        close(row, wanted, rtol=1e-12, atol=1e-14)


# Intervals


@pytest.mark.parametrize("value", [-0.4, 0.0, 0.7])
def test_the_interval_moves_with_the_bias_of_the_draws(value):
    draws = normal(401)
    shift = 2 * scipy.stats.norm.ppf((draws < value).mean())
    shares = scipy.stats.norm.cdf(shift + scipy.stats.norm.ppf([0.025, 0.975]))
    found = Sampled(value, draws).estimate()
    close((found.low, found.high), np.quantile(draws, shares), rtol=1e-9)
    assert found.width == pytest.approx(found.high - found.low)


def test_draws_that_do_not_vary_are_left_out_of_the_interval():
    draws = np.array([np.nan, 0.1, 0.2, 0.3])
    assert Sampled(0.2, draws).estimate() == Sampled(0.2, draws[1:]).estimate()
    unknown = Sampled(np.nan, np.full(4, np.nan)).estimate()
    assert np.isnan([unknown.value, unknown.low, unknown.high]).all()


def test_samples_hold_as_many_as_there_are():
    found = Resamples.two_way(9, 4, draws=50, seed=3)
    assert (found.trials.sum(1) == 9).all()
    assert (found.queries.sum(1) == 4).all()
    assert found.trials.std() > 0.8
    again = Resamples.two_way(9, 4, draws=50, seed=3)
    assert (again.trials == found.trials).all()
    assert (again.queries == found.queries).all()


def test_differences_are_of_the_same_samples():
    one, other = Sampled(0.5, np.array([0.4, 0.6])), Sampled(0.2, np.array([0.3, 0.1]))
    found = one.minus(other)
    close((found.value, *found.draws), (0.3, 0.1, 0.5))
    with pytest.raises(InputError, match="same samples"):
        one.minus(Sampled(0.1, np.zeros(3)))


def pairs_of(x, y, resamples, sample):
    """The pairs of one bootstrap sample, written out."""
    trials = np.repeat(np.arange(x.shape[1]), resamples.trials[sample])
    queries = np.repeat(np.arange(x.shape[0]), resamples.queries[sample])
    return x[np.ix_(queries, trials)].ravel(), y[np.ix_(queries, trials)].ravel()


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e6])
def test_pooled_r_and_slope_of_samples_are_those_of_what_was_drawn(unit):
    x = 3.0 + normal(4, 10)
    y = unit * (0.5 * x + normal(4, 10, seed=1) - 40)
    resamples = Resamples.two_way(10, 4, draws=20)
    r, size = ev.pooled(x, y, resamples)
    close(r.value, scipy.stats.pearsonr(x.ravel(), y.ravel()).statistic, rtol=1e-9)
    for sample in range(20):
        px, py = pairs_of(x, y, resamples, sample)
        close(r.draws[sample], scipy.stats.pearsonr(px, py).statistic, rtol=1e-8)
        close(size.draws[sample], scipy.stats.linregress(px, py).slope, rtol=1e-8)


def test_samples_in_which_nothing_varies_have_no_r():
    x = np.zeros((1, 9))
    x[0, 0] = 0.1
    resamples = Resamples.two_way(9, 1, draws=200)
    r, size = ev.pooled(x, x, resamples)
    without = resamples.trials[:, 0] == 0
    assert 0 < without.sum() < 200
    assert np.isnan(r.draws[without]).all()
    assert np.isnan(size.draws[without]).all()
    close(r.draws[~without], 1)


@pytest.mark.parametrize("shape", [(7,), (3, 9)])
def test_agreement_resamples_removals_as_a_loop_does(shape):
    x = normal(*shape)
    y = 0.7 * x + 0.3 * normal(*shape, seed=1)
    found = agreement(x, y, draws=300, seed=4)
    rows = np.atleast_2d(x), np.atleast_2d(y)
    generator, drawn = np.random.default_rng(4), []
    for _ in range(300):
        pick = generator.integers(0, shape[-1], shape[-1])
        px, py = (row[:, pick].ravel() for row in rows)
        drawn.append(
            (
                scipy.stats.pearsonr(px, py).statistic,
                scipy.stats.linregress(px, py).slope,
                scipy.stats.spearmanr(px, py).statistic,
            )
        )
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    close(found.r_interval, (low[0], high[0]), rtol=1e-9)
    close(found.slope_interval, (low[1], high[1]), rtol=1e-9)
    close(found.rank_interval, (low[2], high[2]), rtol=1e-9)
    close(found.rank, scipy.stats.spearmanr(x.ravel(), y.ravel()).statistic, rtol=1e-12)
    assert found.count == x.size
    assert f"rank r = {found.rank:.4f}" in str(found)


# The linear datamodeling score


def test_group_effects_sum_the_scores_of_those_that_left():
    scores, gone = normal(3, 8), normal(5, 8, seed=1) > 0
    found = ev.group_effects(scores, gone)
    for q, m in itertools.product(range(3), range(5)):
        assert found[q, m] == pytest.approx(sum(scores[q, i] for i in range(8) if gone[m, i]))
    with pytest.raises(InputError, match=r"\[3, 8\] and \[5, 7\]"):
        ev.group_effects(scores, gone[:, :7])


def test_the_score_is_the_mean_of_spearman_over_queries_also_in_every_sample():
    x, y = tied(5, 12, kinds=7), tied(5, 12, seed=1, kinds=5)
    resamples = Resamples.two_way(12, 5, draws=30)
    found = ev.datamodeling_score(x, y, resamples=resamples)
    wanted = [scipy.stats.spearmanr(*pair).statistic for pair in zip(x, y, strict=True)]
    close(found.per_query, wanted, rtol=1e-9, atol=1e-12)
    close(found.sampled.value, np.mean(wanted), rtol=1e-9)
    for sample, (often, asked) in enumerate(zip(resamples.trials, resamples.queries, strict=True)):
        each = [
            scipy.stats.spearmanr(np.repeat(a, often), np.repeat(b, often)).statistic
            for a, b in zip(x, y, strict=True)
        ]
        close(found.sampled.draws[sample], np.average(each, weights=asked), rtol=1e-9, atol=1e-12)
    assert (found.trials, found.failed, found.constant) == (12, 0, 0)
    assert (found.query_intervals[:, 0] < found.per_query).all()
    assert (found.per_query < found.query_intervals[:, 1]).all()


def test_failed_trials_and_constant_queries_are_left_out_and_counted():
    x, y = normal(3, 11), normal(3, 11, seed=1)
    y[1, 4] = np.nan
    x[2] = 7.0
    found = ev.datamodeling_score(x, y)
    kept = np.delete(np.arange(11), 4)
    clean = ev.datamodeling_score(x[:2, kept], y[:2, kept])
    close(found.per_query[:2], clean.per_query, rtol=1e-12)
    assert np.isnan(found.per_query[2])
    assert found.sampled.value == pytest.approx(clean.sampled.value, rel=1e-12)
    assert (found.trials, found.failed, found.constant) == (10, 1, 1)
    assert "1 failed, 1 queries do not vary" in str(found)
    nothing = ev.datamodeling_score(np.ones((2, 9)), y[:2, kept[:9]])
    assert np.isnan(nothing.estimate.value)
    assert nothing.constant == 2


def test_too_few_subsets_say_how_many_it_takes():
    x, y = normal(2, LEAST + 1), normal(2, LEAST + 1, seed=1)
    y[:, :3] = np.nan
    with pytest.raises(InputError, match=rf"at least {LEAST} .*got {LEAST - 2}\. Get 2 more"):
        ev.datamodeling_score(x, y)
    with pytest.raises(InputError, match="samples are of 9 trials"):
        ev.datamodeling_score(x[:, :8], x[:, :8], resamples=Resamples.two_way(9, 2))
    with pytest.raises(InputError, match=r"\[2, 9\] and \[9, 2\]"):
        ev.datamodeling_score(x, y.T)


@pytest.mark.parametrize("rho", [0.1, 0.9])
def test_intervals_hold_the_true_value(rho):
    """Simulated truths: of 95 % intervals from few subsets, at least 90 % hold it."""
    generator, held, rounds = np.random.default_rng(0), 0, 100
    truth = 6 / np.pi * np.arcsin(rho / 2)
    for seed in range(rounds):
        x, noise = generator.normal(size=(2, 10, LEAST))
        y = rho * x + np.sqrt(1 - rho**2) * noise
        resamples = Resamples.two_way(LEAST, 10, draws=200, seed=seed)
        found = ev.datamodeling_score(x, y, resamples=resamples).estimate
        held += found.low <= truth <= found.high
    assert held >= 0.9 * rounds


# Removing what matters most


def test_top_groups_are_what_a_sort_would_take_and_make_trials():
    scores = tied(3, 9, kinds=5)
    groups = ev.top_groups(scores, [2, 4])
    assert [len(group) for group in groups] == [2, 2, 2, 4, 4, 4]
    for place, group in enumerate(groups):
        row = scores[place % 3]
        wanted = sorted(range(9), key=lambda i, row=row: (-row[i], i))[: len(group)]
        assert group.tolist() == wanted
    trials = Trials.without(groups, 9, seeds=[0, 1])
    assert trials.gone.sum(1).tolist() == [2] * 6 + [4] * 6
    for counts in ([], [0], [9]):
        with pytest.raises(InputError, match="between 1 and 8"):
            ev.top_groups(scores, counts)


def test_own_changes_are_those_of_the_query_that_was_meant():
    changes = normal(6, 3)
    found = ev.own_changes(changes, 3)
    for k, q in itertools.product(range(2), range(3)):
        assert found[k, q] == changes[3 * k + q, q]
    with pytest.raises(InputError, match="multiple of 4"):
        ev.own_changes(normal(6, 4), 4)


def test_removal_curves_are_means_over_queries_in_every_sample():
    changes = normal(2, 10)
    changes[1, 3] = np.nan
    found = ev.removal_curve([5, 20], changes, draws=40, seed=2)
    generator = np.random.default_rng(2)
    picks = generator.integers(0, 10, (40, 10))
    for point, row in zip(found.points, changes, strict=True):
        close(point.value, np.nanmean(row), rtol=1e-12)
        close(point.draws, np.nanmean(row[picks], axis=1), rtol=1e-12)
    assert found.queries.tolist() == [10, 9]
    assert found.failed.tolist() == [0, 1]
    assert [e.value for e in found.estimates] == [p.value for p in found.points]
    with pytest.raises(InputError, match="queries with an outcome, got 7"):
        ev.removal_curve([5], np.where(np.arange(10) < 3, np.nan, 1.0)[None])
    with pytest.raises(InputError, match=r"\[1, q\]"):
        ev.removal_curve([5], changes)


def test_brittleness_counts_right_predictions_that_flip():
    before, after = normal(30) + 0.5, normal(2, 30, seed=1)
    after[0, 5] = np.nan
    found = ev.brittleness([1, 2], before, after)
    for k in range(2):
        cases = [q for q in range(30) if before[q] > 0 and not np.isnan(after[k, q])]
        wanted = np.mean([after[k, q] <= 0 for q in cases])
        assert found.points[k].value == pytest.approx(wanted)
        assert found.queries[k] == len(cases)
    with pytest.raises(InputError, match=r"\[1, 30\]"):
        ev.brittleness([1], before, after)


# Wrong labels


@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_detection_is_sklearns_with_ties(count, kinds, seed):
    suspicion = tied(count, seed=seed, kinds=kinds)
    wrong = np.random.default_rng(seed).random(count) < 0.4
    wrong[:2] = [True, False]
    found = ev.detection(suspicion, wrong)
    close(found.auc, sklearn.metrics.roc_auc_score(wrong, suspicion), rtol=1e-12)
    wanted = sklearn.metrics.average_precision_score(wrong, suspicion)
    close(found.average_precision, wanted, rtol=1e-12)


def test_found_is_the_mean_over_all_orders_of_ties():
    suspicion = np.array([2.0, 1.0, 2.0, 1.0, 2.0, 0.0])
    wrong = np.array([True, False, False, True, False, True])
    curves = [
        np.cumsum([0, *wrong[list(order)]])
        for order in itertools.permutations(range(6))
        if (np.diff(suspicion[list(order)]) <= 0).all()
    ]
    assert len(curves) == 12
    found = ev.detection(suspicion, wrong)
    close(found.found, np.mean(curves, axis=0), rtol=1e-12)
    for budget in range(1, 7):
        close(found.precision(budget), np.mean(curves, axis=0)[budget] / budget)
        close(found.recall(budget), np.mean(curves, axis=0)[budget] / 3)
    for budget in (0, 7):
        with pytest.raises(InputError, match="between 1 and 6"):
            found.precision(budget)


@pytest.mark.parametrize(
    ("suspicion", "wrong", "says"),
    [
        (np.ones(3), np.ones(3, bool), "3 of 3 examples are wrong"),
        (np.ones(3), np.zeros(3, bool), "0 of 3"),
        (np.array([1.0, np.nan]), np.array([True, False]), "1 suspicions are NaN"),
        (np.ones(3), np.ones(2, bool), r"\[3\] and bool\[2\]"),
        (np.ones(2), np.array([1, 0]), "int64"),
    ],
)
def test_what_cannot_be_ranked_is_refused(suspicion, wrong, says):
    with pytest.raises(InputError, match=says):
        ev.detection(suspicion, wrong)


# Two methods, and many draws of one


def overlap(one, other, k):
    tops = [set(sorted(range(len(r)), key=lambda i: (-abs(r[i]), i))[:k]) for r in (one, other)]
    return len(tops[0] & tops[1]) / k


def test_similarity_is_a_loop_over_rows():
    one, other = normal(4, 20), normal(4, 20, seed=1) + normal(4, 20)
    other[3] = 2.0
    found = ev.similarity(one, other, k=5)
    for q in range(3):
        close(found.pearson[q], scipy.stats.pearsonr(one[q], other[q]).statistic, rtol=1e-10)
        close(found.spearman[q], scipy.stats.spearmanr(one[q], other[q]).statistic, rtol=1e-10)
    for q in range(4):
        assert found.overlap[q] == overlap(one[q], other[q], 5)
        error = np.sqrt(sum((one[q] - other[q]) ** 2) / sum(other[q] ** 2))
        close(found.relative_error[q], error, rtol=1e-12)
    assert np.isnan([found.pearson[3], found.spearman[3]]).all()
    assert found.constant == 1
    assert np.isnan(ev.similarity(one, np.zeros((4, 20))).relative_error).all()
    for k in (0, 21):
        with pytest.raises(InputError, match="between 1 and 20"):
            ev.similarity(one, other, k=k)
    with pytest.raises(InputError, match=r"\[4, 20\] and \[3, 20\]"):
        ev.similarity(one, other[:3])


def test_stability_is_a_loop_over_pairs_of_draws():
    scores = tied(4, 3, 15, kinds=9) + normal(3, 15)
    scores[2, 2] = 1.0
    found = ev.stability(scores, k=4)
    for q in range(3):
        pairs = list(itertools.combinations(scores[:, q], 2))
        close(found.overlap[q], np.mean([overlap(*pair, 4) for pair in pairs]), rtol=1e-12)
        spread = scores[:, q].var(0, ddof=1).mean() / (scores[:, q].mean(0) ** 2).mean()
        close(found.spread[q], np.sqrt(spread), rtol=1e-12)
        if q < 2:
            wanted = np.mean([scipy.stats.pearsonr(*pair).statistic for pair in pairs])
            close(found.pearson[q], wanted, rtol=1e-10)
            wanted = np.mean([scipy.stats.spearmanr(*pair).statistic for pair in pairs])
            close(found.spearman[q], wanted, rtol=1e-10)
    assert np.isnan([found.pearson[2], found.spearman[2]]).all()
    assert found.constant == 1
    with pytest.raises(InputError, match="at least two draws"):
        ev.stability(scores[:1])
