"""What retraining finds, how it is kept, and what it can be asked."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upweight as uw
from upweight import reference
from upweight.errors import InputError, ModelError, NumericalError, StoreError
from upweight.evaluation.ceiling import ceiling, reliability, spearman_brown
from upweight.meaning import Meaning
from upweight.retraining import (
    SGD,
    Fresh,
    Own,
    Refit,
    Trained,
    Training,
    Trials,
    Truth,
    choosing,
    fit,
    recipes,
)
from upweight.retraining.journal import Journal
from upweight.retraining.retrain import retrain
from upweight.retraining.starts import begun
from upweight.retraining.together import Trainer
from upweight.risk import Risk

N, Q, L2 = 23, 4, 0.03
ROOT = Path(__file__).parent.parent


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=generator).double()
    return x, torch.randint(3, (N,), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


RECIPE = Training(3, 6, SGD(0.2, momentum=0.5))


def front(model: nn.Module) -> uw.Influence:
    return uw.Influence(model, data(), loss="cross_entropy", l2=L2)


def queries() -> tuple[Tensor, Tensor]:
    x, y = data()
    return x[:Q] + 0.3, y[:Q]


def subsets(count: int = 3, seeds=(0, 1)) -> Trials:
    return Trials.subsets(N, count=count, fraction=0.5, seeds=list(seeds))


def train(positions: np.ndarray, seed: int) -> nn.Module:
    """A user's own loop."""
    x, y = data()
    model = begun(network(), Fresh(), seed)
    optimiser = torch.optim.SGD(model.parameters(), 0.3, weight_decay=L2)
    for _ in range(5):
        optimiser.zero_grad()
        F.cross_entropy(model(x[positions]), y[positions]).backward()
        optimiser.step()
    return model.eval()


# A recipe


def test_the_model_at_hand_comes_back_with_its_own_seed():
    """Trained by the recipe itself, the model drifts by nothing; other seeds go elsewhere."""
    own = replace(RECIPE, seed=1)
    made = fit(uw.Objective(network(), "cross_entropy", l2=L2), data(), own)
    truth = front(made).retrain(queries(), subsets(), own)
    assert truth.own == 1
    assert truth.drift[1] < 1e-12 < 1e-2 < truth.drift[0]
    np.testing.assert_allclose(truth.whole[1], truth.at_hand, rtol=1e-12)
    assert truth.reproduced is True
    assert "gives the model at hand" in repr(truth)
    assert front(made).retrain(queries(), subsets(), RECIPE).reproduced is False


def test_rounding_is_measured_and_the_same_recipe_gives_the_same_bits():
    """A training that is chaotic in float32 says so; its own model comes back all the same."""
    (x, y), hot = data(), Training(300, 6, SGD(0.3, momentum=0.9))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 3))
    made = fit(uw.Objective(model, "cross_entropy"), (x, y), hot)
    inf = uw.Influence(made, (x, y), loss="cross_entropy")
    trials = Trials.subsets(N, count=3, fraction=0.8, seeds=[0])
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for at_once in (1, 4):
            plan = {"form": "stacked layers", "at_once": at_once, "together": True}
            patch.setattr(recipes.ByRecipe, "plan", lambda own, trials, known, plan=plan: plan)
            found[at_once] = inf.retrain(queries(), trials, hot)
    for truth in found.values():
        assert truth.drift.tolist() == [0.0]
        assert truth.reproduced
    assert found[1].notes == ()
    assert "rounding alone" in found[4].notes[0]


def test_training_leaves_the_model_and_the_random_state_alone():
    model = network()
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    front(model).retrain(queries(), subsets(), RECIPE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, known) for p, known in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_fresh_start_is_the_constructors():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
            self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 2)

    torch.manual_seed(8)
    built = Net()
    torch.manual_seed(9)
    found = begun(Net(), Fresh(), 8)
    for (name, value), (_, other) in zip(
        built.state_dict().items(), found.state_dict().items(), strict=True
    ):
        assert torch.equal(value, other), name


def test_weights_that_nothing_draws_are_refused_and_a_function_may_make_them():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x) * self.scale

    model = Scale().double()
    with pytest.raises(ModelError, match="draws scale anew.*start=function"):
        front(model).retrain(queries(), subsets(), RECIPE)
    with pytest.raises(ModelError, match="in its own way.*start=function"):
        begun(type("Own", (nn.Linear,), {"init_weights": lambda self: None})(2, 1), Fresh(), 0)
    frozen = Scale().double()
    frozen.scale.requires_grad_(False)
    assert torch.equal(begun(frozen, Fresh(), 3).scale, frozen.scale)

    def state(seed: int):
        torch.manual_seed(seed)
        return Scale().state_dict()

    started = begun(model, state, 5)
    torch.manual_seed(5)
    assert torch.equal(started.out.weight, Scale().out.weight.double())
    with pytest.raises(InputError, match="start\\(5\\) must return a state_dict"):
        begun(model, lambda seed: {}, 5)


