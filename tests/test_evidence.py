"""Evidence from a budget: what is asked for, what follows from it, and what is said of it."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import upweight as uw
from tests.cases import small_network
from upweight.demo import minimise
from upweight.errors import InputError, StoreError
from upweight.evaluation import Estimate, Resamples
from upweight.evaluation.resampling import LEAST
from upweight.evidence import gather as spent_on
from upweight.evidence import kept_in, seconds_of, spoken
from upweight.evidence.contenders import CHEAP, Contender, contenders
from upweight.evidence.contest import Contest, Question
from upweight.evidence.designs import DRAWN, MOST, Halves, OneByOne, TopGroups
from upweight.evidence.findings import AVERAGE, ONE, THIS, Finding, Rating
from upweight.evidence.gather import (
    GOOD_HALVES,
    MOST_REFIT_PARAMETERS,
    by_refits,
    by_retraining,
    evidence,
    joined,
    spend,
)
from upweight.evidence.result import Evidence
from upweight.evidence.spending import PACE, Spending
from upweight.evidence.statistics import WIDE, Ranking, Rise
from upweight.evidence.verdict import Cost, verdict
from upweight.meaning import Meaning
from upweight.retraining import SGD, Refit, Training, Trials, Truth

close = np.testing.assert_allclose
MEANING = Meaning("loss", "nats", 1)


class World:
    """Retraining without models: known effects of examples, noise per training, and a clock.

    What was trained once is stored, as ``retrain`` with a path does.
    """

    def __init__(self, *, queries=10, examples=40, noise=0.3, cost=1.0, overhead=0.0):
        draw = np.random.default_rng(0)
        self.effects = draw.normal(size=(queries, examples))
        self.noise, self.cost, self.overhead = noise, cost, overhead
        self.now, self.calls = 0.0, []
        self.stored: dict[tuple, np.ndarray] = {}
        self.fails: set[int] = set()

    def clock(self):
        return self.now

    def trained(self, gone, seed):
        key = (gone.tobytes(), int(seed))
        if key not in self.stored:
            self.now += self.cost
            draw = np.random.default_rng((int(seed), *map(int, gone)))
            noise = self.noise * np.sqrt(gone.sum()) * draw.normal(size=len(self.effects))
            self.stored[key] = self.effects @ gone + noise
        return self.stored[key]

    def ask(self, trials):
        self.calls.append(trials)
        self.now += self.overhead
        q, n = self.effects.shape
        seeds = np.unique(trials.seeds)
        whole = np.array([self.trained(np.zeros(n, bool), seed) for seed in seeds])
        rows = np.array(
            [self.trained(*pair) for pair in zip(trials.gone, trials.seeds, strict=True)]
        )
        failed = {t: "diverged" for t in range(len(trials)) if trials.gone[t].sum() in self.fails}
        rows[list(failed)] = np.nan
        return Truth(
            trials,
            np.arange(q),
            rows,
            whole,
            seeds,
            MEANING,
            "an imagined training",
            failed,
            own=int(seeds[0]),
            at_hand=whole[0],
        )

    def contest(self, *, helpful=1, blur=0.5):
        """Scores that are the effects and some noise, and two baselines."""
        draw = np.random.default_rng(7)
        good = self.effects + blur * draw.normal(size=self.effects.shape)
        poor = self.effects + 4 * draw.normal(size=self.effects.shape)
        q, n = good.shape
        found = (
            Contender("ours", "these scores", good, sized=True),
            Contender("embedding", CHEAP["embedding"], poor, sized=False),
            Contender("random", CHEAP["random"], draw.normal(size=good.shape), sized=False),
        )
        return Contest(found, np.arange(q), np.arange(n), np.full(n, 1 / n), helpful)

    def spend(self, budget, **known):
        return Spending(budget, clock=self.clock, **known)


# Budgets


@pytest.mark.parametrize(
    ("words", "seconds"),
    [(5, 5.0), (0.5, 0.5), ("7", 7.0), ("10 min", 600.0), ("2h", 7200.0), (" 1.5 d ", 129600.0)],
)
def test_budgets_are_read_from_words(words, seconds):
    assert seconds_of(words) == seconds


@pytest.mark.parametrize("words", ["", "soon", "5 weeks", 0, "-3 s", "1.2.3 s", float("inf")])
def test_what_is_no_budget_is_refused(words):
    with pytest.raises(InputError, match="A budget is a number of seconds"):
        seconds_of(words)


def test_times_are_spoken_in_the_unit_that_suits():
    assert [spoken(s) for s in (3, 119, 120, 3 * 3600, 2 * 86400)] == [
        "3 s",
        "119 s",
        "2 min",
        "3 h",
        "2 d",
    ]


def test_the_pace_is_kept_beside_the_outcomes(tmp_path):
    now = itertools.count(step=1.0)
    with kept_in(tmp_path / "truth", 10.0, clock=lambda: next(now)) as (place, spending):
        assert spending.affords() == 0
        place.mkdir()
        spending.observe(2, 3.0)
    assert json.loads((place / PACE).read_text()) == {"seconds": 1.5}
    with kept_in(place, 10.0, clock=lambda: 0.0) as (_, spending):
        assert spending.affords() == 6
        spending.observe(100, 0.01)  # out of the store
        assert spending.affords() == 6
        spending.observe(1, 2.5)
        assert spending.affords() == 4
    (place / PACE).write_text("{}")
    with kept_in(place, 10.0) as (_, spending):
        assert spending.pace is None
    with kept_in(None, 10.0) as (place, _):
        assert place.parent.is_dir()
    assert not place.parent.exists()


# What is asked for


@pytest.mark.parametrize("cost", [0.5, 60.0])
def test_many_trainings_are_halves_with_two_seeds(cost):
    world = World(cost=cost)
    design, truth = by_retraining(world.contest(), world.ask, world.spend(150 * cost), seed=3)
    assert isinstance(design, Halves)
    assert 130 * cost <= world.now <= 152 * cost
    assert np.unique(truth.trials.seeds).tolist() == [3, 4]
    assert (truth.trials.gone.sum(1) == 20).all()
    gone, changes = truth.by_seed()
    assert len(gone) >= 60
    assert changes.shape == (2, len(gone), 10)


def test_few_trainings_are_top_groups():
    world = World(cost=2.0)
    design, truth = by_retraining(world.contest(), world.ask, world.spend(60.0), seed=0)
    assert isinstance(design, TopGroups)
    assert world.now <= 62
    assert len(truth.trials) >= 2 * LEAST
    assert (truth.trials.gone.sum(1) == 2).all()


def test_few_trainings_of_few_queries_are_halves():
    world = World(queries=3)
    design, truth = by_retraining(world.contest(), world.ask, world.spend(30.0), seed=0)
    assert isinstance(design, Halves)
    assert LEAST <= len(truth.by_seed()[0]) < GOOD_HALVES


def test_what_only_the_first_call_takes_does_not_decide():
    world = World(cost=0.2, overhead=3.0)
    design, _ = by_retraining(world.contest(), world.ask, world.spend(60.0), seed=0)
    assert isinstance(design, Halves)


@pytest.mark.parametrize(("queries", "least"), [(10, 17), (3, 18)])
def test_too_small_a_budget_says_what_it_takes(queries, least):
    world = World(queries=queries, cost=30.0)
    with pytest.raises(InputError) as caught:
        by_retraining(world.contest(), world.ask, world.spend(60.0), seed=0)
    said = str(caught.value)
    assert "A budget of 60 s is too small: one training takes 30 s" in said
    assert f"takes {least} of them" in said
    assert f"Pass budget='{spoken(1.2 * least * 30)}'" in said
    assert len(world.stored) == 2


def test_a_longer_call_goes_on_from_a_shorter_one():
    world = World()
    contest = world.contest()
    _, first = by_retraining(contest, world.ask, world.spend(80.0), seed=0)
    trained, before = len(world.stored), world.now
    _, second = by_retraining(contest, world.ask, world.spend(80.0, pace=1.0), seed=0)
    # All of the second budget went into new trainings, none into old ones.
    assert len(world.stored) - trained == world.now - before
    assert 60 <= world.now - before <= 82
    count = len(first.trials)
    assert len(second.trials) >= count + 60
    assert (second.trials.gone[:count] == first.trials.gone).all()
    close(second.measured[:count], first.measured, rtol=0)


def test_a_pace_that_falls_does_not_overspend():
    world = World(cost=0.01)

    def slower(trials):
        world.cost *= 2 if world.cost < 1 else 1
        return world.ask(trials)

    design = Halves(40, count=500, seeds=(0, 1))
    spending = world.spend(100.0)
    truth = spend(design, slower, spending, first=1)
    assert world.now <= 110
    assert len(truth.trials) % 2 == 0


def test_the_least_is_finished_even_if_the_budget_is_gone():
    world = World(cost=50.0)
    design = OneByOne(world.contest().scores, count=30)
    truth = spend(design, world.ask, world.spend(60.0), first=design.least)
    assert len(truth.trials) == 2 * LEAST


def test_blocks_are_joined_with_their_failures():
    world = World()
    world.fails = {1}
    trials = Trials.without([[0, 1], [2], [3, 4], [5]], 40, [0])
    parts = [world.ask(trials.take(np.array(rows))) for rows in ([0, 1], [2, 3])]
    parts[1] = replace(parts[1], notes=("a note",))
    whole, found = world.ask(trials), joined(parts)
    assert found.failures == whole.failures == {1: "diverged", 3: "diverged"}
    np.testing.assert_array_equal(found.measured, whole.measured)
    assert (found.trials.gone == trials.gone).all()
    assert found.notes == ("a note",)


# What follows from it


def naive(predicted, measured):
    """Mean Spearman over queries, and Pearson and slope of all pairs."""
    order = np.mean(
        [scipy.stats.spearmanr(*pair).statistic for pair in zip(predicted, measured, strict=True)]
    )
    pairs = predicted.ravel(), measured.ravel()
    return (
        order,
        scipy.stats.pearsonr(*pairs).statistic,
        scipy.stats.linregress(*pairs).slope,
    )


def test_every_contender_is_judged_by_the_same_trials():
    world = World()
    contest = world.contest()
    trials = Trials.subsets(40, count=30, fraction=0.5, seeds=[0, 1])
    truth = world.ask(trials)
    truth.measured[10] = np.nan
    average, own = Halves(40, count=30, seeds=(0, 1)).findings(truth, contest)
    assert (average.question, own.question) == (AVERAGE, THIS)
    assert (average.count, average.failed, own.failed) == (29, 1, 1)
    changes = (truth.measured - np.tile(truth.whole, (30, 1))).reshape(30, 2, 10)
    kept = np.delete(np.arange(30), 5)
    gone = trials.gone[::2][kept]
    for finding, actual in ((average, changes.mean(1)), (own, changes[:, 0])):
        for rating, one in zip(finding.ratings, contest.contenders, strict=True):
            # Without a half, what stays weighs twice as much.
            order, r, slope = naive(2 * one.values @ gone.T, actual[kept].T)
            close(rating.order.value, order, rtol=1e-9)
            close(rating.r.value, r, rtol=1e-9)
            if one.sized:
                close(rating.slope.value, slope, rtol=1e-9)
            else:
                assert rating.slope is None
                ahead = finding.ours.order.value - order
                close(rating.ahead.value, ahead, rtol=1e-9)
                assert rating.ahead.low < ahead < rating.ahead.high
        assert finding.ours.ahead is None
        assert finding.rival.name == "embedding"
    assert own.ceiling is None
    points = Halves(40, count=30, seeds=(0, 1)).points(truth, contest)
    close(points.predicted[:, kept], 2 * contest.scores @ gone.T, rtol=1e-9)
    weighted = replace(contest, shares=np.arange(40.0) / 780)
    close(weighted.growth(gone), 780 / (780 - gone @ np.arange(40.0)), rtol=1e-9)


def test_the_ceiling_is_that_of_the_mean_over_seeds():
    world = World(queries=6, examples=60, noise=1.0)
    truth = world.ask(Trials.subsets(60, count=150, fraction=0.5, seeds=[0, 1]))
    (average, _) = Halves(60, count=150, seeds=(0, 1)).findings(truth, world.contest())
    _, changes = truth.by_seed()
    r = np.mean([scipy.stats.spearmanr(*changes[:, :, q]).statistic for q in range(6)])
    close(average.ceiling.value, np.sqrt(2 * r / (1 + r)), rtol=1e-9)
    # What it stands for: the effects themselves, correlated with the mean over seeds.
    gone, _ = truth.by_seed()
    best, *_ = naive(world.effects @ gone.T, changes.mean(0).T)
    assert average.ceiling.low < best < average.ceiling.high
    assert world.contest().ceiling(changes[:1]) is None


def test_another_model_than_the_explained_one_is_said_to_be_another():
    world = World()
    design = Halves(40, count=10, seeds=(0, 1))
    truth = replace(world.ask(design.trials), at_hand=np.ones(10))
    (found,) = design.findings(truth, world.contest())
    assert found.question == AVERAGE
    whole = evidence(world.contest(), design, truth, spending=world.spend(1.0), absent=["bm25"])
    assert any("gave another model than the one" in note for note in whole.notes)
    assert any("do not have them: bm25" in note for note in whole.notes)


def test_single_examples_are_random_and_influential_in_turn():
    scores = World().contest().scores
    design = OneByOne(scores, count=30)
    assert design.kinds[:4].tolist() == [DRAWN, MOST] * 2
    assert (design.kinds == MOST).sum() == 15
    assert len(set(design.positions.tolist())) == 30
    sizes = np.abs(scores)
    assert sizes[:, design.positions[1]].max() == sizes.max(1)[0]
    assert (design.trials.gone.argmax(1) == design.positions).all()
    assert len(OneByOne(scores, count=1).trials) == 2 * LEAST
    assert len(OneByOne(scores, count=999).trials) == 40
    with pytest.raises(InputError, match="At least 16 training examples"):
        OneByOne(scores[:, :15], count=30)


def test_random_examples_come_first_and_are_judged_apart():
    world = World(noise=0.0)
    contest = world.contest()
    design, truth = by_refits(contest, world.ask, world.spend(30.0))
    drawn, chosen = design.findings(truth, contest)
    assert (drawn.question, drawn.ceiling.value) == (THIS, 1.0)
    kinds = design.kinds[: len(truth.trials)]
    assert (drawn.count, chosen.count) == ((kinds == DRAWN).sum(), (kinds == MOST).sum())
    places = design.positions[: len(truth.trials)][kinds == DRAWN]
    order, r, slope = naive(contest.scores[:, places], world.effects[:, places])
    close(drawn.ours.order.value, order, rtol=1e-9)
    close((drawn.ours.r.value, drawn.ours.slope.value), (r, slope), rtol=1e-9)
    points = design.points(truth, contest)
    close(points.actual, world.effects[:, points.removed], rtol=1e-9, atol=1e-12)
    close(points.predicted, contest.scores[:, points.removed], rtol=0)


@pytest.mark.parametrize("helpful", [1, -1])
def test_top_groups_compare_own_examples_with_those_of_others(helpful):
    world = World(queries=9, examples=60)
    contest = world.contest(helpful=helpful)
    design = TopGroups(contest, queries=9, seed=0)
    assert design.size == 3
    truth = world.ask(design.trials)
    truth.measured[4] = np.nan  # the third query's own examples
    (found,) = design.findings(truth, contest)
    changes = helpful * (truth.measured - truth.whole)
    known = [q for q in range(9) if q != 2]
    own = [changes[2 * q, q] for q in known]
    theirs = [changes[2 * q + 1, q] for q in known]
    others = [np.nanmean([changes[2 * j, q] for j in range(9) if j != q]) for q in known]
    for rating, moves in zip(found.ratings, (own, theirs, others), strict=True):
        close(rating.order.value, np.mean(moves), rtol=1e-9)
    close(found.ratings[1].ahead.value, np.mean(own) - np.mean(theirs), rtol=1e-9)
    predicted = [helpful * np.sort(helpful * contest.scores[q])[-3:].sum() for q in known]
    close(
        found.ours.slope.value, scipy.stats.linregress(np.multiply(helpful, predicted), own).slope
    )
    assert (found.count, found.failed, found.question) == (8, 1, THIS)
    assert found.ratings[1].name == "embedding"
    points = design.points(truth, contest)
    drawn = np.isfinite(points.actual)
    assert (drawn == np.eye(9, dtype=bool) & (np.arange(9) != 2)).all()
    assert design.statistic(MEANING) == Rise("rise of loss", "nats")
    margin = Meaning("margin", "logits", -1)
    assert design.statistic(margin) == Rise("fall of margin", "logits")
    assert design.findings(replace(truth, at_hand=np.ones(9)), contest)[0].question == ONE


def test_bootstrap_samples_are_as_many_as_there_is_time_for():
    contest = World().contest()
    assert contest.draws(np.zeros((10, 20))) == 2000
    assert contest.draws(np.zeros((1000, 1000))) == 300
    with pytest.raises(InputError, match="at least 8"):
        contest.finding(Question(THIS, "x"), np.zeros((7, 40), bool), np.zeros((10, 7)))


# What is said of it


def rated(value, spread, ahead=None, wide=0.1, slope=None):
    order = Estimate(value, value - spread, value + spread)
    known = None if ahead is None else Estimate(ahead, ahead - wide / 2, ahead + wide / 2)
    size = None if slope is None else Estimate(slope, slope - 0.05, slope + 0.05)
    return Rating("name", "embedding neighbours", order, known, order, size)


@pytest.mark.parametrize(
    ("ours", "rival", "ceiling", "grade", "says"),
    [
        (
            rated(0.61, 0.05),
            rated(0.22, 0.05, 0.39),
            0.84,
            "good",
            "Trust the ranking: LDS 0.61 [0.56, 0.66], ceiling 0.84; embedding neighbours reach "
            "0.22.",
        ),
        (rated(0.61, 0.05, slope=1.6), rated(0.2, 0.05, 0.4), None, "good", "about 1.6 times"),
        (rated(0.61, 0.05, slope=1.1), rated(0.2, 0.05, 0.4), None, "good", "ceiling unknown"),
        (rated(0.3, 0.05), rated(0.1, 0.05, 0.2), None, "partly", "choose what to look at"),
        # The same number is most of what can be reached where training is noisy.
        (rated(0.3, 0.05), rated(0.1, 0.05, 0.2), 0.4, "good", "Trust the ranking"),
        (rated(0.1, 0.05), rated(0.0, 0.05, 0.1), None, "not", "which tell little"),
        (
            rated(0.23, 0.05),
            rated(0.22, 0.05, 0.01),
            0.8,
            "not",
            "These scores are no better than embedding neighbours on this model: LDS 0.23",
        ),
        (rated(0.2, 0.05), rated(0.5, 0.05, -0.3), 0.8, "not", "Use embedding neighbours instead"),
        (
            rated(0.3, 0.25),
            rated(0.2, 0.25, 0.1, wide=0.6),
            0.8,
            "unknown",
            "Cannot tell whether they are better than embedding neighbours: the interval 0.10 "
            "[-0.20, 0.40] is wider than 0.3; it would take about 400 retrainings (13 min).",
        ),
        (rated(0.1, 0.2), rated(-0.5, 0.05, 0.6), 0.8, "unknown", "better than chance"),
        (rated(0.02, 0.1), rated(-0.5, 0.05, 0.52), 0.8, "not", "no better than chance"),
        (rated(np.nan, 0.1), rated(0.1, 0.1, np.nan), 0.8, "unknown", "does not vary"),
    ],
)
def test_the_verdict_is_one_plain_sentence(ours, rival, ceiling, grade, says):
    best = None if ceiling is None else Estimate(ceiling, ceiling - 0.05, ceiling + 0.05)
    finding = Finding(AVERAGE, "halves", (ours, rival), best, 40, 0, 0)
    found = verdict(finding, Ranking("LDS"), Cost(100, 200.0, 2.0))
    assert found.grade == grade
    assert says in found.sentence
    assert found.sentence.count(".") >= 1
    assert found.sentence.endswith(".")


def test_a_rise_is_said_with_its_unit_and_never_called_good():
    rival = rated(0.05, 0.01, 0.2)
    finding = Finding(THIS, "the 3 examples", (rated(0.25, 0.02), rival), None, 12, 0, 0)
    statistic = Rise("rise of loss", "nats")
    found = verdict(finding, statistic, Cost(30, 60.0, 2.0))
    assert found.grade == "partly"
    assert (
        "rise of loss 0.25 [0.23, 0.27] nats without the 3 examples; embedding neighbours reach "
        "0.05." in found.sentence
    )
    assert statistic.wide(finding) == 0.25
    assert Ranking("LDS").wide(finding) == WIDE


@pytest.fixture
def whole() -> Evidence:
    world = World()
    contest = world.contest()
    spending = world.spend(60.0)
    design, truth = by_retraining(contest, world.ask, spending, seed=0)
    return evidence(contest, design, truth, spending=spending, absent=[])


def test_evidence_is_saved_and_loaded(whole, tmp_path):
    path = whole.save(tmp_path / "evidence.json")
    again = Evidence.load(path)
    assert again.as_dict() == whole.as_dict()
    assert again.findings == whole.findings
    assert again.verdict == whole.verdict
    np.testing.assert_array_equal(again.points.actual, whole.points.actual)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(StoreError, match="schema 2"):
        Evidence.load(path)
    for text in ("{", "{}", "[]"):
        path.write_text(text)
        with pytest.raises(StoreError, match="no evidence that can be read"):
            Evidence.load(path)
    with pytest.raises(StoreError, match="no evidence"):
        Evidence.load(tmp_path / "absent.json")


def test_top_groups_survive_the_file_although_most_pairs_are_not_drawn(tmp_path):
    world = World()
    contest, spending = world.contest(), world.spend(40.0)
    design, truth = by_retraining(contest, world.ask, spending, seed=0)
    found = evidence(contest, design, truth, spending=spending, absent=[])
    again = Evidence.load(found.save(tmp_path / "evidence.json"))
    np.testing.assert_array_equal(again.points.actual, found.points.actual)
    assert np.isnan(again.points.actual).any()
    assert again.statistic == Rise("rise of loss", "nats")
    assert np.isnan(again.findings[0].ratings[1].r.value)


def test_evidence_shows_itself(whole):
    table = whole.table()
    assert set(table["method"]) == {"ours", "embedding", "random", "best possible"}
    assert table["LDS"][0] == whole.findings[0].ours.order.value
    said = repr(whole)
    assert said.startswith(whole.verdict.sentence)
    assert "an imagined training" in said
    assert f"{whole.cost.trainings} trainings in" in said
    page = replace(whole, notes=("<b>",))._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<table>" in page
    axes = whole.plot()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["random", "embedding", "ours"]
    (line,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert line.get_xdata()[0] == whole.findings[0].ceiling.value
    axes.figure.clear()


# With real models


def clouds(count, seed=0, features=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator).double()
    noise = torch.randn(count, 2, generator=generator).double()
    return x, (x[:, :2] + 0.5 * noise).argmax(1)


def softmax(examples=60, **settings) -> uw.Influence:
    model, rows = nn.Linear(3, 2).double(), clouds(examples)
    minimise(model, rows, 0.05)
    return uw.Influence(model, rows, loss="cross_entropy", l2=0.05, **settings)


def ticking(monkeypatch, tick=1.0):
    """A clock that advances by the same whenever it is read: runs do not depend on the machine."""
    now = itertools.count(step=tick)

    def injected(path, budget):
        return kept_in(path, budget, clock=lambda: next(now))

    monkeypatch.setattr("upweight.front.proving.kept_in", injected)


def test_convex_models_are_refitted_and_exact_scores_trusted(monkeypatch):
    ticking(monkeypatch)
    inf, queries = softmax(), clouds(8, seed=1)
    found = inf.validate(queries, budget=30)
    assert found.verdict.grade == "good"
    assert found.findings[0].ours.order.value > 0.99
    assert 0.95 < found.findings[0].ours.slope.value < 1.15
    assert [one.name for one in found.findings[0].ratings] == [
        "exact",
        *(name for name in CHEAP if name != "bm25"),
    ]
    # The same changes as the proof by removal finds, one example at a time.
    proof = inf.validate(queries, top=10, random=10)
    for place, name in enumerate(proof.removed.tolist()):
        if name in found.points.removed.tolist():
            column = found.points.removed.tolist().index(name)
            close(found.points.actual[:, column], proof.actual[:, place], rtol=1e-6, atol=1e-10)


def test_scores_that_know_nothing_are_found_out(monkeypatch):
    ticking(monkeypatch)
    far = softmax(method=uw.CG(rtol=1e-6), damping=1e6)
    noise = softmax()
    queries = clouds(8, seed=1)
    scores = noise.explain(queries)
    scores.values[:] = np.random.default_rng(0).normal(size=scores.shape)
    found = noise.validate(queries, budget=30, scores=scores)
    assert found.verdict.grade == "not"
    assert any(said in found.verdict.sentence for said in ("are no better than", "instead"))
    # With a huge damping scores are gradient products: an order of sorts, but far too small.
    sizes = far.validate(queries, budget=30).findings[0].ours.slope
    assert sizes.low > 100


def trained(training, rows, seed=0):
    """What the recipe makes, by a loop of its own."""
    torch.manual_seed(seed)
    double = {"dtype": torch.float64}  # seeds draw other numbers in float32
    model = nn.Sequential(nn.Linear(3, 4, **double), nn.Tanh(), nn.Linear(4, 2, **double))
    optimiser = torch.optim.SGD(model.parameters(), training.optimiser.lr, weight_decay=0.01)
    x, y = rows
    for epoch in range(training.epochs):
        for part in training.epoch(seed, epoch, len(x)).split(training.batch_size):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimiser.step()
    return model


@pytest.fixture
def network():
    training, rows = Training(4, 10, SGD(0.5)), clouds(40)
    model = trained(training, rows)
    inf = uw.Influence(model, rows, loss="cross_entropy", l2=0.01, method="ggn", damping=0.01)
    return inf, training


def test_networks_are_trained_again_and_both_questions_answered(network, monkeypatch, tmp_path):
    ticking(monkeypatch)
    inf, training = network
    queries = clouds(6, seed=1)
    found = inf.validate(queries, how=training, budget=20, path=tmp_path / "truth")
    average, own = found.findings
    assert (average.question, own.question) == (AVERAGE, THIS)
    assert found.statistic == Ranking("LDS")
    assert 0 < average.ceiling.value <= 1
    assert average.count == own.count >= LEAST
    assert "SGD" in found.truth
    longer = inf.validate(queries, how=training, budget=60, path=tmp_path / "truth")
    assert longer.findings[0].count > average.count
    shared = found.points.actual.shape[1]
    close(longer.points.actual[:, :shared], found.points.actual, rtol=0)
    with pytest.raises(StoreError, match="another run"):
        inf.validate(queries, how=Training(5, 10, SGD(0.5)), budget=60, path=tmp_path / "truth")


def test_a_function_trains_in_place_of_a_recipe(network, monkeypatch):
    ticking(monkeypatch)
    inf, training = network
    x, y = clouds(40)

    def retrain(kept, seed):
        return trained(training, (x[kept], y[kept]), seed)

    found = inf.validate(clouds(6, seed=1), how=retrain, budget=16)
    assert found.findings[-1].question == THIS
    assert found.verdict.sentence


def test_baselines_look_at_the_whole_model_whatever_the_method_does():
    rows, queries = clouds(20), uw.Data.of(clouds(3, seed=1))
    model = small_network()
    for method in ("ggn", "last_layer"):
        inf = uw.Influence(model, rows, loss="cross_entropy", l2=0.1, method=method)
        found, absent = contenders(inf._made, queries, inf.explain(queries))
        assert list(absent) == ["bm25"]
        for one in found[1:]:
            row = uw.Influence(model, rows, loss="cross_entropy", l2=0.1, method=one.name)
            close(one.values, row.explain(queries).values, rtol=1e-10, atol=1e-12)
    margin = uw.Objective(model, "cross_entropy", l2=0.1, measure="margin")
    inf = uw.Influence(margin, rows, method="ggn")
    found, _ = contenders(inf._made, queries, inf.explain(queries))
    row = uw.Influence(margin, rows, method="embedding")
    close(found[1].values, -row.explain(queries).values, rtol=1e-10)


def test_scores_that_only_rank_have_no_slope():
    rows, queries = clouds(20), uw.Data.of(clouds(3, seed=1))
    inf = uw.Influence(small_network(), rows, loss="cross_entropy", l2=0.1, method="relatif")
    found, _ = contenders(inf._made, queries, inf.explain(queries))
    assert not found[0].sized


def test_what_cannot_be_judged_is_refused(monkeypatch):
    ticking(monkeypatch)
    queries = clouds(3, seed=1)
    with pytest.raises(InputError, match="one of the baselines"):
        softmax(method="embedding").validate(queries, budget=30)
    inf = softmax()
    with pytest.raises(InputError, match="belong to other queries"):
        inf.validate(queries, budget=30, scores=inf.explain(clouds(4)))
    with pytest.raises(TypeError, match="top"):
        inf.validate(queries, budget=30, top=4)
    large = nn.Linear(MOST_REFIT_PARAMETERS, 2)
    rows = torch.randn(20, MOST_REFIT_PARAMETERS), torch.arange(20) % 2
    wide = uw.Influence(large, rows, loss="cross_entropy", l2=0.1, method="no_hessian")
    with pytest.raises(InputError, match="Say how the model was trained"):
        wide.validate(rows, budget=30)


def test_refits_are_told_apart_from_trainings(tmp_path):
    inf, queries = softmax(), uw.Data.of(clouds(8, seed=1))
    scores = inf.explain(queries)
    found = spent_on(
        inf._made,
        queries,
        scores,
        how=Refit(),
        spending=Spending(20.0, clock=itertools.count().__next__),
        path=Path(tmp_path / "truth"),
    )
    assert "refits" in found.truth
    assert found.findings[0].trials.startswith("random examples")


def test_samples_of_one_query_are_of_that_query_alone():
    assert (Resamples.two_way(9, 1, draws=5).queries == 1).all()


@pytest.mark.parametrize(("examples", "halves"), [(1, 1), (4, 6), (5, 10), (12, 500)])
def test_small_data_have_few_halves(examples, halves):
    design = Halves(examples, count=500, seeds=(0, 1))
    assert len(set(design.trials.keys())) == len(design.trials) == 2 * halves
