"""Is the objective the training loss: every reason planted and found, and nothing left behind."""

import importlib.util
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from upweight import Data, Objective, Risk
from upweight.errors import DataError, InputError, LossError, ModelError, NonFiniteError
from upweight.losses import BinaryCrossEntropy, CrossEntropy
from upweight.trainers import Comparison, compare
from upweight.trainers.untouched import untouched

N, D, C, S, V = 60, 4, 3, 6, 7


def network(inputs=D, outputs=C, dtype=torch.float64):
    layers = nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))
    return layers.to(dtype).eval()


def classes(loss="cross_entropy", *, dtype=torch.float64, weights=None, **settings):
    x, y = torch.randn(N, D, dtype=dtype), torch.randint(0, C, (N,))
    return Risk(Objective(network(dtype=dtype), loss, **settings), Data.of((x, y), weights=weights))


def numbers(outputs, *, flat=False, **settings):
    x, y = torch.randn(N, D).double(), torch.randn(N, outputs).double()
    objective = Objective(network(outputs=outputs), "mean_squared_error", **settings)
    return Risk(objective, Data.of((x, y[:, 0] if flat else y)))


def signs(loss="binary_cross_entropy", last=None):
    x, y = torch.randn(N, D).double(), torch.randint(0, 2, (N, 1)).double()
    model = nn.Sequential(network(outputs=1), *([] if last is None else [last])).eval()
    return Risk(Objective(model, loss), Data.of((x, y)))


class Speaker(nn.Module):
    """Logits of every token of a sequence."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(V, 4), nn.Linear(4, V)

    def forward(self, input_ids):
        return self.out(torch.tanh(self.embed(input_ids).cumsum(1)))


def sentences(loss=None, *, weights=None):
    """Tokens with their labels shifted, of different lengths, padded with 0."""
    ids = torch.randint(1, V, (N, S))
    ids *= torch.arange(S) < torch.randint(2, S + 1, (N, 1))
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = torch.where(ids[:, 1:] > 0, ids[:, 1:], -100)
    data = Data.of({"input_ids": ids, "labels": labels}, weights=weights)
    return Risk(Objective(Speaker().double().eval(), loss or "cross_entropy"), data)


def tokens(model, batch, **settings):
    """Cross-entropy over the labels as they stand."""
    logits = model(batch["input_ids"])
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), **settings)


def found(risk, loss, *words, agrees=False, **settings):
    """The comparison, with what it must say."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using a target size")
        comparison = compare(risk, loss, **settings)
    for word in words:
        assert word in comparison.explanation
    assert comparison.agrees == agrees, comparison.explanation
    return comparison


# The right loss agrees.


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_right_loss_agrees(dtype, bound):
    risk = classes(dtype=dtype)
    comparison = found(risk, nn.CrossEntropyLoss(), "is the mean loss", agrees=True)
    np.testing.assert_allclose(comparison.theirs, comparison.ours, rtol=bound)
    np.testing.assert_allclose(comparison.cosines, 1, rtol=bound)
    np.testing.assert_allclose(comparison.ratios, 1, rtol=100 * bound)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_a_small_difference_is_seen(dtype, off):
    risk = classes(dtype=dtype)
    found(risk, lambda m, b: (1 + off) * F.cross_entropy(m(b[0]), b[1]))


def test_values_are_the_naive_ones():
    risk = classes(l2=0.3)
    comparison = compare(risk, nn.CrossEntropyLoss(), batches=3, rows=12)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert comparison.rows == (12, 9, 6)
    x, y = risk.data.source.tree
    for start, size, ours in zip((0, 12, 21), (12, 9, 6), comparison.ours, strict=True):
        rows = order[start : start + size]
        each = [-F.log_softmax(risk.objective.model(x[i]), 0)[y[i]].item() for i in rows]
        assert ours == pytest.approx(sum(each) / size, rel=1e-12)
    naive = sum(0.5 * 0.3 * (p**2).sum().item() for p in risk.objective.model.parameters())
    assert comparison.l2 == pytest.approx(naive, rel=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double()),
        nn.CrossEntropyLoss(ignore_index=1),
        F.cross_entropy,
        partial(F.cross_entropy, label_smoothing=0.1),
    ],
    ids=["smoothed", "weighted", "ignoring", "function", "partial"],
)
def test_what_the_objective_was_made_of_agrees(loss):
    found(classes(loss), loss, agrees=True)


