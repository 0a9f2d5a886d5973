"""Ensembles and TracIn: values against loops over models and examples, and what is refused."""

import gc
import itertools
import weakref
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import upweight as uw
from tests.cases import CASES, as_reference, small_network, small_rows
from upweight import errors, reference
from upweight.data import Data
from upweight.ensemble import TracIn
from upweight.fingerprints import fingerprint
from upweight.objective import Objective
from upweight.risk import Risk
from upweight.store import MANIFEST

SEEDS, WEIGHTS = (1, 2, 3), (1.0, 3.0, 0.5)
QUERIES = small_rows(4, seed=9)
MEAN = np.array(WEIGHTS) / sum(WEIGHTS)


@pytest.fixture(autouse=True)
def _plain_attention():
    """The references differentiate twice, which default attention kernels cannot."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def states(seeds=SEEDS):
    return [small_network(seed).state_dict() for seed in seeds]


def member(seed, method="ggn", **settings):
    settings = {"loss": "cross_entropy", "l2": 0.05, "method": method, **settings}
    return uw.Influence(small_network(seed), small_rows(), **settings)


def close(found, wanted, rtol=1e-10, atol=1e-13):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=rtol, atol=atol)


def averaged(question, method="ggn", seeds=SEEDS, coefficients=MEAN):
    """Σ c_m of what each member answers alone."""
    answers = [question(member(seed, method)) for seed in seeds]
    return sum(c * a for c, a in zip(coefficients, answers, strict=True))


# Means


@pytest.mark.parametrize(
    "method", ["ggn", "ekfac", "ggn_cg", "no_hessian", "last_layer", "relatif", "cosine", "random"]
)
@pytest.mark.parametrize("made", ["members", "functions", "states"])
def test_scores_are_the_weighted_mean_of_separate_ones(method, made):
    wanted = averaged(lambda one: one.explain(QUERIES).values, method)
    pairs = {
        "members": [member(seed, method) for seed in SEEDS],
        "functions": [partial(member, seed, method) for seed in SEEDS],
    }
    if made == "states":
        ensemble = uw.Ensemble.of(member(0, method), states(), WEIGHTS)
    else:
        ensemble = uw.Ensemble(pairs[made], WEIGHTS)
    found = ensemble.explain(QUERIES)
    close(found.values, wanted)
    assert found.shape == (4, 20)
    assert found.provenance.method == f"ensemble of 3: {method}"


@pytest.mark.parametrize("removal", ["mean", "sum"])
@pytest.mark.parametrize("name", ["softmax weighted", "mlp", "padded transformer"])
def test_scores_are_those_of_dense_loops_over_models(name, removal):
    case = next(case for case in CASES if case.name == name)
    risk = case.risk(removal=removal)
    damping, found, total = 30.0, [], 0.0
    for seed in SEEDS:
        torch.manual_seed(seed)
        for p in risk.objective.model.parameters():
            nn.init.normal_(p, std=0.3)
        found.append({k: v.clone() for k, v in risk.objective.model.state_dict().items()})
        problem, theta = as_reference(Risk(risk.objective, risk.data))
        matrix = reference.hessian(problem, theta) + damping * torch.eye(len(theta)).double()
        measures = [partial(at, problem, q) for q in range(3)]
        total = total + reference.scores(problem, theta, matrix, measures) / len(SEEDS)
    inf = uw.Influence(risk.objective, risk.data, method="exact", damping=damping)
    scores = uw.Ensemble.of(inf, found).explain(risk.data.take(torch.arange(3)))
    close(scores.values, total, rtol=1e-9)


def test_order_of_members_and_batches_change_nothing():
    pairs = list(zip(SEEDS, WEIGHTS, strict=True))
    whole = uw.Ensemble.of(member(0), states(), WEIGHTS).explain(QUERIES)
    for order in itertools.permutations(pairs):
        seeds, weights = zip(*order, strict=True)
        found = uw.Ensemble.of(member(0), states(seeds), weights).explain(QUERIES)
        close(found.values, whole.values)
        assert found.provenance.identity == whole.provenance.identity
    data = Data.of(small_rows(), batch_size=3)
    one = uw.Influence(small_network(), data, loss="cross_entropy", l2=0.05, method="ggn")
    close(uw.Ensemble.of(one, states(), WEIGHTS).explain(QUERIES).values, whole.values)


def test_weights_count_by_their_proportions_and_none_are_alike():
    plain = uw.Ensemble.of(member(0), states()).explain(QUERIES)
    close(plain.values, averaged(lambda one: one.explain(QUERIES).values, coefficients=[1 / 3] * 3))
    again = uw.Ensemble.of(member(0), states(), [7, 7, 7]).explain(QUERIES)
    close(again.values, plain.values)
    single = uw.Ensemble.of(member(0), states(), [0, 2, 0]).explain(QUERIES)
    close(single.values, member(2).explain(QUERIES).values)
    assert "standard error" not in repr(single)


def test_a_measure_reaches_the_members():
    found = uw.Ensemble.of(member(0), states(), WEIGHTS).explain(QUERIES, measure="margin")
    close(found.values, averaged(lambda one: one.explain(QUERIES, measure="margin").values))
    assert (found.meaning.measure, found.meaning.helpful) == ("margin", -1)


def test_scores_of_a_query_sum_to_zero_where_all_members_are_at_a_minimum():
    x, y = small_rows(40)
    trained = []
    for seed in SEEDS:
        model = nn.Linear(3, 2).double()
        risk = Risk(Objective(model, "cross_entropy", l2=0.02 * seed), Data.of((x, y)))
        problem, theta = as_reference(risk)
        found = reference.train(problem, theta)
        with torch.no_grad():
            for p, value in zip(
                model.parameters(), risk.objective.space.unflatten(found).values(), strict=True
            ):
                p.copy_(value)
        trained.append(uw.Influence(model, (x, y), loss="cross_entropy", l2=0.02 * seed))
    scores = uw.Ensemble(trained, WEIGHTS).explain(QUERIES)
    assert np.abs(scores.values.sum(1)).max() < 1e-12 < np.abs(scores.values).max()


def test_the_spread_of_members_is_the_standard_error_of_their_mean():
    for weights in (None, WEIGHTS):
        each = np.stack([member(seed).explain(QUERIES).values for seed in SEEDS])
        c = MEAN if weights else np.full(3, 1 / 3)
        mean = np.tensordot(c, each, 1)
        variance = np.tensordot(c, (each - mean) ** 2, 1) / (1 / (c**2).sum() - 1)
        wanted = np.sqrt(variance.sum() / (mean**2).sum())
        if weights is None:
            close(variance, each.var(0, ddof=1) / 3)
        found = uw.Ensemble.of(member(0), states(), weights).explain(QUERIES)
        assert f"standard error is {wanted:.0%} of its size" in found.provenance.caveats[0]
        assert ("weighted" in found.provenance.caveats[0]) == (weights is not None)


def test_provenance_says_the_worst_residual_all_dampings_and_who_says_what():
    loose = uw.Method("loose", "", "ggn", uw.CG(rtol=1e-2))
    members = [member(1, "ekfac"), member(2, loose), member(3, damping=0.2)]
    alone = [one.explain(QUERIES).provenance for one in members]
    found = uw.Ensemble(members).explain(QUERIES).provenance
    assert found.method == "ensemble of 3: ekfac, loose, ggn"
    assert found.damping == pytest.approx(0.2 / 3)
    assert "dampings of members from 0 to 0.2" in found.caveats
    close(found.residual, np.max([one.residual for one in alone], 0))
    assert found.removal == "mean"
    assert found.coverage == 1
    half = uw.Influence(
        Objective(small_network(2), "cross_entropy", l2=0.05, parameters=["2.*"]),
        small_rows(),
        method="ggn",
    )
    mixed = uw.Ensemble([member(1, "cosine"), member(2, "cosine")]).explain(QUERIES).provenance
    assert np.isnan(mixed.residual).all()
    assert "a similarity or ranking, not a change on removal" in mixed.caveats
    part = uw.Ensemble([member(1), half]).explain(QUERIES).provenance
    assert part.coverage == half.objective.space.coverage < 1


def test_caveats_that_some_members_have_say_how_many():
    x, y = small_rows(300)

    def sampled(seed):
        return uw.Influence(
            small_network(seed), (x, y), loss="cross_entropy", l2=0.05, method="ekfac"
        )

    alone = [sampled(seed).explain(QUERIES).provenance.caveats for seed in range(6)]
    distinct = {text for told in alone for text in told}
    assert len(distinct) > 4
    found = uw.Ensemble([partial(sampled, seed) for seed in range(6)]).explain(QUERIES)
    listed = [text for text in found.provenance.caveats if " of 6 members: " in text]
    assert len(listed) == 3
    assert f"{len(distinct) - 3} more notes of members" in found.provenance.caveats


def test_values_have_the_precision_of_the_members():
    model = small_network(1).float()
    inf = uw.Influence(model, small_rows(), loss="cross_entropy", l2=0.05, method="ggn")
    found = uw.Ensemble.of(inf, states()).explain(QUERIES)
    assert found.values.dtype == np.float32


# Other questions


def test_extremes_and_audit_are_those_of_the_combined_scores():
    ensemble = uw.Ensemble.of(member(0), states(), WEIGHTS)
    scores = ensemble.explain(QUERIES)
    found = ensemble.extremes(QUERIES, k=3)
    for query in scores.query_ids:
        assert repr(found.top(query)) == repr(scores.top(query, 3))
        assert repr(found.bottom(query)) == repr(scores.bottom(query, 3))
    assert found.provenance.identity == scores.provenance.identity

    owns = averaged(lambda one: one.self_influence())
    close(ensemble.self_influence(), owns)
    table = ensemble.audit()
    order = np.argsort(-owns, kind="stable")
    assert table["id"].tolist() == order.tolist()
    close(table["self_influence"], owns[order])
    alone = [member(seed).audit() for seed in SEEDS]
    assert list(table.columns) == list(alone[0].columns)
    for name in ("loss", "margin"):
        mean = sum(c * one[name][np.argsort(one["id"])] for c, one in zip(MEAN, alone, strict=True))
        close(table[name], mean[order])
    votes = np.zeros((20, 2))
    for c, one in zip(MEAN, alone, strict=True):
        votes[one["id"], one["predicted_label"]] += c
    assert table["predicted_label"].tolist() == votes.argmax(1)[order].tolist()
    given = small_rows()[1].numpy()[order]
    assert table["given_label"].tolist() == given.tolist()
    assert table["is_label_issue"].tolist() == (table["predicted_label"] != given).tolist()
    assert len({tuple(one["id"]) for one in alone}) == 3  # members disagree


def test_scores_in_a_directory_are_the_same_and_go_on_after_a_failure(tmp_path, monkeypatch):
    ensemble = uw.Ensemble.of(member(0), states(), WEIGHTS)
    wanted = ensemble.explain(QUERIES)
    made = []

    def failing(seed):
        made.append(seed)
        if seed == 3 and made.count(3) == 2:
            raise KeyboardInterrupt
        return member(seed)

    def build():
        return uw.Ensemble([partial(failing, seed) for seed in SEEDS], WEIGHTS)

    with pytest.raises(KeyboardInterrupt):
        build().explain_into(tmp_path / "out", QUERIES)
    (part,) = tmp_path.iterdir()
    assert len(list((part / "members").glob(f"*/{MANIFEST}"))) == 2
    asked, explain_into = [], uw.Influence.explain_into

    def counting(self, path, queries):
        asked.append(path)
        return explain_into(self, path, queries)

    monkeypatch.setattr(uw.Influence, "explain_into", counting)
    with uw.memory("1 MiB"):
        found = build().explain_into(tmp_path / "out", QUERIES)
    assert len(asked) == 1  # the two that were done are read
    close(found.values, wanted.values)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("manifest.json", "scores.npy", "query_ids.npy", "train_ids.npy"),
        *("shares.npy", "residual.npy"),
    }
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert found.provenance.identity == wanted.provenance.identity
    assert found.provenance.caveats == wanted.provenance.caveats
    with pytest.raises(errors.StoreError, match="belongs to another run"):
        uw.Ensemble.of(member(0), states()).explain_into(tmp_path / "out", QUERIES)
    again = uw.Ensemble.of(member(0), states()).explain_into(
        tmp_path / "out", QUERIES, replace=True
    )
    close(again.values, uw.Ensemble.of(member(0), states()).explain(QUERIES).values)


def test_a_finished_run_that_was_not_moved_is_not_made_again(tmp_path, monkeypatch):
    ensemble = uw.Ensemble.of(member(0), states(), WEIGHTS)

    def killed(path, ignore_errors):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("upweight.ensemble.combined.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            ensemble.explain_into(tmp_path / "out", QUERIES)
    monkeypatch.setattr(type(ensemble), "_merge", None)
    found = ensemble.explain_into(tmp_path / "out", QUERIES)
    close(found.values, averaged(lambda one: one.explain(QUERIES).values))


def test_identity_tells_models_weights_kinds_and_queries_apart():
    plain = uw.Ensemble.of(member(0), states())
    others = [
        uw.Ensemble.of(member(0), states(), WEIGHTS),
        uw.Ensemble.of(member(0), states((1, 2, 4))),
        uw.Ensemble.of(member(0, l2=0.06), states()),
        uw.Ensemble.of(member(0, "no_hessian"), states()),
        uw.tracin(member(0, "no_hessian"), states(), [1 / 3] * 3),
    ]
    assert len({plain.identity, *(other.identity for other in others)}) == 6
    first = plain.explain(QUERIES).provenance.identity
    assert first != plain.explain(small_rows(4)).provenance.identity
    assert first != plain.explain(QUERIES, measure="margin").provenance.identity


# States


def test_states_come_from_dicts_and_files_alike(tmp_path):
    first, second, third = states()
    save_file(second, tmp_path / "second.safetensors")
    torch.save(third, tmp_path / "third.pt")
    found = uw.Ensemble.of(
        member(0), [first, str(tmp_path / "second.safetensors"), tmp_path / "third.pt"], WEIGHTS
    )
    close(found.explain(QUERIES).values, averaged(lambda one: one.explain(QUERIES).values))


class Counted(nn.Module):
    """A network with a buffer, all copies of which are known while they live."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()
    most: ClassVar[int] = 0

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x):
        Counted.alive.add(self)
        Counted.most = max(Counted.most, len(Counted.alive))
        return self.layers(x)


