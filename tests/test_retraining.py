"""Trainings by a recipe against plain torch loops, one model after the other."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import upweight as uw
from tests.cases import Scaled, Tied, Tokens
from upweight.data import Data
from upweight.errors import InputError
from upweight.retraining import (
    SGD,
    Adam,
    AdamW,
    Cosine,
    Drops,
    Fresh,
    Linear,
    Trained,
    Training,
    Trials,
    choosing,
)
from upweight.retraining.layers import Layers, stages_of
from upweight.retraining.slopes import Mapped, Single
from upweight.retraining.starts import begun
from upweight.retraining.together import Trainer, Way
from upweight.risk import Risk

N, L2 = 23, 0.03
COUNT = 5

ONE = Way(Single, "autograd", 1, together=False)
WAYS = {
    "one": ONE,
    "layers": Way(Layers, "layers", 3, together=False),
    "layers, shared rows": Way(Layers, "layers", 3, together=True),
    "vectorised": Way(Mapped, "vectorised", 4, together=False),
    "vectorised, of a pool": Way(Mapped, "vectorised", 2, together=False, pool=6),
    "layers, of a pool": Way(Layers, "layers", 2, together=False, pool=6),
    "vectorised, shared rows": Way(Mapped, "vectorised", 2, together=True),
}


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(seed)).double()


def labels(c: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(c, (N, *shape), generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.ReLU(),
        nn.Linear(4, 3), nn.Sigmoid(),
    )  # fmt: skip


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 2, stride=2), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )


class Attending(nn.Module):
    """Tokens, attention, a norm and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = Tokens()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens.norm(self.tokens.embed(tokens))
        h = h + self.attend(h, h, h, need_weights=False)[0]
        return self.tokens.head(torch.tanh(self.tokens.mix(h.mT).mean(2)))


def problem(name: str):
    """A model, its data and its loss."""
    made = {
        "mlp": (mlp, (rows(2, 2), labels(3)), "cross_entropy"),
        "softmax": (lambda: nn.Linear(4, 3), (rows(4), labels(3)), "cross_entropy"),
        "conv": (conv, (rows(1, 4, 4), labels(3)), "cross_entropy"),
        "ridge": (lambda: nn.Linear(4, 1, bias=False), (rows(4), rows(seed=2)), nn.MSELoss()),
        "attention": (Attending, (labels(7, 3, seed=3), labels(2)), "cross_entropy"),
        "scaled": (Scaled, (rows(4, 3), labels(2)), "cross_entropy"),
        "own loss": (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
            (rows(4), rows(2, seed=2)),
            lambda outputs, targets: (outputs - targets).abs().pow(3).sum(1) / 50,
        ),
    }[name]
    torch.manual_seed(4)
    return made[0]().double(), made[1], made[2]


def criterion(loss):
    """The loss of each example, as torch has it."""
    if loss == "cross_entropy":
        return lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none")
    if isinstance(loss, nn.MSELoss):
        return lambda outputs, targets: (outputs[:, 0] - targets).square()
    return loss


def trials(seeds=(0, 1)) -> Trials:
    return Trials.subsets(N, count=2, fraction=0.5, seeds=seeds).then(
        Trials.without([[3], [1, 2, 5]], N, seeds=seeds)
    )