def test_other_kinds_of_losses_agree():
    found(numbers(3), nn.MSELoss(), agrees=True)
    found(numbers(1), F.mse_loss, agrees=True)
    found(signs(), nn.BCEWithLogitsLoss(), agrees=True)
    found(sentences(), tokens, agrees=True)
    hinge = classes(lambda z, y: F.multi_margin_loss(z, y, reduction="none"))
    found(hinge, nn.MultiMarginLoss(), agrees=True)


def test_example_weights_agree():
    weights = torch.rand(N).double() + 0.5
    risk = classes(weights=weights)

    def weighted(model, batch):
        each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        w = weights[[int((risk.data.source.tree[0] == x).all(1).nonzero()) for x in batch[0]]]
        return (w * each).sum() / w.sum()

    found(risk, weighted, agrees=True)
    found(risk, nn.CrossEntropyLoss(), "does not use the weights of the examples")


def test_the_stated_l2_agrees_inside_and_outside_of_the_loss():
    risk = classes(l2=0.05)

    def with_l2(model, batch):
        square = sum((p**2).sum() for p in model.parameters())
        return F.cross_entropy(model(batch[0]), batch[1]) + 0.5 * 0.05 * square

    found(risk, with_l2, "its L2 term included", agrees=True)
    found(risk, nn.CrossEntropyLoss(), "weight decay", agrees=True)


# Every reason, planted and found.


def test_sum_for_mean():
    found(classes(), nn.CrossEntropyLoss(reduction="sum"), "is the sum over the batch", "l2 = λ/")
    found(numbers(1), nn.MSELoss(reduction="sum"), "is the sum over the batch")
    custom = classes(lambda z, y: F.multi_margin_loss(z, y, reduction="none"))
    found(custom, nn.MultiMarginLoss(reduction="sum"), "is the sum over the batch")
    found(sentences(), partial(tokens, reduction="sum"), "is the sum over the batch")


def by_sequence(model, batch):
    logits, labels = model(batch["input_ids"]), batch["labels"]
    parts = [F.cross_entropy(z, y) for z, y in zip(logits, labels, strict=True)]
    return torch.stack(parts).mean()


def test_mean_over_sequences_of_means_over_tokens():
    found(sentences(), by_sequence, "tokens of each sequence and then over sequences")


def test_the_advice_for_means_of_means_is_right():
    torch.manual_seed(1)
    risk = sentences()
    counts = (risk.data.source.tree["labels"] != -100).sum(1).double()
    torch.manual_seed(1)
    found(sentences(weights=1 / counts), by_sequence, agrees=True)


def test_sum_over_tokens_mean_over_sequences():
    def loss(model, batch):
        return tokens(model, batch, reduction="sum") / len(batch["labels"])

    found(sentences(), loss, "sums over the positions")


def test_ignored_tokens_in_the_denominator():
    def loss(model, batch):
        return tokens(model, batch, reduction="sum") / batch["labels"].numel()

    found(sentences(), loss, "divides by all positions, the ignored ones included")


def test_another_ignored_label():
    found(classes(), nn.CrossEntropyLoss(ignore_index=2), "ignores the label 2", "ignore_index=2")
    ignoring = classes(CrossEntropy(ignore_index=2))
    found(ignoring, nn.CrossEntropyLoss(), "counts labels that the objective ignores")
    found(ignoring, nn.CrossEntropyLoss(ignore_index=0), "ignores the label 0")


def shifting(model, batch, **settings):
    logits, labels = model(batch["input_ids"])[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **settings)


def test_shifted_labels():
    found(sentences(), shifting, "compares each output with the next label")
    both = found(sentences(), partial(shifting, reduction="sum"), "with the next label", "the sum")
    assert "It also is the sum over the batch" in both.explanation


def test_labels_that_are_the_input():
    def repeating(model, batch):
        return F.cross_entropy(
            model(batch["input_ids"]).flatten(0, 1), batch["input_ids"].flatten()
        )

    def next_token(model, batch):
        ids = batch["input_ids"]
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    found(sentences(), repeating, "learned to repeat its input")
    found(sentences(), next_token, "compares each output with the next input token")


def test_squared_errors():
    half = lambda m, b: 0.5 * F.mse_loss(m(b[0]), b[1])  # noqa: E731
    found(numbers(3), half, "the factor ½ of a squared error", "l2=2·λ")
    rows = lambda m, b: ((m(b[0]) - b[1]) ** 2).sum(1).mean()  # noqa: E731
    found(numbers(3), rows, "sums over the positions (or outputs) of an example")
    both = lambda m, b: 0.5 * ((m(b[0]) - b[1]) ** 2).sum(1).mean()  # noqa: E731
    found(numbers(3), both, "the factor ½", "It also sums over")
    found(numbers(3), nn.L1Loss(), "is a mean of |z − y|")
    found(numbers(1, flat=True), nn.MSELoss(), "broadcast to [n, n]")


