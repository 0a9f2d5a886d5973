"""Baselines: which training examples are like a query, or stand out, without any curvature.

Each function does once what depends on the queries and on all of the training data, and returns
what is left to do for a training batch: values ``[q, b]``, larger = first.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from upweight.data import Batch, Data
from upweight.engine import query_gradients
from upweight.errors import InputError, LossError
from upweight.gradients import last_layer, observe, per_example
from upweight.gradients.rules.dense import addmm, linear, matmul
from upweight.gradients.watch import RULES
from upweight.noise import uniform
from upweight.objective import Measure, Objective
from upweight.risk import DEFAULT_BATCH, Risk
from upweight.sources import checksum, leaves

__all__ = [
    "Likeness",
    "cosine",
    "embedding",
    "gradient_norm",
    "negative_distance",
    "negative_margin",
    "random",
    "training_loss",
]

Likeness = Callable[[Batch], Tensor]
SEED = 0


def placed(risk: Risk, queries: Data) -> Iterator[Batch]:
    """Batches of queries on the model's device."""
    for batch in queries.batches(queries.batch_size or DEFAULT_BATCH):
        yield risk.objective.place(batch)


def _alike(values: Tensor, queries: Data) -> Tensor:
    """Values ``[b]`` that are the same for every query, ``[q, b]``."""
    return values.expand(len(queries), -1)


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; those of length 0 as they are."""
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, 1.0)


def negative_distance(risk: Risk, queries: Data, measure: Measure) -> Likeness:
    """−‖x_q − x_i‖ over all floating inputs.

    Raises:
        InputError: the inputs are integers, or of different sizes.

    Example:
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.tensor([[0.0], [3.0]]), torch.zeros(2, 1)))
        >>> risk = Risk(Objective(torch.nn.Linear(1, 1), "mean_squared_error"), data)
        >>> negative_distance(risk, data, "loss")(data.rows())
        tensor([[-0., -3.],
                [-3., -0.]])
    """
    del measure
    asked = _flat(risk.objective.place(queries.rows()))

    def likeness(batch: Batch) -> Tensor:
        found = _flat(batch)
        if asked.shape[1] != found.shape[1]:
            raise InputError(
                f"Queries of {asked.shape[1]} numbers and examples of {found.shape[1]} have no "
                "distance. Bring them to one size."
            )
        # By a matrix product, equal rows far from the origin would be apart.
        return -torch.cdist(asked, found, compute_mode="donot_use_mm_for_euclid_dist")

    return likeness


def _flat(batch: Batch) -> Tensor:
    floating = [x.flatten(1) for x in leaves(batch.inputs) if x.is_floating_point()]
    if not floating:
        raise InputError(
            "The inputs are integers (token ids?), which have no distance. Use method='bm25' or "
            "'embedding'."
        )
    return torch.cat(floating, dim=1)


def cosine(risk: Risk, queries: Data, measure: Measure) -> Likeness:
    """∇m(q)·∇ℓ_i / (‖∇m(q)‖ ‖∇ℓ_i‖), without L2; 0 where a gradient is 0.

    Example:
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.ones(2, 1), torch.tensor([[5.0], [-5.0]])))
        >>> risk = Risk(Objective(torch.nn.Linear(1, 1), "mean_squared_error"), data)
        >>> cosine(risk, data, "loss")(data.rows()).round()
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    rows = _unit(query_gradients(risk.objective, queries, measure).dense())

    def likeness(batch: Batch) -> Tensor:
        gradients = per_example(risk.objective, batch)
        length = gradients.squared_norms().sqrt()
        return gradients.dot(rows) / torch.where(length > 0, length, 1.0)

    return likeness


def training_loss(risk: Risk, queries: Data, measure: Measure) -> Likeness:
    """ℓ_i of each training example without L2, the same for every query.

    Example:
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.zeros(1, 1), torch.tensor([[3.0]])))
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> risk = Risk(Objective(model, "mean_squared_error"), data)
        >>> training_loss(risk, data, "loss")(data.rows())
        tensor([[9.]])
    """
    del measure
    objective = risk.objective

    def likeness(batch: Batch) -> Tensor:
        with torch.no_grad():
            return _alike(objective.losses(objective.space.values(), batch), queries)

    return likeness