def test_models_are_in_memory_one_at_a_time_and_the_users_is_left_alone():
    torch.manual_seed(0)
    mine, found = Counted().double().eval(), []
    mine(small_rows()[0]).sum().backward()
    for _ in SEEDS:
        other = Counted().double()
        other(small_rows()[0])  # moves the running statistics
        found.append(other.state_dict())
        del other
    before = fingerprint([mine.state_dict(), [p.grad for p in mine.parameters()]])
    ensemble = uw.Ensemble.of(
        uw.Influence(mine, small_rows(), loss="cross_entropy", l2=0.05, method="ekfac"), found
    )
    gc.collect()
    gc.disable()
    try:
        Counted.most = 0
        values = ensemble.explain(QUERIES).values
        ensemble.audit()
        ensemble.extremes(QUERIES)
        assert Counted.most == 2  # the user's own was run when it was made
    finally:
        gc.enable()
    assert fingerprint([mine.state_dict(), [p.grad for p in mine.parameters()]]) == before
    assert not mine.training
    wanted = []
    for state in found:
        mine.load_state_dict(state)
        inf = uw.Influence(mine, small_rows(), loss="cross_entropy", l2=0.05, method="ekfac")
        wanted.append(inf.explain(QUERIES).values)
    close(values, np.mean(wanted, 0))