def by_torch(model, data, loss, *, training, seed, gone, l2=L2, weights=None, made=None):
    """A plain loop with torch's own optimiser; the parameters in one row."""
    x, y = data
    model = begun(model, training.start, seed)
    rule = training.optimiser
    if isinstance(rule, SGD):
        optimiser = torch.optim.SGD(
            model.parameters(), rule.lr, rule.momentum, nesterov=rule.nesterov, foreach=False
        )
    elif isinstance(rule, Adam):
        optimiser = torch.optim.Adam(model.parameters(), rule.lr, rule.betas, rule.eps)
    else:
        optimiser = torch.optim.AdamW(
            model.parameters(), rule.lr, rule.betas, rule.eps, rule.weight_decay
        )
    step, each = 0, -(-N // training.batch_size)
    w = torch.ones(N).double() if weights is None else weights
    for epoch in range(training.epochs):
        for batch in training.epoch(seed, epoch, N).split(training.batch_size):
            kept = batch[~torch.from_numpy(gone)[batch]]
            value = 0.5 * l2 * sum(p.square().sum() for p in model.parameters())
            if float(w[kept].sum()) > 0:
                losses = criterion(loss)(model(x[kept]), y[kept])
                value = value + (losses * w[kept]).sum() / w[kept].sum()
            for group in optimiser.param_groups:
                group["lr"] = rule.lr * training.schedule(step, each * training.epochs)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            step += 1
    return row_of(model)


def row_of(model) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def trained(risk: Risk, training: Training, asked: Trials, way: Way) -> Tensor:
    """Parameters ``[m, p]`` after each trial."""
    trainer, found = Trainer(risk, training), {}
    for part in choosing.chunks(asked, way):
        models = trainer.run(asked.take(part), way)
        found |= {n: row_of(model).clone() for n, model in zip(part.tolist(), models, strict=True)}
    return torch.stack([found[number] for number in range(len(asked))])


def check(name: str, training: Training, way: Way, asked: Trials, atol=1e-9, **more) -> None:
    model, data, loss = problem(name)
    weights = more.get("weights")
    objective = uw.Objective(model, loss, l2=more.get("l2", L2))
    found = trained(Risk(objective, Data.of(data, weights=weights)), training, asked, way)
    for row, seed, gone in zip(found, asked.seeds.tolist(), asked.gone, strict=True):
        wanted = by_torch(model, data, loss, training=training, seed=seed, gone=gone, **more)
        torch.testing.assert_close(row, wanted, rtol=0, atol=atol)


# Every way, every form, every rule


@pytest.mark.parametrize(
    ("name", "way"),
    [(n, w) for n in ("mlp", "softmax", "ridge", "own loss") for w in WAYS]
    + [(n, w) for n in ("conv", "attention", "scaled") for w in WAYS if "layers" not in w],
)
def test_every_way_equals_a_plain_loop(name, way):
    check(name, Training(3, 6, SGD(0.1, momentum=0.9)), WAYS[way], trials())


RULES = {
    "sgd": SGD(0.1),
    "momentum": SGD(0.1, momentum=0.8),
    "nesterov": SGD(0.1, momentum=0.8, nesterov=True),
    "adam": Adam(0.02, betas=(0.8, 0.95), eps=1e-3),
    "adamw": AdamW(0.02, weight_decay=0.3),
}


@pytest.mark.parametrize("way", ["one", "layers", "vectorised, shared rows"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_torchs(rule, way):
    training = Training(4, 7, RULES[rule], schedule=Cosine(0.1))
    check("mlp", training, WAYS[way], trials(seeds=[3]), l2=0.05)


@pytest.mark.parametrize("schedule", [Cosine(), Linear(warmup=3), Drops(at=(0.4, 0.8))])
def test_schedules_set_the_rate_of_every_step(schedule):
    check("softmax", Training(3, 6, SGD(0.2), schedule=schedule), WAYS["layers"], trials())


def test_schedules_are_those_of_torch_and_transformers():
    transformers = pytest.importorskip("transformers")
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 12, eta_min=0.2)
    warm = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    linear = transformers.get_linear_schedule_with_warmup(warm, 3, 12)
    for step in range(12):
        assert Cosine(0.2)(step, 12) == pytest.approx(cosine.get_last_lr()[0])
        assert Linear(warmup=3)(step, 12) == pytest.approx(linear.get_last_lr()[0])
        for one, schedule in ((optimiser, cosine), (warm, linear)):
            one.step()
            schedule.step()


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, N + 3), at_once=st.integers(1, 8), together=st.booleans(),
    pool=st.integers(1, 8),
    cells=st.sampled_from([1, 50, 2**21]), name=st.sampled_from(["mlp", "conv"]),
)  # fmt: skip
def test_batch_sizes_and_chunks_change_nothing(batch, at_once, together, pool, cells, name):
    form = Layers if name == "mlp" else Mapped
    at_once = max(at_once, 1 if form is Layers else 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("upweight.retraining.minibatches.CELLS", cells)
        training = Training(2, batch, SGD(0.1, momentum=0.9))
        way = Way(form, "", at_once, together, 1 if together else pool)
        check(name, training, way, trials(seeds=[0, 2]))


def test_weights_of_examples_are_those_of_their_means():
    weights = torch.linspace(0, 2, N, dtype=torch.float64)
    for way in ("one", "layers", "layers, shared rows", "vectorised"):
        check("mlp", Training(2, 5, SGD(0.1)), WAYS[way], trials(), weights=weights)


def test_float32_is_the_same_to_its_precision():
    model, data, loss = problem("mlp")
    training, asked = Training(3, 6, SGD(0.1, momentum=0.9)), trials()
    risk = Risk(uw.Objective(model.float(), loss, l2=L2), Data.of(data))
    one = trained(risk, training, asked, ONE)
    for way in ("layers", "layers, shared rows", "vectorised"):
        torch.testing.assert_close(
            trained(risk, training, asked, WAYS[way]), one, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("way", ["one", "vectorised", "vectorised, shared rows"])
def test_ignored_positions_and_class_weights_count_as_in_torch(way):
    """The mean over a minibatch is torch's own: over positions that count, by class weight."""
    torch.manual_seed(0)
    model, x = Tied().double(), labels(5, 3, seed=3)
    y = labels(5, 3).masked_fill(rows(3, seed=5) < -0.3, -100)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]).double())
    training, asked = Training(2, 6, SGD(0.1)), trials()
    risk = Risk(uw.Objective(model, loss, l2=L2), Data.of((x, y)))
    state = copy.deepcopy(model.state_dict())
    training = replace(training, start=lambda seed: state)
    found = trained(risk, training, asked, WAYS[way])
    for row, seed, gone in zip(found, asked.seeds.tolist(), asked.gone, strict=True):
        twin = copy.deepcopy(model).train()
        optimiser = torch.optim.SGD(twin.parameters(), 0.1, weight_decay=L2)
        for epoch in range(2):
            for batch in training.epoch(seed, epoch, N).split(6):
                kept = batch[~torch.from_numpy(gone)[batch]]
                optimiser.zero_grad()
                loss(twin(x[kept]).mT, y[kept]).backward()
                optimiser.step()
        torch.testing.assert_close(row, row_of(twin), rtol=0, atol=1e-9)


