"""Relative scores and baselines: values against loops, and what must not change them."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import upweight as uw
from tests.cases import CASES, Tied, as_reference
from upweight import errors, reference
from upweight.data import Data
from upweight.gradients import per_example
from upweight.methods import METHODS, Baseline, Method
from upweight.risk import Risk
from upweight.weighing import per_parameter_change, per_self_influence

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
both_removals = pytest.mark.parametrize("removal", ["mean", "sum"])
BASELINES = [name for name, row in METHODS.items() if isinstance(row, Baseline)]


@pytest.fixture(autouse=True)
def _plain_attention():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def front(risk: Risk, method, damping=0.0) -> uw.Influence:
    return uw.Influence(risk.objective, risk.data, method=method, damping=damping)


def loops(risk: Risk) -> tuple[list[float], list[Tensor]]:
    """Losses and gradients of the examples, one by one."""
    problem, theta = as_reference(risk)
    losses = [problem.loss(theta, i).item() for i in range(len(risk.data))]
    gradients = [
        reference.gradient(lambda t, i=i: problem.loss(t, i), theta) for i in range(len(risk.data))
    ]
    return losses, gradients


def close(found, wanted, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=rtol, atol=atol)


# Relative scores


@both_removals
@pytest.mark.parametrize("kind", [per_parameter_change, per_self_influence])
@pytest.mark.parametrize(
    ("curvature", "solver", "damping"),
    [
        ("ekfac", uw.Spectral(), 0.0),
        ("ekfac", uw.Spectral(tolerance=0), 0.2),
        ("ggn", uw.Cholesky(), 0.0),
        ("ggn", uw.CG(rtol=1e-12), 0.1),
        ("hessian", None, 0.0),
    ],
)
@pytest.mark.parametrize("name", ["mlp", "convolution", "padded transformer", "softmax weighted"])
def test_relative_scores_are_scores_over_a_length(name, curvature, solver, damping, kind, removal):
    risk = next(case for case in CASES if case.name == name).risk(removal=removal)
    queries = risk.data.take(torch.arange(3))
    plain = front(risk, Method("plain", "", curvature, solver), damping)
    inverse = plain.inverse.to_dense().double()
    row = risk.objective.l2 * risk.objective.space.row() * (removal == "mean")
    lengths = []
    for gradient in loops(risk)[1]:
        whole = gradient + row
        squared = (whole @ inverse).square().sum()
        if kind is per_self_influence:
            squared = whole @ inverse @ whole
        lengths.append(float(squared) ** 0.5)
    lengths = np.array(lengths)
    wanted = plain.explain(queries).values / np.where(lengths > 0, lengths, np.inf)
    method = Method("relative", "", curvature, solver, rescale=kind)
    close(front(risk, method, damping).explain(queries).values, wanted, rtol=1e-8)


@pytest.mark.parametrize("kind", [per_parameter_change, per_self_influence])
def test_a_gradient_that_nearly_cancels_its_l2_part_keeps_its_digits(kind):
    torch.manual_seed(0)
    x, y = torch.randn(1, 3).double().expand(2, 3), torch.ones(2).double()
    model = nn.Linear(3, 1, bias=False).double()
    theta = reference.ridge(x, y, 0.3, torch.full((2,), 0.5).double())
    with torch.no_grad():
        model.weight.copy_(theta[None] + 1e-6)
    inf = uw.Influence(
        model,
        (x, y),
        loss="mean_squared_error",
        l2=0.3,
        method=Method("relative", "", "hessian", uw.Cholesky(), rescale=kind),
    )
    # Both examples are the whole risk: ∇ℓ̃ = H·1e-6 without cancelling.
    hessian = 2 * x[0].outer(x[0]) + 0.3 * torch.eye(3)
    step = torch.full((3,), 1e-6).double()
    gradient = hessian @ step
    length = (step.norm() if kind is per_parameter_change else (step @ gradient).sqrt()).item()
    asked = x.new_tensor([[1.0, 2.0, 3.0]]), torch.zeros(1).double()
    slope = 2 * (asked[0] @ model.weight.detach().T)[0] * asked[0][0]
    wanted = 0.5 * float(slope @ step) / length
    close(inf.explain(asked).values, [[wanted, wanted]], rtol=1e-8)


def test_relative_scores_take_every_way_that_scores_take(tmp_path):
    risk = next(case for case in CASES if case.name == "mlp").risk()
    queries = risk.data.take(torch.arange(3))
    whole = front(risk, "relatif", 0.1).explain(queries)
    assert (whole.meaning.unit, whole.meaning.score_unit) == ("nats", "nats per ‖H⁻¹∇ℓ‖")
    assert whole.meaning.per == "‖H⁻¹∇ℓ‖"
    assert "nats per ‖H⁻¹∇ℓ‖" in repr(whole)
    stored = front(risk, "relatif", 0.1).explain_into(tmp_path / "run", queries)
    close(stored.values, whole.values)
    assert stored.meaning == whole.meaning
    found = front(risk, "relatif", 0.1).extremes(queries, 2)
    close(found.largest, np.sort(whole.values)[:, ::-1][:, :2])
    assert found.meaning == whole.meaning
    sweep = front(risk, "relatif").sweep(queries, [0.1, 0.4])
    close(sweep[0.1].values, whole.values)
    close(sweep[0.4].values, front(risk, "relatif", 0.4).explain(queries).values)
    with pytest.raises(errors.InputError):
        front(risk, "relatif").self_influence()


def test_an_example_without_a_gradient_scores_nothing():
    x, y = torch.randn(4, 3).double(), torch.tensor([0, -100, 1, 1])
    inf = uw.Influence(
        nn.Linear(3, 2).double(), (x, y), loss="cross_entropy", method="l_relatif", damping=0.1
    )
    scores = inf.explain((x[:1], y[:1])).values
    assert scores[0, 1] == 0
    assert np.isfinite(scores).all()


def test_an_indefinite_form_has_no_root():
    risk = next(case for case in CASES if case.name == "mlp").risk()
    inverse = -torch.eye(risk.objective.space.size, dtype=torch.float64)
    given = uw.methods.resolve_method(inverse)
    method = Method("given", "", solver=given.solver, rescale=per_self_influence)
    with pytest.raises(errors.IndefiniteError, match="no root"):
        front(risk, method).explain(risk.data)


# Baselines of the model


@all_cases
def test_norms_losses_and_cosines_are_the_loops(case):
    risk = case.risk()
    losses, gradients = loops(risk)
    rows = torch.stack(gradients)
    norms = rows.norm(dim=1)
    n = len(losses)
    whole = risk.data
    batch, _ = risk.at(torch.arange(n))
    close(per_example(risk.objective, batch).squared_norms(), norms**2)
    close(front(risk, "gradient_norm").explain(whole).values, norms.expand(n, n))
    close(front(risk, "loss").explain(whole).values, np.tile(losses, (n, 1)))
    wanted = np.zeros((n, n))
    for q in range(n):
        for i in range(n):
            if norms[q] and norms[i]:
                wanted[q, i] = gradients[q] @ gradients[i] / (norms[q] * norms[i])
    close(front(risk, "cosine").explain(whole).values, wanted, atol=1e-11)


def test_a_cosine_is_of_the_measure_asked():
    risk = next(case for case in CASES if case.name == "mlp").risk()
    asked = front(risk, "cosine").explain(risk.data, measure="margin").values
    objective = risk.objective
    batch, _ = risk.at(torch.arange(len(risk.data)))
    own = per_example(objective, batch, "margin").dense()
    train = per_example(objective, batch).dense()
    wanted = nn.functional.cosine_similarity(own[:, None], train[None], dim=2)
    close(asked, wanted)


def test_the_margin_is_the_loops_and_needs_a_loss_that_has_one():
    risk = next(case for case in CASES if case.name == "mlp").risk()
    batch, _ = risk.at(torch.arange(7))
    outputs = risk.objective.model(batch.inputs[0]).detach()
    wanted = []
    for z, label in zip(outputs, batch.targets, strict=True):
        others = [z[k].exp().item() for k in range(3) if k != label]
        wanted.append(math.log(sum(others)) - z[label].item())
    close(front(risk, "margin").explain(risk.data).values, np.tile(wanted, (7, 1)))
    risk = next(case for case in CASES if case.name == "regression net").risk()
    with pytest.raises(errors.InputError, match="needs a margin"):
        front(risk, "margin").explain(risk.data)


def cosines(rows: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)


@pytest.mark.parametrize("name", ["softmax", "mlp", "keyword inputs", "recurrent"])
def test_embeddings_are_the_last_layers_inputs(name):
    risk = next(case for case in CASES if case.name == name).risk()
    batch, _ = risk.at(torch.arange(7))
    model = risk.objective.model
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    kept = []
    hook = last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
    if isinstance(batch.inputs, dict):
        model(**batch.inputs)
    else:
        model(*batch.inputs)
    hook.remove()
    close(front(risk, "embedding").explain(risk.data).values, cosines(kept[0]))


def test_embeddings_of_sequences_are_means_over_what_is_predicted():
    """The output layer is tied to the table; ignored positions do not count."""
    risk = next(case for case in CASES if case.name == "padded transformer").risk()
    batch, _ = risk.at(torch.arange(7))
    model, tokens = risk.objective.model, batch.inputs[0]
    h = model.embed(tokens)
    h = model.norm(h + model.attend(h, h, h, need_weights=False)[0]).detach()
    rows = torch.zeros(7, 4).double()
    for i in range(7):
        counted = [s for s in range(3) if batch.targets[i, s] != -100]
        for s in counted:
            rows[i] += h[i, s] / len(counted)
    close(front(risk, "embedding").explain(risk.data).values, cosines(rows), atol=1e-10)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
        nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 4), nn.Flatten()),
    ],
)
def test_embeddings_need_a_linear_layer_at_the_end(model):
    rows = torch.randn(6, 4), torch.arange(6) % 3
    inf = uw.Influence(model, rows, loss="cross_entropy", method="embedding")
    with pytest.raises(errors.InputError, match="must be a linear map"):
        inf.explain(rows)


# Tokens


def naive_bm25(queries: list[list[int]], texts: list[list[int]]) -> np.ndarray:
    mean = sum(map(len, texts)) / len(texts)
    table = np.zeros((len(queries), len(texts)))
    for q, query in enumerate(queries):
        for i, text in enumerate(texts):
            often = Counter(text)
            for token in query:
                holding = sum(token in other for other in texts)
                idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
                length = 1 - 0.75 + 0.75 * len(text) / mean
                table[q, i] += idf * often[token] / (often[token] + 1.2 * length)
    return table


def token_rows(n: int, seed: int, width: int = 9) -> tuple[Tensor, list[list[int]]]:
    """Token ids padded by 0 or −100, and the same as lists."""
    generator = np.random.default_rng(seed)
    texts = [generator.integers(1, 12, generator.integers(0, 7)).tolist() for _ in range(n)]
    texts[0] = [3, 3, 5, 11]
    padded = [text + [0] * (width - 1 - len(text)) + [-100] for text in texts]
    return torch.tensor(padded), texts


class Bag(nn.Module):
    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 3), nn.Linear(3, 2)
        self.masked = masked

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        counted = (input_ids > 0) if attention_mask is None else attention_mask.bool()
        rows = self.table(input_ids.clamp_min(0)) * counted[..., None]
        return self.head(rows.sum(1))


def bag(rows: Tensor, **settings) -> uw.Influence:
    torch.manual_seed(0)
    data = Data.of((rows, torch.arange(len(rows)) % 2), **settings)
    return uw.Influence(Bag(False).double(), data, loss="cross_entropy", method="bm25")


def test_bm25_is_the_loop():
    (rows, texts), (asked, queries) = token_rows(20, 0), token_rows(5, 1)
    found = bag(rows).explain((asked, torch.zeros(5).long()))
    close(found.values, naive_bm25(queries, texts))
    assert found.values.any(1).sum() >= 3
    assert "BM25" in found.meaning.sentence()


def test_bm25_does_not_see_padding_or_width():
    (rows, _), (asked, _) = token_rows(20, 0), token_rows(5, 1)
    labels = torch.zeros(5).long()
    wide, _ = token_rows(20, 0, width=15)
    close(bag(wide).explain((asked, labels)).values, bag(rows).explain((asked, labels)).values)


def test_bm25_goes_by_the_mask_where_there_is_one():
    rows, texts = token_rows(20, 0)
    asked, queries = token_rows(5, 1)

    def named(tokens: Tensor, masked: Tensor) -> dict[str, Tensor]:
        ids = tokens.masked_fill(~masked, 7)
        labels = torch.arange(len(ids)) % 2
        return {"input_ids": ids, "attention_mask": masked.long(), "labels": labels}

    # Token 0 counts where the mask says so.
    first, second = rows.clone(), asked.clone()
    first[1:4, 8], second[1, 8] = 0, 0
    counted, also = rows > 0, asked > 0
    counted[1:4, 8], also[1, 8] = True, True
    texts = [[*text, 0] if i in (1, 2, 3) else text for i, text in enumerate(texts)]
    queries = [[*text, 0] if i == 1 else text for i, text in enumerate(queries)]
    model = Bag(True).double()
    inf = uw.Influence(model, named(first, counted), loss="cross_entropy", method="bm25")
    close(inf.explain(named(second, also)).values, naive_bm25(queries, texts))


def test_bm25_of_empty_texts_is_nothing_and_of_empty_queries_refused():
    (rows, _), nothing = token_rows(20, 0), torch.zeros(2, 9).long()
    labels = torch.zeros(2).long()
    assert not bag(nothing).explain((rows[:2], labels)).values.any()
    with pytest.raises(errors.InputError, match="No query has a token"):
        bag(rows).explain((nothing, labels))


def test_distances_far_from_the_origin_are_distances():
    x = (torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) + 2000).float()
    y = torch.zeros(60, dtype=torch.long)
    inf = uw.Influence(nn.Linear(4, 2), (x, y), loss="cross_entropy", method="euclidean")
    found = torch.from_numpy(inf.explain((x, y)).values)
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(found.double(), -exact)
    assert found.diagonal().abs().max() == 0


@pytest.mark.parametrize("method", ["bm25", "euclidean"])
def test_what_is_no_token_and_what_has_no_distance_is_refused(method):
    rows = torch.randn(6, 4), torch.arange(6) % 3
    inf = uw.Influence(nn.Linear(4, 3), rows, loss="cross_entropy", method="bm25")
    with pytest.raises(errors.InputError, match=r"counts token ids.*float32 \(6, 4\)"):
        inf.explain(rows)
    tokens = torch.randint(5, (6, 3)), torch.randint(5, (6, 3))
    inf = uw.Influence(Tied(), tokens, loss="cross_entropy", method="euclidean")
    with pytest.raises(errors.InputError, match="bm25"):
        inf.explain(tokens)


# All baselines


def problem(method: object, order: Tensor | None = None, batch_size: int | None = None):
    """An influence and queries whose inputs suit the baseline."""
    torch.manual_seed(3)
    if method == "bm25":
        inputs, model = token_rows(20, 0)[0], Bag(False).double()
        asked = token_rows(5, 1)[0]
    else:
        inputs, asked = torch.randn(20, 4).double(), torch.randn(5, 4).double()
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    data = Data.of((inputs, torch.arange(20) % 2), batch_size=batch_size)
    data = data if order is None else data.take(order)
    queries = Data.of((asked, torch.arange(5) % 2), batch_size=batch_size)
    return uw.Influence(model, data, loss="cross_entropy", l2=0.1, method=method), queries


# Drawn labels go by place, and what an expansion of queries leaves out by the other queries.
RELATIVE = [
    replace(METHODS[name], curvature="empirical_ekfac", solver=uw.Spectral(tolerance=0))
    for name in ("relatif", "l_relatif")
]


@pytest.mark.parametrize("method", [*BASELINES, *RELATIVE], ids=lambda m: getattr(m, "name", m))
def test_batches_order_and_splits_change_nothing(method):
    inf, queries = problem(method)
    whole = inf.explain(queries)
    for size in (1, 3, 20):
        again, same = problem(method, batch_size=size)
        close(again.explain(same).values, whole.values, atol=1e-11)
    order = torch.randperm(20)
    again, _ = problem(method, order)
    close(again.explain(queries).values, whole.values[:, order], atol=1e-11)
    # Splits may be tensors of their own, whose ids start again at 0.
    inputs, targets = queries.rows().inputs[0], queries.rows().targets
    parts = [inf.explain((inputs[some], targets[some])).values for some in ([0, 1], [2, 3, 4])]
    close(np.concatenate(parts), whole.values, atol=1e-11)


@pytest.mark.parametrize("method", BASELINES)
def test_baselines_say_that_they_predict_nothing(method):
    inf, queries = problem(method)
    scores = inf.explain(queries)
    assert not scores.meaning.change
    assert "no effect of removal" in scores.meaning.sentence()
    assert "not a change on removal" in repr(scores)
    assert scores.meaning.column == METHODS[method].quantity
    assert "no effect of removal" in repr(scores.top(0, 3))
    with pytest.raises(errors.InputError):
        inf.validate(queries)


def test_random_numbers_are_even_and_of_each_pair():
    rows = torch.randn(400, 3), torch.arange(400) % 2
    inf = uw.Influence(nn.Linear(3, 2), rows, loss="cross_entropy", method="random")
    values = inf.explain((rows[0][:50], rows[1][:50])).values
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(values.var() - 1 / 12) < 0.002
    apart = np.corrcoef(values)[~np.eye(50, dtype=bool)]
    assert abs(apart).max() < 0.25
    assert len(np.unique(values)) > 0.99 * values.size


def test_a_baseline_that_is_not_finite_names_the_row():
    rows = torch.randn(6, 3), torch.tensor([0, 1, 0, -100, 1, 1])
    inf = uw.Influence(nn.Linear(3, 2), rows, loss="cross_entropy", method="margin")
    with pytest.raises(errors.NonFiniteError, match="'margin' is nan at row 3"):
        inf.explain((rows[0][:1], rows[1][:1]))


@pytest.mark.parametrize("method", METHODS)
def test_every_row_explains_in_one_line(method):
    row = METHODS[method]
    assert row.name == method
    assert row.summary
    assert "\n" not in row.summary
    assert len(row.summary) < 80
    inf, queries = problem(method)
    if isinstance(row, Method):  # a Hessian is positive where the loss is convex
        inputs, targets = inf.data.rows().inputs[0], inf.data.rows().targets
        model = nn.Linear(4, 2).double()
        inf = uw.Influence(model, (inputs, targets), loss="cross_entropy", l2=0.1, method=method)
    assert np.isfinite(inf.explain(queries).values).all()