def test_members_keep_what_the_pattern_keeps_in_directories_of_their_own(tmp_path):
    pattern = member(0, "ekfac").keep(factors=tmp_path / "f", gradients=tmp_path / "g")
    ensemble = uw.Ensemble.of(pattern, states(), WEIGHTS)
    wanted = averaged(lambda one: one.explain(QUERIES).values, "ekfac")
    close(ensemble.explain(QUERIES).values, wanted)
    for folder in ("f", "g"):
        assert len(list((tmp_path / folder).glob(f"*/{MANIFEST}"))) == 3
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    close(ensemble.explain(QUERIES).values, wanted)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files


def test_another_state_answers_as_a_model_of_it_would():
    inf = member(0, "ggn", damping=0.3).at(states([5])[0])
    assert (inf.method.name, inf.damping) == ("ggn", 0.3)
    close(
        inf.explain(QUERIES).values, member(5, "ggn", damping=0.3).explain(QUERIES).values, rtol=0
    )


# TracIn


def at(problem, i, theta):
    return problem.loss(theta, i)


def steps(removal, measure="loss"):
    """Checkpoints of a training, learning rates, and the objective."""
    objectives = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = nn.Linear(3, 2).double()
        objectives.append(
            Objective(model, "cross_entropy", l2=0.3, removal=removal, measure=measure)
        )
    return objectives, [0.5, 0.1, 0.02]