@pytest.mark.parametrize("epsilon", [0.1, 0.37])
def test_label_smoothing(epsilon):
    found(classes(), nn.CrossEntropyLoss(label_smoothing=epsilon), f"ε = {epsilon:g}, and")
    smoothed = classes(CrossEntropy(label_smoothing=epsilon))
    found(smoothed, nn.CrossEntropyLoss(), "ε = 0, and", f"the objective {epsilon:g}")


def test_class_weights():
    weight = torch.tensor([1.0, 2.0, 5.0]).double()
    stated = CrossEntropy(weight=weight)
    criterion = nn.CrossEntropyLoss(weight=weight)
    found(classes(), criterion, "other class weights", "{0: 1.0, 1: 2.0, 2: 5.0}, up to one factor")
    found(classes(stated), nn.CrossEntropyLoss(), "has no class weights")

    def unnormalised(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], weight, reduction="none").mean()

    found(classes(stated), unnormalised, "divides by the number of rows")
    text = "{0: 1.0, 1: 2.0, 2: 5.0}, and divides by the number of rows"
    found(classes(), unnormalised, text)
    found(classes(stated), nn.CrossEntropyLoss(weight=weight.flip(0)), "{0: 5.0, 1: 2.0, 2: 1.0}")


def test_class_weights_in_single_precision():
    weight = torch.tensor([1.0, 2.0, 5.0])
    criterion = nn.CrossEntropyLoss(weight=weight)
    found(classes(dtype=torch.float32), criterion, "{0: 1.0, 1: 2.0, 2: 5.0}, up to one factor")


def test_positive_weight():
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0).double())
    found(signs(), criterion, "pos_weight 3", "the objective none")
    stated = signs(BinaryCrossEntropy(pos_weight=torch.tensor(3.0)))
    found(stated, nn.BCEWithLogitsLoss(), "pos_weight 1", "the objective 3")


def penalised(model, batch, strength, names="*"):
    square = sum((p**2).sum() for n, p in model.named_parameters() if names in ("*", n))
    return F.cross_entropy(model(batch[0]), batch[1]) + 0.5 * strength * square


def test_l2_in_the_loss():
    loss = partial(penalised, strength=0.02)
    found(classes(), loss, "½λ‖θ‖² with λ = 0.02", "the objective states none", "l2=0.02")
    found(classes(l2=0.5), loss, "λ = 0.02", "the objective states 0.5")


def test_l2_of_some_parameters():
    loss = partial(penalised, strength=0.02, names="0.weight")
    found(classes(), loss, "λ = {'0.weight': 0.02}", "l2={'0.weight': 0.02}")


def test_the_stated_l2_that_was_found_agrees():
    loss = partial(penalised, strength=0.02, names="0.weight")
    found(classes(l2={"0.weight": 0.02}), loss, "its L2 term included", agrees=True)


def test_a_constant_factor():
    quarter = lambda m, b: F.cross_entropy(m(b[0]), b[1]) / 4  # noqa: E731
    found(classes(), quarter, "is 0.25 times", "gradient accumulation over 4 batches")
    found(classes(), lambda m, b: 2.5 * F.cross_entropy(m(b[0]), b[1]), "is 2.5 times")


def test_probabilities_for_logits():
    twice = lambda m, b: F.cross_entropy(m(b[0]).softmax(1), b[1])  # noqa: E731
    found(classes(), twice, "softmax twice")
    found(classes(), lambda m, b: F.nll_loss(m(b[0]), b[1]), "NLLLoss of outputs")
    squashed = lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]).sigmoid(), b[1])  # noqa: E731
    found(signs(), squashed, "sigmoid twice")
    found(signs(last=nn.Sigmoid()), nn.BCELoss(), "takes the outputs as probabilities")


def test_a_model_that_ends_in_softmax():
    risk = classes()
    model = nn.Sequential(risk.objective.model, nn.Softmax(1)).eval()
    ends = Risk(Objective(model, "cross_entropy"), risk.data)
    loss = lambda m, b: F.nll_loss(m(b[0]).log(), b[1])  # noqa: E731
    found(ends, loss, "takes the logarithm of the outputs, which are probabilities")


