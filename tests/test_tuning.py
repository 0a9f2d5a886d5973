"""Method and damping by evidence: scores by a loop, halves that do not see each other, refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import upweight as uw
from tests.cases import small_network
from upweight import errors
from upweight.data import Data
from upweight.evaluation import Estimate
from upweight.meaning import meaning_of
from upweight.retraining import Trials, Truth
from upweight.tuning import LEAST_CHANGES, Setting, Tuning

N, Q, U = 40, 4, 32


@pytest.fixture(scope="module")
def known():
    """A network, queries, and halves of its data."""
    torch.manual_seed(0)
    train = torch.randn(N, 3).double(), torch.arange(N) % 2
    queries = Data.of((torch.randn(Q, 3).double(), torch.arange(Q) % 2))
    return small_network(), train, queries, Trials.subsets(N, count=U, fraction=0.5, seeds=[0])


def influence(known, method="ggn", damping=0.05):
    model, train, *_ = known
    objective = uw.Objective(model, "cross_entropy", l2=0.001)
    return uw.Influence(objective, train, method=method, damping=damping)


def truth_of(known, values, noise=0.0, seed=1):
    """A truth in which scores ``[q, N]`` add up, but for noise."""
    queries, trials = known[2:]
    effects = trials.gone.astype(float) @ np.asarray(values, dtype=float).T
    spread = np.random.default_rng(seed).normal(size=effects.shape) * effects.std()
    meaning = meaning_of(influence(known).objective, "loss")
    return Truth(
        trials, queries.ids, effects + noise * spread, np.zeros((1, Q)), np.array([0]), meaning,
        "by hand", {},
    )  # fmt: skip


def spearman(one, other):
    """Without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return np.corrcoef(*ranks)[0, 1]


def lds(predicted, actual):
    return np.mean([spearman(*pair) for pair in zip(predicted, actual, strict=True)])


def test_every_score_is_that_of_a_loop(known):
    """Of methods and dampings, on the half that chooses and on the other."""
    inf, queries = influence(known), known[2]
    truth = truth_of(known, influence(known, damping=0.001).explain(queries).values, 1.0)
    found = inf.tune(queries, truth, methods=["ekfac", "no_hessian"], dampings=[0.001, 1.0], seed=3)
    wanted = [("ggn", 0.05), ("ggn", 0.001), ("ggn", 1.0)]
    wanted += [("ekfac", 0.05), ("ekfac", 0.001), ("ekfac", 1.0), ("no_hessian", 0.0)]
    assert [(one.name, one.damping) for one in found.settings] == wanted
    chose, rest = np.array_split(np.random.default_rng(3).permutation(U), 2)
    gone, actual = truth.trials.gone, truth.changes().T
    scores = [
        influence(known, method, damping).explain(queries).values @ gone.T
        for method, damping in wanted
    ]
    values = [lds(one[:, chose], actual[:, chose]) for one in scores]
    np.testing.assert_allclose([one.value for one in found.scores], values, rtol=1e-12)
    assert found.best == int(np.argmax(values)) == 1
    held = [lds(one[:, rest], actual[:, rest]) for one in (scores[0], scores[1])]
    np.testing.assert_allclose([one.value for one in found.held_out], held, rtol=1e-12)
    assert found.gain.value == pytest.approx(held[1] - held[0], rel=1e-12)
    assert found.counts == (16, 16)
    table = found.table()
    assert table["LDS"].tolist() == [one.value for one in found.scores]
    assert table[""].tolist() == ["default", "best", *[""] * 5]


def test_the_settings_that_are_right_are_found_and_used(known):
    """What happens is what ggn with damping 0.001 says, and the default is far off."""
    queries = known[2]
    right = influence(known, damping=0.001)
    truth = truth_of(known, right.explain(queries).values, 0.1)
    inf = influence(known, damping=30.0)
    found = inf.tune(queries, truth, dampings=[0.001, 0.1])
    assert found.gained
    assert found.gain.low > 0
    assert (found.chosen.name, found.chosen.damping) == ("ggn", 0.001)
    assert "ahead by" in found.sentence
    after = inf.tuned(found)
    np.testing.assert_array_equal(after.explain(queries).values, right.explain(queries).values)
    assert after.damping == 0.001


def test_no_gain_is_said_and_the_default_kept(known):
    """What happens has nothing to do with any score: the best of many is so by chance."""
    inf, queries = influence(known), known[2]
    chance = np.random.default_rng(5).normal(size=(Q, N))
    found = inf.tune(queries, truth_of(known, chance))
    assert len(found.settings) == 10
    assert not found.gained
    assert found.chosen == found.settings[0]
    assert "No gain is shown" in found.sentence or "Nothing that was tried" in found.sentence
    assert inf.tuned(found).damping == 0.05


def test_the_best_of_the_choosing_half_is_not_judged_by_it(known):
    """Over many drawn truths, the score of the best is inflated where it was chosen, not beside."""
    inf, queries = influence(known), known[2]
    gaps, kept = [], []
    for seed in range(12):
        chance = np.random.default_rng(seed).normal(size=(Q, N))
        found = inf.tune(queries, truth_of(known, chance), methods=["no_hessian"], seed=seed)
        gaps.append(found.scores[found.best].value - found.scores[0].value)
        kept.append(found.gain.value)
    assert min(gaps) >= 0
    assert np.mean(gaps) > 0.02
    assert abs(np.mean(kept)) < 0.5 * np.mean(gaps)