def test_weights_that_resets_draw_twice_or_apart_are_refused():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ModelError, match="0.weight and 1.weight are one.*start=function"):
        begun(tied, Fresh(), 0)
    assert torch.equal(begun(tied, Trained(), 0)[1].weight, tied[0].weight)

    layer = nn.Linear(3, 3)
    begun(nn.Sequential(layer, nn.Tanh(), layer), Fresh(), 0)  # which one reset draws
    with pytest.raises(ModelError, match="0.0.weight and 1.0.weight are one"):
        begun(nn.Sequential(nn.Sequential(layer), nn.Sequential(layer)), Fresh(), 0)

    def stack(depth: int) -> nn.Module:
        return nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), depth, enable_nested_tensor=False
        )

    with pytest.raises(ModelError, match="begins with copies of one layer.*start=function"):
        begun(stack(2), Fresh(), 0)
    torch.manual_seed(3)
    built = stack(1).state_dict()
    for name, value in begun(stack(1), Fresh(), 3).state_dict().items():
        assert torch.equal(value, built[name])


class Features(nn.Module):
    """A head on features that its constructor draws, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("drawn", torch.randn(4, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cos(x @ self.drawn))


def test_buffers_of_each_seed_stay_with_their_models():
    def state(seed: int):
        torch.manual_seed(seed)
        return Features().state_dict()

    (x, y), model = data(), Features().double()
    recipe, trials = replace(RECIPE, start=state), subsets(seeds=[0, 1, 5])
    with pytest.MonkeyPatch.context() as patch:
        plan = {"form": "vectorised", "at_once": 4, "together": False}
        patch.setattr(recipes.ByRecipe, "plan", lambda own, trials, known: plan)
        truth = front(model).retrain(queries(), trials, recipe)
    for seed, gone, found in zip(trials.seeds.tolist(), trials.gone, truth.measured, strict=True):
        twin = begun(model, state, seed)
        optimiser = torch.optim.SGD(twin.parameters(), 0.2, 0.5, weight_decay=L2)
        for epoch in range(3):
            for batch in recipe.epoch(seed, epoch, N).split(6):
                kept = batch[~torch.from_numpy(gone)[batch]]
                optimiser.zero_grad()
                F.cross_entropy(twin(x[kept]), y[kept]).backward()
                optimiser.step()
        with torch.no_grad():
            wanted = F.cross_entropy(twin(queries()[0]), queries()[1], reduction="none")
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-10)


def test_an_order_of_ones_own():
    seen = []

    def order(seed: int, epoch: int, count: int) -> Tensor:
        seen.append((seed, epoch))
        return torch.arange(count - 3)

    recipe = Training(2, 6, SGD(0.1), start=Trained(), order=order)
    model, (x, y) = network(), data()
    trials = Trials.without([[0], [N - 1]], N, seeds=[7])
    truth = front(model).retrain(queries(), trials, recipe)
    assert {(7, 0), (7, 1)} <= set(seen)
    # The last three are never read, so that leaving one of them out changes nothing.
    assert truth.changes()[1].tolist() == [0] * Q
    optimiser = torch.optim.SGD(model.parameters(), 0.1, weight_decay=L2)
    for _ in range(2):
        for batch in torch.arange(N - 3).split(6):
            optimiser.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
    with torch.no_grad():
        wanted = F.cross_entropy(model(queries()[0]), queries()[1], reduction="none")
    np.testing.assert_allclose(truth.whole[0], wanted.numpy(), rtol=1e-10)
    wrong = Training(1, 6, SGD(0.1), order=lambda seed, epoch, count: torch.zeros(5))
    with pytest.raises(InputError, match="must return different positions"):
        front(network()).retrain(queries(), trials, wrong)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"epochs": 0}, "epochs is a whole number"),
        ({"batch_size": 2.5}, "batch_size is a whole number"),
        ({"optimiser": torch.optim.SGD}, "The optimiser is SGD"),
        ({"start": "fresh"}, "start is Fresh"),
    ],
)
def test_what_is_no_recipe_is_refused(settings, match):
    with pytest.raises(InputError, match=match):
        Training(**{"epochs": 1, "batch_size": 2, "optimiser": SGD(0.1), **settings})


def test_settings_out_of_range_are_refused():
    makers = [
        lambda: SGD(0), lambda: SGD(0.1, momentum=1), lambda: SGD(0.1, nesterov=True),
        lambda: uw.Adam(0.1, betas=(0.9, 1.0)), lambda: uw.AdamW(0.1, weight_decay=-1),
        lambda: Refit(rtol=0), lambda: Own(train, processes=-1), lambda: Own("train"),
    ]  # fmt: skip
    for make in makers:
        with pytest.raises(InputError):
            make()


def test_the_damping_of_a_finite_training_counts_its_schedule():
    recipe = Training(2, 6, SGD(0.2, momentum=0.5), schedule=lambda step, steps: step / steps)
    steps = 2 * 4
    mean = 0.2 * sum(step / steps for step in range(steps)) / steps
    assert recipe.finite(N).damping == pytest.approx(0.5 / (mean * steps))
    with pytest.raises(InputError, match="no gradient descent"):
        Training(2, 6, uw.Adam(0.1)).finite(N)


def test_parameters_outside_the_objective_are_refused():
    model = network()
    objective = uw.Objective(model, "cross_entropy", parameters=["2.*"])
    with pytest.raises(ModelError, match=r"0\.bias, 0\.weight require gradients too"):
        uw.Influence(objective, data()).retrain(queries(), subsets(), RECIPE)
    model[0].requires_grad_(False)
    truth = uw.Influence(uw.Objective(model, "cross_entropy"), data()).retrain(
        queries(), subsets(), RECIPE
    )
    assert np.isfinite(truth.measured).all()


# Train mode


class Dropping(nn.Module):
    """Dropout or batch statistics between two layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 5), inner, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