def test_removal_by_the_sum_keeps_the_shares_of_the_rest():
    model, data, loss = problem("mlp")
    asked, training = trials(seeds=[1]), Training(1, N, SGD(0.1))
    risk = Risk(uw.Objective(model, loss, l2=0.0, removal="sum"), Data.of(data))
    start = begun(model, Fresh(), 1)
    for way in (ONE, WAYS["layers"], WAYS["vectorised, shared rows"]):
        for row, gone in zip(trained(risk, training, asked, way), asked.gone, strict=True):
            kept = ~torch.from_numpy(gone)
            losses = F.cross_entropy(start(data[0]), data[1], reduction="none")
            slopes = torch.autograd.grad((losses * kept).sum() / N, list(start.parameters()))
            step = nn.utils.parameters_to_vector([s.contiguous() for s in slopes])
            torch.testing.assert_close(row, row_of(start) - 0.1 * step, rtol=0, atol=1e-12)


def test_relabelled_examples_train_with_their_new_labels():
    model, (x, y), loss = problem("mlp")
    asked = Trials.relabelled([4, 9, 0], np.array([2, 0, 1]), N, seeds=[0, 1])
    training = Training(2, 6, SGD(0.1, momentum=0.9))
    risk = Risk(uw.Objective(model, loss, l2=L2), Data.of((x, y)))
    new = asked.relabels
    for way in ("one", "layers", "layers, shared rows", "vectorised"):
        found = trained(risk, training, asked, WAYS[way])
        for number, row in enumerate(found):
            changed = y.clone()
            changed[int(new.position[number])] = int(new.label[number])
            wanted = by_torch(
                model, (x, changed), loss, training=training, seed=int(asked.seeds[number]),
                gone=asked.gone[number],
            )  # fmt: skip
            torch.testing.assert_close(row, wanted, rtol=0, atol=1e-9)