@pytest.mark.parametrize("removal", ["mean", "sum"])
@pytest.mark.parametrize("name", ["softmax weighted", "mlp", "tied transformer"])
def test_tracin_is_a_loop_over_checkpoints_and_examples(name, removal):
    risk = next(case for case in CASES if case.name == name).risk(removal=removal)
    rates, found, own, n = [0.5, 0.1, 0.02], [], 0.0, len(risk.data)
    wanted = np.zeros((3, n))
    for rate in rates:
        for p in risk.objective.model.parameters():
            nn.init.normal_(p, std=0.3)
        found.append({k: v.clone() for k, v in risk.objective.model.state_dict().items()})
        problem, theta = as_reference(Risk(risk.objective, risk.data))
        slopes = [reference.gradient(partial(at, problem, i), theta) for i in range(n)]
        for q, i in itertools.product(range(3), range(n)):
            slope = slopes[i] + (problem.l2 * theta if removal == "mean" else 0)
            wanted[q, i] += rate * float(problem.shares[i] * slopes[q] @ slope)
        own = own + rate * np.array([[float(slopes[q] @ g) for g in slopes] for q in range(3)])
    inf = uw.Influence(risk.objective, risk.data, method="no_hessian")
    scores = uw.tracin(inf, found, rates).explain(risk.data.take(torch.arange(3)))
    close(scores.values, wanted)
    if removal == "sum":  # TracIn's own number, of positive = proponent
        weighted = scores.shares > 0
        close(-scores.upweight[:, weighted], own[:, weighted])
    assert (scores.meaning.helpful, scores.meaning.unit) == (1, "nats")
    assert scores.provenance.method == "tracin over 3: no_hessian"
    assert "one step of gradient descent" in scores.provenance.caveats[0]
    assert "0.62 in all" in scores.provenance.caveats[0]