@pytest.mark.parametrize("inner", [nn.Dropout(0.4), nn.BatchNorm1d(5)])
def test_dropout_and_batch_statistics_work_as_in_train_mode(inner):
    """One after the other, masks from the seed; statistics those of the rows that remain."""
    torch.manual_seed(0)
    model = Dropping(inner).double().eval()
    trials = Trials.without([[2], [1, 5]], N, seeds=[0, 3])
    truth = front(model).retrain(queries(), trials, RECIPE)
    x, y = data()
    for seed, gone, found in zip(trials.seeds.tolist(), trials.gone, truth.measured, strict=True):
        twin = begun(model, Fresh(), seed)
        optimiser = torch.optim.SGD(twin.parameters(), 0.2, 0.5, weight_decay=L2)
        torch.manual_seed(seed)
        for epoch in range(3):
            for batch in RECIPE.epoch(seed, epoch, N).split(6):
                kept = ~torch.from_numpy(gone)[batch]
                rows = batch if isinstance(inner, nn.Dropout) else batch[kept]
                losses = F.cross_entropy(twin(x[rows]), y[rows], reduction="none")
                optimiser.zero_grad()
                losses[kept if len(rows) == len(batch) else slice(None)].mean().backward()
                optimiser.step()
        with torch.no_grad():
            wanted = F.cross_entropy(twin.eval()(queries()[0]), queries()[1], reduction="none")
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-9)


def test_a_minibatch_that_lost_all_its_rows_leaves_batch_statistics_alone():
    """And one row alone, which has none, fails its own trial."""
    torch.manual_seed(0)
    model = Dropping(nn.BatchNorm1d(5)).double().eval()
    recipe = replace(RECIPE, order=lambda seed, epoch, count: torch.arange(count))
    truth = front(model).retrain(
        queries(), Trials.without([range(6, 12), range(19, N)], N, seeds=[0]), recipe
    )
    assert list(truth.failures) == [1]
    assert "more than 1 value per channel" in truth.failures[1]
    x, y = data()
    twin = begun(model, Fresh(), 0)
    optimiser = torch.optim.SGD(twin.parameters(), 0.2, 0.5, weight_decay=L2)
    for _ in range(3):
        for start in range(0, N, 6):
            optimiser.zero_grad(set_to_none=False)
            if start != 6:
                F.cross_entropy(twin(x[start : start + 6]), y[start : start + 6]).backward()
            optimiser.step()
    with torch.no_grad():
        wanted = F.cross_entropy(twin.eval()(queries()[0]), queries()[1], reduction="none")
    np.testing.assert_allclose(truth.measured[0], wanted.numpy(), rtol=1e-9)


def test_rows_that_change_each_other_by_no_known_layer_are_seen():
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0) if self.training else x

    model = Dropping(Centred()).double().eval()
    risk = Risk(uw.Objective(model, "cross_entropy"), uw.Data.of(data()))
    trainer = Trainer(risk, RECIPE)
    assert trainer.coupled
    assert not Trainer(Risk(uw.Objective(network(), "cross_entropy"), risk.data), RECIPE).coupled
    assert choosing.fastest(trainer, subsets()).at_once == 1


# Which way


def test_the_way_is_the_fastest_that_gives_autograds_gradients(monkeypatch):
    trainer = Trainer(
        Risk(uw.Objective(network(), "cross_entropy", l2=L2), uw.Data.of(data())), RECIPE
    )
    trials = subsets(count=20, seeds=[0])
    monkeypatch.setattr(choosing._Race, "_seconds", lambda race, way: 1e-4 / way.at_once)
    assert choosing.fastest(trainer, trials).at_once == 16
    monkeypatch.setattr(
        choosing._Race, "_seconds", lambda race, way: 1e-4 / (way.at_once + way.together)
    )
    assert choosing.fastest(trainer, trials).words() == "stacked layers, 16 at once"
    assert choosing.fastest(trainer, trials).together
    monkeypatch.setattr(choosing._Race, "_seconds", lambda race, way: 1e-4 * way.at_once)
    assert choosing.fastest(trainer, trials).name == "autograd"
    wrong = choosing.Layers.__call__
    monkeypatch.setattr(choosing._Race, "_seconds", lambda race, way: 1e-4 / way.at_once)
    monkeypatch.setattr(
        choosing.Layers, "__call__", lambda *args: [1.01 * part for part in wrong(*args)]
    )
    assert choosing.fastest(trainer, trials).name == "vectorised"