def test_a_new_label_weighs_what_its_class_does():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), rows(4), labels(3)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double())
    training = Training(2, 6, SGD(0.1), start=Trained())
    asked = Trials.relabelled([4], np.array([(int(y[4]) + 1) % 3]), N, seeds=[0])
    found = trained(Risk(uw.Objective(model, loss), Data.of((x, y))), training, asked, ONE)[0]
    changed = y.clone()
    changed[4] = (y[4] + 1) % 3
    other = Risk(uw.Objective(model, loss), Data.of((x, changed)))
    wanted = trained(other, training, Trials.whole(N, [0]), ONE)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    ignored = Trials.relabelled([4], np.array([-100]), N, seeds=[0])
    without = trained(other, training, Trials.without([[4]], N, seeds=[0]), WAYS["layers"])
    torch.testing.assert_close(
        trained(other, training, ignored, WAYS["layers"]), without, rtol=0, atol=1e-12
    )


def test_l2_may_differ_between_parameters_and_inside_one():
    model, data, loss = problem("mlp")
    objective = uw.Objective(model, loss, l2={"1.*": 0.2, "*": 0.01})
    uneven = objective.with_l2(torch.linspace(0, 0.3, objective.space.size).double())
    asked = trials(seeds=[0])
    for one in (objective, uneven):
        for rule in (SGD(0.1), AdamW(0.01, weight_decay=0.1)):
            training = Training(1, N, rule)
            found = trained(Risk(one, Data.of(data)), training, asked, WAYS["layers"])
            for row, gone in zip(found, asked.gone, strict=True):
                twin = begun(model, Fresh(), 0)
                kept = ~torch.from_numpy(gone)
                flat = torch.cat([p.flatten() for p in twin.parameters()])
                value = F.cross_entropy(twin(data[0][kept]), data[1][kept])
                (value + 0.5 * (one.l2 * flat * flat).sum()).backward()
                if isinstance(rule, SGD):
                    torch.optim.SGD(twin.parameters(), 0.1).step()
                else:
                    torch.optim.AdamW(twin.parameters(), 0.01, weight_decay=0.1).step()
                torch.testing.assert_close(row, row_of(twin), rtol=0, atol=1e-12)


def pairs() -> list[tuple[Tensor, Tensor]]:
    return list(zip(rows(4), labels(3), strict=True))