@pytest.mark.parametrize("removal", ["mean", "sum"])
def test_tracin_is_what_leaving_an_example_out_of_one_step_changes(removal):
    """Exact for measures that are linear in the parameters, checkpoint by checkpoint."""
    objectives, rates = steps(removal, measure="logit")
    data = Data.of(small_rows(), weights=torch.linspace(0.5, 2, 20))
    x, y = QUERIES
    wanted = np.zeros((4, 20))
    for objective, rate in zip(objectives, rates, strict=True):
        problem, theta = as_reference(Risk(objective, data))
        for i in range(20):

            def without(t, i=i, problem=problem):
                l2 = 0.5 * (problem.l2 * t**2).sum() if removal == "mean" else 0.0
                return problem.risk(t) - problem.shares[i] * (problem.loss(t, i) + l2)

            ends = [
                theta - rate * reference.gradient(function, theta)
                for function in (without, problem.risk)
            ]
            after, before = (
                objective.measured("logit")(
                    objective.space.unflatten(end), objective.place(Data.of((x, y)).rows())
                )
                for end in ends
            )
            wanted[:, i] += (after - before).numpy()
    members = [uw.Influence(objective, data, method="no_hessian") for objective in objectives]
    close(TracIn(members, rates).explain(QUERIES).values, wanted, rtol=1e-9)