def test_more_models_are_in_step_than_in_a_pass_where_that_is_faster(monkeypatch):
    trainer = Trainer(
        Risk(uw.Objective(network(), "cross_entropy", l2=L2), uw.Data.of(data())), RECIPE
    )
    trials = subsets(count=30, seeds=[0])

    def seconds(race: choosing._Race, way: choosing.Way) -> float:
        return 1e-4 if way.together or way.at_once > 4 else 1e-4 / (way.at_once * way.pool)

    monkeypatch.setattr(choosing._Race, "_seconds", seconds)
    way = choosing.fastest(trainer, trials)
    assert (way.at_once, way.pool, way.together) == (4, 30, False)
    assert way.words() == "stacked layers, 4 of 30 at once"
    parts = [part for part in choosing.chunks(trials, way) if len(part) > 1]
    assert [len(part) for part in parts] == [30]

    def exhausted(race: choosing._Race, way: choosing.Way) -> float:
        if way.pool > 2:
            raise torch.OutOfMemoryError
        return 1e-4 / way.pool

    monkeypatch.setattr(choosing._Race, "_seconds", exhausted)
    assert choosing.fastest(trainer, trials).pool == 2
    monkeypatch.setattr(choosing._Race, "_seconds", lambda race, way: 1e-4 * way.pool / way.at_once)
    assert choosing.fastest(trainer, trials).pool == 1


def test_models_at_once_stay_within_the_memory_budget(monkeypatch):
    x, y = torch.randn(40, 300).double(), torch.arange(40) % 2
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 2)).double()
    trainer = Trainer(Risk(uw.Objective(model, "cross_entropy"), uw.Data.of((x, y))), RECIPE)
    trials = Trials.subsets(40, count=64, fraction=0.5, seeds=[0])
    monkeypatch.setattr(choosing._Race, "_seconds", lambda race, way: 1e-4 / way.at_once)
    with uw.memory("16 MiB"):
        pool = choosing.fastest(trainer, trials).pool
    assert 2 <= pool <= 16 * 2**20 / (3 * 8 * 60_000)


# Files


def study(path, trials, **more) -> Truth:
    return front(network()).retrain(queries(), trials, more.get("how", RECIPE), path)


def same(one: Truth, other: Truth) -> None:
    np.testing.assert_allclose(one.measured, other.measured, rtol=1e-12)
    np.testing.assert_allclose(one.whole, other.whole, rtol=1e-12)


def test_longer_studies_take_what_shorter_ones_found(tmp_path, monkeypatch):
    short = study(tmp_path / "a", subsets(count=2))
    trained = []
    run = recipes.Trainer.run
    monkeypatch.setattr(
        recipes.Trainer,
        "run",
        lambda own, part, way: trained.append(len(part)) or run(own, part, way),
    )
    longer = study(tmp_path / "a", subsets(count=4))
    assert sum(trained) == 4
    np.testing.assert_array_equal(longer.measured[:4], short.measured)
    trained.clear()
    same(longer, study(None, subsets(count=4)))
    # Two wholes by themselves, and one of them again beside the others, to see what rounding does.
    assert sum(trained) in (2 + 8, 2 + 8 + 1)
    trained.clear()
    again = study(tmp_path / "a", subsets(count=3, seeds=[1]))
    assert not trained
    np.testing.assert_array_equal(again.measured, longer.measured[1:6:2])


def test_a_study_serves_other_models_of_its_recipe_but_not_their_distances(tmp_path):
    first = study(tmp_path / "a", subsets(count=1))
    model = begun(network(), Fresh(), 3).eval()
    other = front(model).retrain(queries(), subsets(count=2), RECIPE, tmp_path / "a")
    np.testing.assert_array_equal(other.whole, first.whole)
    assert np.isfinite(first.drift).all()
    assert np.isnan(other.drift).all()
    assert np.isfinite(study(tmp_path / "a", subsets(count=2)).drift).all()


def test_a_directory_of_another_study_is_refused(tmp_path):
    study(tmp_path / "a", subsets(count=1))
    for how in (Training(4, 6, RECIPE.optimiser), train):
        with pytest.raises(StoreError, match="belongs to another run"):
            study(tmp_path / "a", subsets(count=1), how=how)


KILLED = """
    import os, signal, sys
    from tests import test_truth as t
    from upweight.retraining import journal

    put = journal.Journal.put

    def once(self, key, measured, moved):
        put(self, key, measured, moved)
        if len(self.known) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    journal.Journal.put = once
    t.study(sys.argv[1], t.subsets(), how=t.HOWS[sys.argv[3]])
"""
HOWS = {"function": Own(train, processes=0), "recipe": RECIPE}