class Dictionaries(nn.Module):
    """Keyword inputs, and outputs with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, first: Tensor, second: Tensor):
        h = torch.tanh(self.inner(first)) * torch.tanh(self.inner(second))
        return type("Output", (), {"logits": self.head(h)})()


def test_data_of_every_kind_gives_the_same_minibatches():
    """Named inputs, datasets read item by item, and rows that are fetched anew at every step."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    training, asked = Training(2, 6, SGD(0.1)), trials()
    objective = uw.Objective(plain, "cross_entropy", l2=L2)
    wanted = trained(Risk(objective, Data.of((rows(4), labels(3)))), training, asked, ONE)
    loader = torch.utils.data.DataLoader(pairs(), batch_size=5, shuffle=True)
    for source in (pairs(), loader):
        for way in ("one", "layers", "vectorised, shared rows"):
            found = trained(Risk(objective, Data.of(source)), training, asked, WAYS[way])
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    with uw.memory("1 MiB"):  # no room for all rows
        wide = torch.cat([rows(4), torch.zeros(N, 20_000).double()], 1)
        big = nn.Sequential(nn.Linear(20_004, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)).double()
        risk = Risk(uw.Objective(big, "cross_entropy"), Data.of((wide, labels(3))))
        assert Trainer(risk, training).rows._all is None
        one, other = (trained(risk, training, asked, WAYS[way]) for way in ("one", "layers"))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_named_inputs_train_in_every_way():
    torch.manual_seed(0)
    model, training, asked = Dictionaries().double(), Training(2, 6, SGD(0.1)), trials()
    named = {"first": rows(3), "second": rows(3, seed=8), "labels": labels(2)}
    risk = Risk(uw.Objective(model, "cross_entropy", l2=L2), Data.of(named))
    for way in ("one", "vectorised", "vectorised, shared rows"):
        for row, seed, gone in zip(
            trained(risk, training, asked, WAYS[way]), asked.seeds.tolist(), asked.gone, strict=True
        ):
            twin = begun(model, Fresh(), seed)
            optimiser = torch.optim.SGD(twin.parameters(), 0.1, weight_decay=L2)
            for epoch in range(2):
                for batch in training.epoch(seed, epoch, N).split(6):
                    kept = batch[~torch.from_numpy(gone)[batch]]
                    logits = twin(named["first"][kept], named["second"][kept]).logits
                    optimiser.zero_grad()
                    F.cross_entropy(logits, named["labels"][kept]).backward()
                    optimiser.step()
            torch.testing.assert_close(row, row_of(twin), rtol=0, atol=1e-9)


def test_new_labels_take_targets_of_one_tensor():
    def loss(outputs: Tensor, targets) -> Tensor:
        return (outputs - targets[0]).square().sum(1) + targets[1]

    dataset = [(x, (x[:2], x[2])) for x in rows(4)]
    objective = uw.Objective(nn.Linear(4, 2).double(), loss)
    asked = Trials.relabelled([1], np.array([0.0]), N, seeds=[0])
    with pytest.raises(InputError, match="targets of one tensor"):
        trained(Risk(objective, Data.of(dataset)), Training(1, 6, SGD(0.1)), asked, ONE)


class Hook:
    """A hook on the way back that changes nothing."""

    def __call__(self, module, slope):
        return None


def with_hook() -> nn.Module:
    net = mlp()
    net[1].register_full_backward_pre_hook(Hook())
    return net


def with_own_forward() -> nn.Module:
    net = mlp()
    known = net[2].forward
    net[2].forward = lambda x: 2 * known(x)
    return net


def with_one_module_twice() -> nn.Module:
    act = nn.Tanh()
    return nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 5), act, nn.Linear(5, 3))


def test_a_module_at_two_places_is_a_layer_at_both():
    net, training = with_one_module_twice().double(), Training(3, 6, SGD(0.3, momentum=0.9), seed=1)
    x, y = rows(4), labels(3)
    objective = uw.Objective(net, "cross_entropy", l2=L2)
    assert len(stages_of(objective)) == 3
    found = uw.retraining.fit(objective, (x, y), training)
    model = begun(net, Fresh(), 1)
    optimiser = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9, weight_decay=L2)
    for epoch in range(3):
        for part in training.epoch(1, epoch, N).split(6):
            optimiser.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimiser.step()
    for one, other in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("make", [with_hook, with_own_forward])
def test_what_a_module_does_beside_its_class_is_autograds(make):
    assert stages_of(uw.Objective(make().double(), "cross_entropy"), axes=3) is None
    assert stages_of(uw.Objective(mlp().double(), "cross_entropy"), axes=3) is not None


def test_a_model_by_itself_is_written_out_only_where_a_step_is_autograds(monkeypatch):
    objective = uw.Objective(mlp().double(), "cross_entropy", l2=L2)
    risk = Risk(objective, Data.of((rows(2, 2), labels(3))))
    trainer = Trainer(risk, Training(1, 6, SGD(0.1)))
    assert choosing.alone(trainer).make is Layers
    known = Layers.__call__
    monkeypatch.setattr(Layers, "__call__", lambda *args: [2 * part for part in known(*args)])
    assert choosing.alone(trainer).make is Single