# Gradients.


def test_a_constant_is_harmless():
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1]) - 1.5  # noqa: E731
    found(classes(), loss, "Harmless", "by a constant (-1.5, -1.5", agrees=True)


def test_the_entropy_of_soft_labels_is_harmless():
    x, y = torch.randn(N, D).double(), torch.rand(N, C).double().softmax(1)
    risk = Risk(Objective(network(), "cross_entropy"), Data.of((x, y)))
    loss = lambda m, b: F.kl_div(m(b[0]).log_softmax(1), b[1], reduction="batchmean")  # noqa: E731
    found(risk, loss, "Harmless", "a number per batch", agrees=True)


def test_a_detached_part_is_seen():
    def halfway(model, batch):
        return F.cross_entropy(model[2](model[1](model[0](batch[0])).detach()), batch[1])

    def wholly(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]).detach()

    def reversed_(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return 2 * loss.detach() - loss

    said = "has the objective's value and another gradient"
    part = found(classes(), halfway, said, "No gradient reaches 0.weight, 0.bias")
    assert (part.ratios < 1).all()
    whole = found(classes(), wholly, said)
    np.testing.assert_array_equal(whole.ratios, 0)
    assert np.isnan(whole.cosines).all()
    np.testing.assert_allclose(found(classes(), reversed_, said).cosines, -1)


def test_what_nothing_explains_is_said_with_its_numbers():
    loss = lambda m, b: m(b[0]).square().mean()  # noqa: E731
    comparison = found(classes(), loss, "nothing tried explains it")
    for value in (*comparison.ours, *comparison.theirs):
        assert f"{value:.6g}" in comparison.explanation


def test_equal_values_do_not_make_a_hypothesis_true():
    """A sum in value, with a gradient that is not the sum's."""

    def loss(model, batch):
        z = model(batch[0])
        return F.cross_entropy(z, batch[1], reduction="sum").detach() + 0 * z.sum()

    found(classes(), loss, "nothing tried explains it")


# The result.


def test_the_result_prints_and_requires():
    comparison = found(classes(), nn.CrossEntropyLoss(reduction="sum"))
    table = comparison.table()
    assert list(table.columns)[:4] == ["rows", "ours", "L2", "theirs"]
    assert table.caption == comparison.explanation
    assert repr(comparison).startswith("The training loss (CrossEntropyLoss) is the sum")
    with pytest.raises(LossError, match="is the sum over the batch"):
        comparison.require()
    right = compare(classes(), nn.CrossEntropyLoss())
    assert isinstance(right, Comparison)
    right.require()
    with pytest.raises(AttributeError):
        right.agrees = False


def test_a_second_run_is_the_first():
    risk = classes()
    first, second = (compare(risk, nn.CrossEntropyLoss()) for _ in range(2))
    np.testing.assert_array_equal(first.theirs, second.theirs)


def test_few_rows_and_small_batches():
    x, y = torch.randn(3, D).double(), torch.tensor([0, 1, 2])
    objective = Objective(network(), "cross_entropy")
    assert found(Risk(objective, Data.of((x, y))), F.cross_entropy, agrees=True).rows == (3, 2)
    single = Risk(objective, Data.of((x, y), batch_size=1))
    assert found(single, F.cross_entropy, agrees=True).rows == (1, 1)


# What the user's loader yields.


class Named(Dataset):
    """Rows that a collate function of the user's puts into its own type."""

    def __init__(self):
        self.x, self.y = torch.randn(N, D).double(), torch.randint(0, C, (N,))

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.y[i]}


def test_a_function_gets_the_batch_of_the_loader_as_a_copy():
    rows = Named()
    before = rows.x.clone()
    loader = DataLoader(rows, batch_size=10, shuffle=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x)

    seen = []

    def loss(model, batch):
        seen.append(batch)
        y = batch.pop("y")
        x = batch["x"].clone()
        batch["x"].zero_()
        return F.cross_entropy(model(x), y)

    risk = Risk(Objective(Model().eval(), "cross_entropy"), Data.of(loader))
    comparison = compare(risk, loss)
    assert comparison.agrees
    assert comparison.rows == (10, 8)
    assert torch.equal(rows.x, before)
    arrays = classes()
    kept = [leaf.clone() for leaf in arrays.data.source.tree]
    compare(arrays, lambda m, b: F.cross_entropy(m(b[0].clone()), b[1]) + b[0].zero_().sum())
    assert all(map(torch.equal, arrays.data.source.tree, kept))