@pytest.mark.parametrize(("how", "known"), [("function", 3), ("recipe", 5)])
def test_a_killed_study_goes_on_where_it_was(tmp_path, how, known):
    """And ends with the same bits as one that was not killed, by the plan that it had."""
    place, code = tmp_path / "a", textwrap.dedent(KILLED)
    command = [sys.executable, "-c", code, str(place), str(known), how]
    done = subprocess.run(command, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(Journal(place, journal_identity(place), Q).known) == known
    whole = tmp_path / "b"
    whole.mkdir()
    manifest, plan = (place / "manifest.json").read_bytes(), (place / "plan-0.json").read_bytes()
    (whole / "manifest.json").write_bytes(manifest)
    (whole / "plan-0.json").write_bytes(plan)
    found, wanted = (study(path, subsets(), how=HOWS[how]) for path in (place, whole))
    np.testing.assert_array_equal(found.measured, wanted.measured)
    np.testing.assert_array_equal(found.whole, wanted.whole)
    assert len(Journal(place, journal_identity(place), Q).known) == 8


def journal_identity(place) -> str:
    return uw.store.read_manifest(place)["identity"]


def test_a_torn_row_counts_as_absent(tmp_path):
    study(tmp_path / "a", subsets(count=1))
    rows = np.lib.format.open_memmap(tmp_path / "a" / "measured-0.npy", mode="r+")
    rows[1, 0] += 1
    rows.flush()
    with Journal(tmp_path / "a", journal_identity(tmp_path / "a"), Q) as journal:
        assert len(journal.known) == 3
    same(study(tmp_path / "a", subsets(count=1)), study(None, subsets(count=1)))


def test_one_process_at_a_time_has_a_directory(tmp_path):
    """And what it wrote stays as it is, whatever another one asks for."""
    place = tmp_path / "a"
    other = [sys.executable, "-c", textwrap.dedent(SECOND), str(place)]
    with Journal(place, "id", 1) as journal:
        journal.expect(["one", "two"])
        journal.put("one", np.array([1.0]), 0.0)
        said = subprocess.run(other, cwd=ROOT, check=False, capture_output=True, text=True)
        assert "is in use: another run writes its outcomes there" in said.stdout
        journal.put("two", np.array([2.0]), 0.0)
    done = subprocess.run(other, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL  # a lock of the dead holds nobody
    known = Journal(place, "id", 1).known
    assert {key: row[0] for key, row in known.items()} == {"one": 1.0, "two": 2.0, "three": 3.0}


SECOND = """
    import os, signal, sys
    import numpy as np
    from upweight.retraining.journal import Journal

    try:
        journal = Journal(sys.argv[1], "id", 1)
    except OSError as error:
        print(error)
    else:
        journal.expect(["three"])
        journal.put("three", np.array([3.0]), 0.0)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_outcome_under_another_name_counts_as_absent(tmp_path):
    with Journal(tmp_path / "a", "id", 1) as journal:
        journal.expect(["one", "two"])
        for key in ("one", "two"):
            journal.put(key, np.array([1.0]), 0.0)
    np.save(tmp_path / "a" / "keys-0.npy", np.array(["one", "six"]))
    assert list(Journal(tmp_path / "a", "id", 1).known) == ["one"]


def test_a_full_disk_says_so_and_keeps_what_is_there(tmp_path, monkeypatch):
    study(tmp_path / "a", subsets(count=1))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="No space left on device"):
        study(tmp_path / "a", subsets(count=2))
    monkeypatch.undo()
    same(study(tmp_path / "a", subsets(count=2)), study(None, subsets(count=2)))


def test_a_truth_round_trips(tmp_path):
    for number, trials in enumerate(
        (subsets(), Trials.relabelled([3, 4], np.array([0, 2]), N, seeds=[0]))
    ):
        truth = study(None, trials)
        truth.save(tmp_path / str(number))
        found = Truth.load(tmp_path / str(number))
        same(found, truth)
        np.testing.assert_array_equal(found.trials.gone, trials.gone)
        np.testing.assert_array_equal(found.trials.keys(), trials.keys())
        np.testing.assert_array_equal(found.drift, truth.drift)
        assert (found.meaning, found.how, found.own) == (truth.meaning, truth.how, truth.own)
        assert repr(found) == repr(truth)
    file = tmp_path / "0" / "truth.npz"
    whole = file.read_bytes()
    torn = bytearray(whole)
    torn[len(whole) // 3 : len(whole) // 2] = b"?" * (len(whole) // 2 - len(whole) // 3)
    for damaged in (b"no", b"", whole[:-40], whole[: len(whole) // 2], bytes(torn)):
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match="no truth that can be read"):
            Truth.load(tmp_path / "0")


# A function of one's own


def test_a_function_of_ones_own_is_called_for_every_trial():
    asked = subsets(count=2)
    here = study(None, asked, how=Own(train, processes=0))
    assert here.notes == ()
    x, y = queries()
    for seed, gone, found in zip(asked.seeds, asked.gone, here.measured, strict=True):
        outputs = train(np.flatnonzero(~gone), int(seed))(x).detach()
        wanted = F.cross_entropy(outputs, y, reduction="none")
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-12)


def test_a_function_that_cannot_be_sent_runs_here_and_says_so():
    truth = study(None, subsets(count=1), how=Own(lambda *asked: train(*asked), processes=2))  # noqa: PLW0108
    assert truth.notes == ("called in this process, as the function cannot be sent to others",)


def test_a_training_that_diverged_has_failed():
    x, y = data()
    x[2] *= 1e200
    inf = uw.Influence(network(), (x, y), loss="cross_entropy")
    recipe = Training(2, 6, SGD(1e150))
    with pytest.raises(NumericalError, match="all of the data failed.*not finite"):
        inf.retrain(queries(), Trials.without([[1]], N, seeds=[0]), recipe)


def test_processes_that_cannot_import_the_function_leave_it_to_this_one():
    """As in a notebook: pickled by a name that is known here alone."""
    here = sys.modules[__name__]

    def only_here(positions, seed):
        return train(positions, seed)

    only_here.__qualname__ = only_here.__name__ = "only_here"
    here.only_here = only_here
    try:
        truth = study(None, subsets(count=1, seeds=[0]), how=Own(only_here, processes=2))
    finally:
        del here.only_here
    assert truth.notes == ("called in this process, as others could not import the function",)
    assert np.isfinite(truth.measured).all()


def failing(positions, seed):
    if 2 not in positions:
        raise ValueError("the second example is needed")
    return train(positions, seed)


def dying(positions, seed):
    if 2 not in positions:
        os._exit(9)
    return train(positions, seed)


@pytest.mark.parametrize(("function", "processes"), [(failing, 0), (dying, 2)])
def test_one_failure_is_listed_and_the_rest_goes_on(tmp_path, function, processes):
    trials = Trials.without([[1], [2], [3]], N, seeds=[0])
    truth = study(tmp_path / "a", trials, how=Own(function, processes=processes))
    assert list(truth.failures) == [1]
    said = truth.failures[1]
    assert said == "ValueError: the second example is needed" or "ended without an answer" in said
    np.testing.assert_array_equal(np.isnan(truth.measured).all(1), [False, True, False])
    assert truth.notes == ()
    wanted = study(None, trials, how=Own(train, processes=0))
    np.testing.assert_allclose(truth.measured[[0, 2]], wanted.measured[[0, 2]], rtol=1e-12)
    np.testing.assert_allclose(truth.drift, wanted.drift, rtol=1e-12)
    assert "1 failed" in repr(truth)


def test_nothing_can_be_measured_against_a_failure():
    def broken(positions, seed):
        raise ValueError("no")

    with pytest.raises(NumericalError, match="all of the data failed.*ValueError: no"):
        study(None, subsets(count=1), how=Own(broken, processes=0))
    with pytest.raises(NumericalError, match="must return a torch.nn.Module, got int"):
        study(None, subsets(count=1), how=Own(lambda p, seed: 3, processes=0))


def test_what_is_not_deterministic_is_noise_and_is_said():
    calls = []

    def shaky(positions, seed):
        calls.append(seed)
        model = train(positions, seed)
        with torch.no_grad():
            model[2].bias[0].add_(0.01 * len(calls))
        return model

    truth = study(None, subsets(count=1), how=Own(shaky, processes=0))
    assert "not deterministic: two runs of one trial differ by up to" in truth.notes[0]
    assert "not deterministic" in repr(truth)
    assert len(calls) == 5


CALLS = itertools.count()


def shaking(positions: np.ndarray, seed: int) -> nn.Module:
    """Another model at every call."""
    model = train(positions, seed)
    with torch.no_grad():
        model[2].bias[0].add_(0.01 * next(CALLS))
    return model


def test_what_was_said_of_outcomes_stays_with_them(tmp_path):
    how = Own(shaking, processes=0)
    first = study(tmp_path / "a", subsets(count=1), how=how)
    assert "not deterministic" in first.notes[0]
    assert study(tmp_path / "a", subsets(count=1), how=how).notes == first.notes
    longer = study(tmp_path / "a", subsets(count=2), how=how)
    assert longer.notes[0] == first.notes[0]
    assert len(longer.notes) == 2


def test_a_damaged_plan_is_refused(tmp_path):
    study(tmp_path / "a", subsets(count=1))
    (tmp_path / "a" / "plan-0.json").write_text("")
    with pytest.raises(StoreError, match="plan-0.json is damaged.*run again"):
        study(tmp_path / "a", subsets(count=1))


@pytest.mark.parametrize("how", [RECIPE, Refit()])
def test_labels_that_are_none_are_refused(how):
    for label, match in (
        (np.array([1.9]), "not a value of the targets' dtype.*rounded"),
        (np.array([7]), "7"),
        (np.array([[0, 1]]), "must have the shape of the old ones"),
    ):
        model = network() if how is RECIPE else nn.Linear(4, 3).double()
        trials = Trials.relabelled([3], label, N, seeds=[0])
        with pytest.raises(InputError, match=match):
            front(model).retrain(queries(), trials, how)


def test_subsets_all_differ():
    every = Trials.subsets(4, count=6, fraction=0.5, seeds=[0])
    assert len(set(every.changes())) == 6
    few = Trials.subsets(4, count=3, fraction=0.5, seeds=[0])
    np.testing.assert_array_equal(few.gone, every.gone[:3])
    with pytest.raises(InputError, match="there are 6 different subsets of 2, and count=7"):
        Trials.subsets(4, count=7, fraction=0.5, seeds=[0])


STEPS: dict[str, int] = {"of": 5}
LOG: list[int] = []


def logging_train(positions: np.ndarray, seed: int) -> nn.Module:
    LOG.append(STEPS["of"])
    return train(positions, seed)


def test_outcomes_are_of_the_function_as_it_is_but_for_what_it_changes_itself(
    tmp_path, monkeypatch
):
    how = Own(logging_train, processes=0)
    first = study(tmp_path / "a", subsets(count=1), how=how)
    calls = len(LOG)
    longer = study(tmp_path / "a", subsets(count=2), how=how)
    assert len(LOG) < 2 * calls
    np.testing.assert_array_equal(longer.measured[:2], first.measured)
    monkeypatch.setitem(STEPS, "of", 6)
    with pytest.raises(StoreError, match="belongs to another run"):
        study(tmp_path / "a", subsets(count=2), how=how)


def test_outcomes_are_of_the_model_as_it_computes(tmp_path):
    class Heated(nn.Module):
        def __init__(self, heat: float) -> None:
            super().__init__()
            self.layer, self.heat = nn.Linear(4, 3), heat

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) / self.heat

    def ask(heat: float) -> Truth:
        torch.manual_seed(0)
        model = Heated(heat).double()
        return front(model).retrain(queries(), subsets(count=1), RECIPE, tmp_path / "a")

    same(ask(1.0), ask(1.0))
    with pytest.raises(StoreError, match="belongs to another run"):
        ask(0.5)


def test_functions_take_no_labels():
    trials = Trials.relabelled([3], np.array([0]), N, seeds=[0])
    with pytest.raises(InputError, match="cannot give examples other labels"):
        study(None, trials, how=Own(train, processes=0))


# Ridge, in closed form


def ridge_case():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 4, generator=generator).double()
    y = torch.randn(N, generator=generator).double()
    model = nn.Linear(4, 1, bias=False).double()
    theta = reference.ridge(x, y, L2, torch.full((N,), 1 / N).double())
    with torch.no_grad():
        model.weight.copy_(theta[None])
    return model, x, y


def measured(theta: Tensor, asked) -> Tensor:
    return (asked[0] @ theta - asked[1]).square()


@pytest.mark.parametrize("removal", ["mean", "sum"])
def test_refits_of_ridge_are_its_closed_form(removal):
    model, x, y = ridge_case()
    inf = uw.Influence(uw.Objective(model, "mean_squared_error", l2=L2, removal=removal), (x, y))
    asked = (x[:Q] + 0.5, y[:Q])
    singles = Trials.without([[i] for i in range(N)], N, seeds=[0])
    designs = [singles, Trials.without([[0, 4, 7], [1, 2]], N, seeds=[0, 1]), subsets(count=4)]
    for trials in designs:
        truth = inf.retrain(asked, trials, Refit())
        for gone, found in zip(trials.gone, truth.measured, strict=True):
            kept = (~torch.from_numpy(gone)).double()
            total = kept.sum() if removal == "mean" else float(N)
            wanted = measured(reference.ridge(x, y, L2, kept / total), asked)
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-8)
        np.testing.assert_allclose(
            truth.whole[0], measured(model.weight.detach()[0], asked), rtol=1e-8
        )
        assert truth.reproduced
    if removal == "sum":
        moved, _ = reference.ridge_leave_one_out(x, y, L2)
        found = inf.retrain(asked, singles, Refit()).measured
        theta = model.weight.detach()[0]
        wanted = torch.stack([measured(theta + step, asked) for step in moved])
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-8)


def test_relabelled_ridge_is_its_closed_form_by_refit_and_by_training():
    model, x, y = ridge_case()
    inf = uw.Influence(model, (x, y), loss="mean_squared_error", l2=L2)
    asked, new = (x[:Q], y[:Q]), np.array([3.0, -2.0, 0.5])
    trials = Trials.relabelled([1, 8, 20], new, N, seeds=[0])
    long = Training(300, N, SGD(0.1, momentum=0.8), start=Trained())
    for how in (Refit(), long):
        truth = inf.retrain(asked, trials, how)
        for place, label, found in zip([1, 8, 20], new, truth.measured, strict=True):
            changed = y.clone()
            changed[place] = label
            theta = reference.ridge(x, changed, L2, torch.full((N,), 1 / N).double())
            np.testing.assert_allclose(found, measured(theta, asked).numpy(), rtol=1e-8)


def test_a_training_to_the_end_of_ridge_is_its_closed_form():
    model, x, y = ridge_case()
    inf = uw.Influence(model, (x, y), loss="mean_squared_error", l2=L2)
    asked = (x[:Q] + 0.5, y[:Q])
    trials = subsets(count=2).then(Trials.without([[0]], N, seeds=[0, 1]))
    truth = inf.retrain(asked, trials, Training(400, N, SGD(0.1, momentum=0.8)))
    for gone, found in zip(trials.gone, truth.measured, strict=True):
        kept = (~torch.from_numpy(gone)).double()
        wanted = measured(reference.ridge(x, y, L2, kept / kept.sum()), asked)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-8)


def test_refits_that_reach_no_minimum_say_so():
    model = network()
    with pytest.raises(uw.errors.NumericalError):
        front(model).retrain(queries(), subsets(), Refit())


def test_refits_cannot_remove_and_relabel_at_once():
    model, x, y = ridge_case()
    inf = uw.Influence(model, (x, y), loss="mean_squared_error", l2=L2)
    new = Trials.relabelled([1], np.array([2.0]), N, seeds=[0])
    gone = new.gone.copy()
    gone[0, 5] = True
    with pytest.raises(InputError, match="either removes or relabels"):
        inf.retrain((x[:1], y[:1]), Trials("both", gone, new.seeds, new.relabels), Refit())


# Trials


def test_trials_join_split_and_are_known_by_what_they_are():
    singles = Trials.without([[1], [2]], N, seeds=[0, 1])
    new = Trials.relabelled([3, 5], np.array([0, 1]), N, seeds=[1])
    both = singles.then(new)
    assert len(both) == 6
    assert both.relabels.trial.tolist() == [4, 5]
    back = both.take(np.array([5, 0]))
    assert back.relabels.trial.tolist() == [0]
    assert back.relabels.position.tolist() == [5]
    assert back.keys().tolist() == [new.keys()[1], singles.keys()[0]]
    assert len(set(both.keys().tolist())) == 6
    assert len(set(both.changes().tolist())) == 4
    assert both.take(np.array([0, 1])).relabels is None
    with pytest.raises(InputError, match="do not join"):
        both.then(Trials.whole(3, [0]))
    with pytest.raises(InputError, match="Every new label"):
        Trials.relabelled([N], np.array([0]), N, seeds=[0])
    with pytest.raises(InputError, match="2 positions need as many labels"):
        Trials.relabelled([1, 2], np.array([0]), N, seeds=[0])


# Two questions, and the ceiling


def truth_of(changes: np.ndarray, own: int | None = 0) -> Truth:
    """A truth with given changes ``[s, u, q]``."""
    s, u, q = changes.shape
    trials = Trials.without([[i] for i in range(u)], u + 1, seeds=list(range(s)))
    whole = np.arange(s * q, dtype=float).reshape(s, q)
    rows = (changes + whole[:, None]).swapaxes(0, 1).reshape(-1, q)
    meaning = Meaning("loss", "nats", 1)
    return Truth(trials, np.arange(q), rows, whole, np.arange(s), meaning, "", {}, own=own)


def test_this_model_and_on_average_are_read_off_the_seeds():
    changes = np.random.default_rng(0).standard_normal((3, 5, 2))
    truth = truth_of(changes, own=2)
    np.testing.assert_allclose(truth.by_seed()[1], changes)
    np.testing.assert_allclose(truth.this_model(), changes[2])
    np.testing.assert_allclose(truth.on_average(), changes.mean(0))
    shuffled = truth.trials.take(np.random.default_rng(1).permutation(15))
    keys = truth.trials.keys().tolist()
    order = [keys.index(key) for key in shuffled.keys().tolist()]
    mixed = Truth(
        shuffled, truth.query_ids, truth.measured[order], truth.whole, truth.seeds, truth.meaning,
        "", {},
    )  # fmt: skip
    gone, found = mixed.by_seed()
    places = [np.flatnonzero(row)[0] for row in gone]
    np.testing.assert_allclose(found, changes[:, places])
    with pytest.raises(InputError, match="made with seed 9"):
        truth_of(changes, own=9).this_model()
    part = truth.trials.take(np.arange(14))
    lacking = Truth(
        part, truth.query_ids, truth.measured[:14], truth.whole, truth.seeds, truth.meaning, "", {}
    )
    with pytest.raises(InputError, match="every change with every seed once"):
        lacking.by_seed()


def test_the_ceiling_is_what_the_effect_itself_reaches():
    """With many changes of the data, the root of the reliability is the effect's correlation."""
    generator = np.random.default_rng(0)
    effect = generator.standard_normal((1, 20_000, 1))
    changes = effect + 1.5 * generator.standard_normal((4, 20_000, 1))
    truth = truth_of(changes[:, :50])
    for seeds in (1, 4):
        found = ceiling(changes, seeds=seeds)
        mean = changes[:seeds].mean(0)[:, 0]
        assert found.pearson[0] == pytest.approx(np.corrcoef(mean, effect[0, :, 0])[0, 1], abs=0.01)
        assert found.seeds == seeds
        assert found.means[1] == pytest.approx(found.means[0], abs=0.03)
    assert truth.ceiling().seeds == 4
    np.testing.assert_array_equal(
        truth.ceiling(seeds=1).pearson, ceiling(changes[:, :50], seeds=1).pearson
    )


def test_the_ceiling_of_one_seed_is_unknown_and_noise_alone_has_none():
    found = ceiling(np.random.default_rng(0).standard_normal((1, 9, 3)), seeds=1)
    assert np.isnan(found.pearson).all()
    assert np.isnan(found.means).all()
    assert "unknown" in str(found)
    against = np.arange(9.0)[None, :, None] * np.array([1, -1])[:, None, None]
    assert ceiling(against, seeds=2).pearson.tolist() == [0]
    with pytest.raises(InputError):
        ceiling(against, seeds=0)
    with pytest.raises(InputError):
        reliability(against[0])
    np.testing.assert_allclose(spearman_brown(np.array([0.25]), 3), [0.5])


def test_failed_trials_are_left_out_of_the_ceiling():
    changes = np.random.default_rng(0).standard_normal((2, 8, 3))
    truth = truth_of(changes)
    truth.measured[6] = np.nan
    kept = np.delete(np.arange(8), 3)
    np.testing.assert_allclose(
        truth.ceiling(seeds=2).pearson, ceiling(changes[:, kept], seeds=2).pearson
    )
    assert np.isnan(truth.on_average()[3]).all()


def test_queries_and_trials_are_checked():
    risk = Risk(uw.Objective(network(), "cross_entropy"), uw.Data.of(data()))
    with pytest.raises(InputError, match="of 7 examples"):
        retrain(risk, uw.Data.of(queries()), Trials.whole(7, [0]), RECIPE)
    with pytest.raises(InputError, match="queries cannot be run"):
        retrain(risk, uw.Data.of((torch.zeros(2, 9), torch.zeros(2).long())), subsets(), RECIPE)