def test_tracin_of_all_examples_is_the_steps_themselves():
    """Σ_i score[q, i] = Σ_k η_k ∇m(q)·∇R(θ_k), with L2 inside each loss."""
    objectives, rates = steps("mean")
    members = [uw.Influence(one, small_rows(), method="no_hessian") for one in objectives]
    scores = TracIn(members, rates).explain(QUERIES)
    wanted = torch.zeros(4).double()
    for objective, rate in zip(objectives, rates, strict=True):
        problem, theta = as_reference(Risk(objective, Data.of(small_rows())))
        asked, _ = as_reference(Risk(objective, Data.of(QUERIES)))
        slope = reference.gradient(problem.risk, theta)
        for q in range(4):
            wanted[q] += rate * reference.gradient(partial(at, asked, q), theta) @ slope
    close(scores.values.sum(1), wanted)


def test_tracin_answers_the_other_questions_too(tmp_path):
    rates = [0.5, 0.1, 0.02]
    found = uw.tracin(member(0, "no_hessian"), states(), rates)
    whole = averaged(lambda one: one.explain(QUERIES).values, "no_hessian", coefficients=rates)
    close(found.explain_into(tmp_path / "out", QUERIES).values, whole)
    owns = averaged(lambda one: one.self_influence(), "no_hessian", coefficients=rates)
    close(found.self_influence(), owns)
    table = found.audit()
    assert table["id"].tolist() == np.argsort(-owns, kind="stable").tolist()
    mean = averaged(
        lambda one: one.audit()["loss"][np.argsort(one.audit()["id"])],
        "no_hessian",
        coefficients=np.array(rates) / sum(rates),
    )
    close(table["loss"], mean[table["id"]])
    largest = found.extremes(QUERIES, k=1).largest[:, 0]
    close(largest, whole.max(1))


# Refusals


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: uw.Ensemble([]), "There is no member. Pass at least one"),
        (lambda: uw.Ensemble.of(member(0), []), "There is no member"),
        (lambda: uw.tracin(member(0, "no_hessian"), [], []), "There is no member"),
        (lambda: uw.Ensemble.of(member(0), states(), [1, 2]), "3 members take one of the weights"),
        (lambda: uw.Ensemble.of(member(0), states(), [1, -1, 2]), "weights are finite, not neg"),
        (lambda: uw.Ensemble.of(member(0), states(), [0, 0, 0]), "not all 0"),
        (lambda: uw.Ensemble.of(member(0), states(), [1, np.nan, 1]), "are finite"),
        (lambda: uw.tracin(member(0, "no_hessian"), states(), [1]), "learning rates each, got 1"),
        (lambda: uw.tracin(member(0), states(), [1, 1, 1]), "made of gradient dot products"),
        (lambda: uw.tracin(member(0, "cosine"), states(), [1, 1, 1]), "this one's method is 'cos"),
        (lambda: uw.Ensemble(states()), "is an Influence or a function that makes one, got Ord"),
    ],
)
def test_what_cannot_be_combined_is_refused_at_once(make, says):
    with pytest.raises(errors.InputError, match=says):
        make()