class FakeTrainer:
    """The part of a Hugging Face Trainer that is asked: its loader, its count, its loss."""

    def __init__(self, model, rows, *, shift=False):
        self.model, self.rows, self.shift = model, rows, int(shift)

    def get_train_dataloader(self):
        return DataLoader(self.rows, batch_size=4, shuffle=True)

    def get_batch_samples(self, iterator, count, device):
        samples = [next(iterator) for _ in range(count)]
        labels = [sample["labels"][:, self.shift :] for sample in samples]
        return samples, sum((part != -100).sum() for part in labels).to(device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs)
        if self.shift:
            labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / num_items_in_batch


def as_rows(risk):
    tree = risk.data.source.tree
    return [{key: value[i] for key, value in tree.items()} for i in range(N)]


def test_a_trainer_agrees_on_its_own_rows():
    risk = sentences()
    rows = as_rows(risk)
    found(risk, FakeTrainer(risk.objective.model, rows), agrees=True)
    unshifted = [
        {**row, "labels": torch.where(row["input_ids"] > 0, row["input_ids"], -100)} for row in rows
    ]
    found(risk, FakeTrainer(risk.objective.model, unshifted, shift=True), agrees=True)


def test_a_trainer_that_shifts_shifted_labels_is_seen():
    risk = sentences()
    trainer = FakeTrainer(risk.objective.model, as_rows(risk), shift=True)
    found(risk, trainer, "compares each output with the next label", "shifted them twice")


def test_a_trainer_without_a_count_of_items():
    risk = sentences()

    class Old:
        model = risk.objective.model

        def get_train_dataloader(self):
            return DataLoader(as_rows(risk))

        def compute_loss(self, model, inputs):
            return tokens(model, inputs)

    found(risk, Old(), agrees=True)


def test_trainers_with_other_examples_or_another_model_are_refused():
    risk = sentences()
    with pytest.raises(DataError, match="trains on 59 examples and the objective is over 60"):
        compare(risk, FakeTrainer(risk.objective.model, as_rows(risk)[1:]))
    with pytest.raises(ModelError, match="they share no parameter"):
        compare(risk, FakeTrainer(Speaker().double().eval(), as_rows(risk)))