def test_validated_answers_nothing_until_a_truth_has_chosen(known):
    queries = known[2]
    inf = influence(known, damping="validated")
    truth = truth_of(known, influence(known, damping=0.001).explain(queries).values)
    for ask in (
        lambda: inf.explain(queries),
        lambda: inf.whatif(on=queries, remove=[1]),
        inf.self_influence,
    ):
        with pytest.raises(errors.InputError, match=r"inf\.tune\(queries, truth\)"):
            ask()
    found = inf.tune(queries, truth, dampings=[0.001])
    # Where l2 is on every parameter, "auto" adds nothing.
    assert found.settings[0].damping == 0.0
    assert inf.tuned(found).explain(queries).provenance.damping == found.chosen.damping


def test_a_default_without_an_answer_is_said(known):
    """Without L2 and damping the Gauss-Newton matrix is singular."""
    model, train, queries, _ = known
    inf = uw.Influence(uw.Objective(model, "cross_entropy"), train, method="ggn")
    truth = truth_of(known, influence(known, damping=0.1).explain(queries).values)
    found = inf.tune(queries, truth, dampings=[0.1, 1.0])
    assert np.isnan(found.scores[0].value)
    assert [setting.damping for setting, _ in found.refused] == [0.0]
    assert "gives no answer" in found.sentence
    assert found.chosen.damping == 0.1
    assert "refused: ggn with damping 0" in repr(found)
    with pytest.raises(errors.NumericalError, match="No method gives an answer"):
        inf.tune(queries, truth, dampings=[0.0])


def test_failed_trainings_are_left_out(known):
    inf, queries = influence(known), known[2]
    truth = truth_of(known, inf.explain(queries).values, 0.3)
    measured = truth.measured.copy()
    measured[4:10] = np.nan
    lost = replace(truth, measured=measured, failures=dict.fromkeys(range(4, 10), "NaN"))
    assert inf.tune(queries, lost).counts == (13, 13)


def test_what_cannot_choose_is_refused(known):
    inf, queries = influence(known), known[2]
    truth = truth_of(known, inf.explain(queries).values)
    rows = np.arange(LEAST_CHANGES - 1)
    few = replace(truth, trials=truth.trials.take(rows), measured=truth.measured[rows])
    labels = Trials.relabelled(np.arange(U), np.zeros(U, dtype=int), N, seeds=[0])
    relabelled = replace(truth, trials=labels)
    other = Data.of((torch.randn(1, 3).double(), torch.tensor([0])), ids=["z"])
    for asked, given, why in (
        (queries, few, "takes 16 with an outcome, got 15. Retrain 1 more"),
        (queries, relabelled, "compared by removals"),
        (other, truth, "'z' among them"),
    ):
        with pytest.raises(errors.InputError, match=why):
            inf.tune(asked, given)
    for method, why in (("euclidean", "baseline"), ("relatif", "weighs training gradients")):
        with pytest.raises(errors.InputError, match=why):
            inf.tune(queries, truth, methods=[method])
    with pytest.raises(errors.InputError, match="finite numbers"):
        inf.tune(queries, truth, dampings=[-1.0])
    flat = replace(truth, measured=np.zeros_like(truth.measured))
    with pytest.raises(errors.InputError, match="No prediction varies"):
        inf.tune(queries, flat)


def test_sentences():
    default, best = Setting("ggn", "ggn", 0.0), Setting("ekfac", "ekfac", 0.25)

    def found(best_place, gain):
        scores = (Estimate(0.2, 0.1, 0.3), Estimate(0.4, 0.3, 0.5))
        return Tuning(
            (default, best), scores, best_place, scores, gain, (8, 8), "this model", "by hand", ()
        )

    assert found(1, Estimate(0.2, 0.1, 0.3)).sentence == (
        "ekfac with damping 0.25 reaches 0.40 [0.30, 0.50] on the changes that did not choose it, "
        "ggn with damping 0 (the default) 0.20 [0.10, 0.30]: ahead by 0.20 [0.10, 0.30]."
    )
    assert found(1, Estimate(0.2, -0.1, 0.3)).sentence.startswith("No gain is shown")
    assert found(1, Estimate(0.2, -0.1, 0.3)).chosen == default
    assert found(0, Estimate(0.0, 0.0, 0.0)).sentence == (
        "Nothing that was tried is better than the default, ggn with damping 0."
    )


def test_a_changed_model_is_refused(known):
    _, train, queries, _ = known
    model = small_network(1)
    inf = uw.Influence(uw.Objective(model, "cross_entropy", l2=0.1), train, method="ggn")
    truth = truth_of(known, np.ones((Q, N)))
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    for ask in (lambda: inf.tune(queries, truth), lambda: inf.calibrate(queries, truth)):
        with pytest.raises(errors.ModelError, match="changed after"):
            ask()