X, Y = small_rows()
OTHERS = {
    "other ids": lambda: uw.Influence(
        small_network(), Data.of((X, Y), ids=range(1, 21)), loss="cross_entropy", l2=0.05
    ),
    "other training data": lambda: uw.Influence(
        small_network(), (X, 1 - Y), loss="cross_entropy", l2=0.05
    ),
    "another loss": lambda: uw.Influence(
        small_network(), (X, Y), loss=nn.CrossEntropyLoss(label_smoothing=0.1), l2=0.05
    ),
    "another removal convention": lambda: uw.Influence(
        Objective(small_network(), "cross_entropy", l2=0.05, removal="sum"), (X, Y)
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_members_of_another_kind_are_refused(what):
    ensemble = uw.Ensemble([member(1), OTHERS[what]])
    for ask in (lambda: ensemble.explain(QUERIES), ensemble.audit, lambda: ensemble.identity):
        with pytest.raises(errors.DataError, match=f"Member 1 of 2: It has {what} than the first"):
            ask()


def test_weights_of_examples_must_agree():
    data = [Data.of((X, Y), weights=w) for w in (torch.ones(20), torch.linspace(1, 2, 20))]
    members = [
        uw.Influence(small_network(), one, loss="cross_entropy", l2=0.05, method="ggn")
        for one in data
    ]
    with pytest.raises(errors.DataError, match="It has other training data than the first"):
        uw.Ensemble(members).explain(QUERIES)


def test_members_that_answer_in_other_units_are_refused():
    with pytest.raises(errors.InputError, match="Member 1 of 2 answers in 'nats per"):
        uw.Ensemble([member(1), member(2, "relatif")]).explain(QUERIES)
    with pytest.raises(errors.InputError, match=r"answers in 'cosine' \(gradient_similarity\)"):
        uw.Ensemble([member(1), member(2, "cosine")]).explain(QUERIES)
    with pytest.raises(errors.InputError, match="Member 1 of 2: TracIn is made of"):
        TracIn([member(1, "no_hessian"), member(2, "cosine")], [1, 1]).explain(QUERIES)


def test_what_stops_a_member_says_which():
    members = [member(1, "ggn"), partial(member, 2, "ekfac", l2=0.0), lambda: 3]
    with pytest.raises(errors.IndefiniteError, match="Member 1 of 3: The curvature is"):
        uw.Ensemble(members).explain(QUERIES)
    with pytest.raises(errors.InputError, match="Member 1 of 2: It is made as a int"):
        uw.Ensemble([member(1), lambda: 3]).explain(QUERIES)
    with pytest.raises(errors.InputError, match="k is at least 1"):
        uw.Ensemble([member(1)]).extremes(QUERIES, k=0)
    with pytest.raises(errors.InputError, match=r"Member 0 of 1: 'relatif' weighs"):
        uw.Ensemble([member(1, "relatif")]).audit()


def test_states_that_are_none_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no state")
    (tmp_path / "text.safetensors").write_text("no state")
    torch.save(small_network(), tmp_path / "model.pt")
    torch.save({"model": states()[0], "epoch": 3}, tmp_path / "more.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    for state, says in [
        (tmp_path / "absent.pt", "cannot be read as a state dict"),
        (tmp_path / "text.pt", "text.pt"),
        (tmp_path / "text.safetensors", "cannot be read as a state dict"),
        (tmp_path / "model.pt", "nothing else is unpickled"),
        (tmp_path / "more.pt", "it holds model, epoch. Pass the part"),
        (tmp_path / "tensor.pt", "is a Tensor and no state dict"),
        ({"model": states()[0]}, "The state is no state dict: it holds model"),
        ({}, "it holds nothing"),
        (3, "a state dict or a path of one, got int"),
        (nn.Linear(3, 2).state_dict(), "does not fit the model"),
        ({k: v[..., :1] for k, v in states()[0].items()}, "size mismatch"),
    ]:
        with pytest.raises(errors.InputError, match=says):
            member(0).at(state)