def test_a_real_trainer(tmp_path):
    """Needs accelerate, which transformers asks for and this project does not."""
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("transformers.Trainer cannot be constructed without accelerate")
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    sizes = {"vocab_size": V, "n_positions": S, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    # Without a known loss_type the Trainer counts tokens before the shift, and divides by too many.
    model.loss_type = "ForCausalLM"
    ids = torch.randint(1, V, (N, S))
    labels = torch.where(torch.arange(S) < torch.randint(3, S + 1, (N, 1)), ids, -100)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    objective = Objective(model, "cross_entropy")
    risk = Risk(objective, Data.of({"input_ids": ids, "labels": shifted}))
    found(risk, trainer, agrees=True)
    sequences = Risk(
        objective,
        Data.of({"input_ids": ids, "labels": shifted}, weights=1 / (shifted != -100).sum(1)),
    )
    found(sequences, trainer, "does not use the weights of the examples")


class Lightning(nn.Module):
    """The interface of a LightningModule: a training step that logs."""

    automatic_optimization = True

    def __init__(self, model, factor=1.0):
        super().__init__()
        self.model, self.factor = model, factor

    def log(self, name, value):
        raise RuntimeError("no trainer is attached")

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.factor * F.cross_entropy(self.model(x), y)
        self.log("train_loss", loss)
        return {"loss": loss, "rows": len(x)}


def test_a_lightning_module():
    risk = classes()
    module = Lightning(risk.objective.model).eval()
    found(risk, module, agrees=True)
    assert "log" not in vars(module)
    found(risk, Lightning(risk.objective.model, 0.5).eval(), "is 0.5 times")
    with pytest.raises(ModelError, match="they share no parameter"):
        compare(risk, Lightning(network()).eval())
    module.automatic_optimization = False
    with pytest.raises(LossError, match="optimises by hand"):
        compare(risk, module)


# Nothing is left behind.


def everything(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [part.training for part in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def vandal(model, batch, *, then):
    """Does all that a training loop might, and more."""
    random.random(), np.random.rand(), torch.rand(3)
    model.train()
    for parameter in model.parameters():
        parameter.data.mul_(2)
        parameter.grad = torch.ones_like(parameter)
        parameter.requires_grad_(False)
    model.get_submodule("0").weight = nn.Parameter(torch.zeros(5, D).double())
    return then(model, batch)


@pytest.mark.parametrize("before", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("then", [lambda m, b: 1 / 0, lambda m, b: m(b[0]).sum()])
def test_the_model_is_as_before_also_after_an_error(then, before):
    risk = classes()
    model = risk.objective.model
    if before:
        model(torch.randn(2, D).double()).sum().backward()
    kept, weight = everything(model), model[0].weight
    with pytest.raises(LossError):
        compare(risk, partial(vandal, then=then))
    assert model[0].weight is weight
    assert same(everything(model), kept)
    found(risk, nn.CrossEntropyLoss(), agrees=True)
    assert same(everything(model), kept)


def test_running_statistics_and_interrupts_are_put_back():
    model = nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, C)).double().eval()
    kept = everything(model)
    with pytest.raises(KeyboardInterrupt), untouched([model]) as changes:
        model.train()(torch.randn(9, D).double())
        raise KeyboardInterrupt
    assert same(everything(model), kept)
    assert {"0.running_mean", "0.running_var"} <= set(changes.names)


def test_values_that_became_nan_are_put_back():
    model = network()
    kept = everything(model)
    with untouched([model]) as changes:
        model[0].weight.data.fill_(torch.nan)
    assert same(everything(model), kept)
    assert changes.names == ["0.weight"]


# What cannot be compared.


def raises(error, words, loss, risk=None, **settings):
    with pytest.raises(error, match=words):
        compare(risk or classes(), loss, **settings)


def test_what_is_no_training_loss_is_refused():
    kinds = "A training loss is a torch criterion"
    raises(LossError, kinds + ".*'cross_entropy'", "cross_entropy")
    raises(LossError, kinds + ".*got None", None)
    raises(LossError, "the class CrossEntropyLoss, not an object", nn.CrossEntropyLoss)
    risk = classes()
    raises(LossError, "The model itself is no training loss", risk.objective.model, risk)


def test_what_is_no_scalar_is_refused():
    raises(
        LossError,
        r"one number for a batch of 16 rows.*\(16,\)",
        nn.CrossEntropyLoss(reduction="none"),
    )
    raises(LossError, "got NoneType", lambda m, b: None)
    raises(LossError, "Return the tensor, before .item", lambda m, b: m(b[0]).sum().item())


def test_what_is_not_finite_is_refused():
    raises(NonFiniteError, "value nan", lambda m, b: m(b[0]).sum() * float("nan"))
    raises(NonFiniteError, "its gradient", lambda m, b: (m(b[0]).sum() * 0).sqrt())


def test_an_error_of_the_user_is_wrapped():
    raises(LossError, "failed on a batch of 16 rows: KeyError: 'labels'", lambda m, b: {}["labels"])
    raises(LossError, r"\(model, batch\) -> scalar", lambda outputs: outputs.sum())


def test_training_code_beyond_the_loss_is_refused():
    def backward(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    def step(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        model[2].bias.data.sub_(0.1)
        return loss + 0.0

    raises(LossError, "runs backward", backward)
    raises(LossError, "changed 2.bias, which is put back", step)


def test_randomness_is_refused():
    raises(LossError, "is random", lambda m, b: F.cross_entropy(F.dropout(m(b[0])), b[1]))
    model = nn.Sequential(nn.Linear(D, C), nn.Dropout()).double().eval()
    risk = Risk(Objective(model, "cross_entropy"), classes().data)
    raises(LossError, "train mode", lambda m, b: F.cross_entropy(m.train()(b[0]), b[1]), risk)


def test_losses_of_nothing_and_batches_without_weight_are_refused():
    model = network(outputs=1)
    model[2].bias.data.fill_(100.0)
    data = Data.of((torch.randn(N, D).double(), torch.ones(N, 1).double()))
    risk = Risk(Objective(model, "hinge"), data)
    raises(LossError, "within rounding of 0", lambda m, b: F.relu(1 - m(b[0])).mean(), risk)
    x, y = torch.randn(N, D).double(), torch.full((N,), -100)
    y[0] = 1
    ignored = Risk(Objective(network(), "cross_entropy"), Data.of((x, y)))
    raises(LossError, "has no weight", lambda m, b: m(b[0]).sum(), ignored)


@pytest.mark.parametrize("setting", [{"batches": 0}, {"rows": 0}, {"rows": 2.5}, {"batches": True}])
def test_sizes_are_whole_numbers(setting):
    raises(InputError, "whole number", nn.CrossEntropyLoss(), **setting)