def gradient_norm(risk: Risk, queries: Data, measure: Measure) -> Likeness:
    """‖∇ℓ_i‖ of each training example without L2, the same for every query.

    Example:
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.zeros(1, 1), torch.tensor([[3.0]])))
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> risk = Risk(Objective(model, "mean_squared_error"), data)
        >>> gradient_norm(risk, data, "loss")(data.rows())
        tensor([[0.]])
    """
    del measure
    return lambda batch: _alike(per_example(risk.objective, batch).squared_norms().sqrt(), queries)


def negative_margin(risk: Risk, queries: Data, measure: Measure) -> Likeness:
    """Minus the margin of each training example, the same for every query.

    Raises:
        InputError: the loss has no margin.

    Example:
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.zeros(1, 1), torch.tensor([1])))
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> risk = Risk(Objective(model, "cross_entropy"), data)
        >>> negative_margin(risk, data, "loss")(data.rows())
        tensor([[-0.]])
    """
    del measure
    objective = risk.objective
    margin = objective.measured("margin")

    def likeness(batch: Batch) -> Tensor:
        try:
            with torch.no_grad():
                return _alike(-margin(objective.space.values(), batch), queries)
        except LossError as error:
            raise InputError(
                f"The baseline 'margin' needs a margin, and here the loss {objective.loss.name!r} "
                "has none. Use method='loss'."
            ) from error

    return likeness


def random(risk: Risk, queries: Data, measure: Measure) -> Likeness:
    """Numbers between 0 and 1 that depend on the query and on the training example's id alone.

    However the data are batched, ordered or split, a pair keeps its number.

    Example:
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.ones(3, 1), torch.ones(3, 1)))
        >>> risk = Risk(Objective(torch.nn.Linear(1, 1), "mean_squared_error"), data)
        >>> numbers = random(risk, data, "loss")
        >>> torch.equal(numbers(data.rows(1, 3)), numbers(data.rows())[:, 1:])
        True
    """
    del measure
    seeds = [
        checksum((one.inputs, one.targets))
        for batch in queries.batches(DEFAULT_BATCH)
        for one in (batch.part(slice(i, i + 1)) for i in range(len(batch)))
    ]

    def likeness(batch: Batch) -> Tensor:
        ids = risk.data.ids[batch.positions.numpy()].tolist()
        keys = torch.tensor([zlib.crc32(repr(key).encode()) for key in ids], device="cpu")
        return torch.stack([uniform(keys, torch.Size([]), SEED + seed) for seed in seeds])

    return likeness


def embedding(risk: Risk, queries: Data, measure: Measure) -> Likeness:
    """Cosine of the inputs to the last linear layer that was chosen.

    Of several positions it is their mean, over those whose output the example's loss looks at:
    padding does not count. 0 where an input is 0.

    Raises:
        InputError: the model does not end in a linear layer.

    Example:
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.tensor([[3.0, 4.0], [4.0, -3.0]]), torch.tensor([0, 1])))
        >>> risk = Risk(Objective(torch.nn.Linear(2, 2), "cross_entropy"), data)
        >>> embedding(risk, data, "loss")(data.rows())
        tensor([[1., 0.],
                [0., 1.]])
    """
    del measure
    first, _ = risk.rows(0, 1)
    try:
        part = risk.objective.of_part(last_layer(risk.objective, first))
    except InputError as error:
        raise _headless() from error
    rows = torch.cat([_unit(_embedded(part, batch)) for batch in placed(risk, queries)])
    return lambda batch: rows @ _unit(_embedded(part, batch)).T


def _headless() -> InputError:
    return InputError(
        "The baseline 'embedding' compares the inputs of the model's last layer, which must be a "
        "linear map (nn.Linear, or a product with a matrix) with a chosen weight. Here it is not: "
        "use method='euclidean' on features, or 'cosine'."
    )


def _embedded(part: Objective, batch: Batch) -> Tensor:
    """Inputs ``[b, i]`` of the last use of a weight matrix."""
    seen = observe(part, batch)
    seen.captured()
    call: Any = next((call for call in reversed(seen.calls) if call.uses), None)
    known = (addmm, linear, matmul)
    if call is None or RULES[call.kind[0]][0] not in known or call.slope is None:
        raise _headless()
    use = call.uses[0]
    if len(part.space.shapes[use.name]) != 2:
        raise _headless()
    outer = use.factors(call.slope)
    left: Tensor = outer.left[0]
    right: Tensor = outer.right[0].to(part.space.dtype)
    if right.shape[1] == 1:
        return right[:, 0]
    counted = (left != 0).any(2).to(right)
    total = (right * counted[..., None]).sum(1)
    return total / counted.sum(1).clamp_min(1)[:, None]
