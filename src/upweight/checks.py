"""Checks of a few rows before long work: that a question has one finite answer per example."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from upweight.data import Batch, Data
from upweight.errors import DataError, LossError, ModelError, NonFiniteError, UpweightError
from upweight.losses import CrossEntropy, CustomLoss, Loss
from upweight.objective import Measure, Objective
from upweight.refusals import unchanging
from upweight.sources import leaves

__all__ = ["probe", "refuse_asymmetric", "refuse_flat", "require_finite"]

ROWS = 4
LARGEST_COPY = 2**24  # parameters of a model that is copied for a check
ASYMMETRY = 1e-5  # of the length of a product


def _few(objective: Objective, data: Data) -> Batch:
    """The rows that are tried."""
    return objective.place(data.rows(0, min(ROWS, len(data))))


def _try(objective: Objective, batch: Batch, measure: Measure, role: str) -> Any:
    """The measure of a batch, with a clear word when the model cannot take it."""
    params = objective.space.values()
    try:
        with unchanging(objective.model):
            outputs = objective.outputs(params, batch)
        objective.loss.check(outputs, batch.targets)
        _refuse_unshifted(objective.loss, batch)
        return objective.measured(measure)(params, batch)
    except UpweightError:
        raise
    except Exception as error:
        found = [f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in leaves(batch.inputs)]
        raise DataError(
            f"The {role} cannot be run through the model and the loss: {error}. A batch of "
            f"inputs is {', '.join(found)}; give the model what it was trained on, with "
            "targets."
        ) from error


def probe(
    objective: Objective, data: Data, measure: Measure = "loss", *, role: str = "data"
) -> None:
    """Check on a few rows that the measure is per example, finite, certain and uncoupled.

    Args:
        objective: what will be asked.
        data: examples.
        measure: what is asked of them.
        role: what to call them in a message.

    Raises:
        DataError: the model or the loss cannot be run on them.
        LossError: not of shape ``[n]``, or rows that influence each other's values.
        ModelError: two evaluations differ.
        NonFiniteError: NaN or infinity.
    """
    batch = _few(objective, data)
    rows = range(len(batch))
    function, params = objective.measured(measure), objective.space.values()
    with torch.no_grad():
        whole = _try(objective, batch, measure, role)
        label = "loss" if measure == "loss" else "measure"
        if not isinstance(whole, Tensor) or whole.shape != (len(rows),):
            shape = tuple(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
            raise LossError(
                f"The {label} must give one number per example, shape [{len(rows)}] for "
                f"{len(rows)} rows; got {shape}. Use reduction='none' and average over "
                "everything but the first axis."
            )
        require_finite(whole, f"The {label}", batch)
        if not torch.equal(whole, function(params, batch)):
            raise ModelError(
                "Two evaluations of the same rows differ. Call model.eval(), and seed or "
                "remove randomness in the model and the loss."
            )
        parts = [function(params, batch.part(slice(i, i + 1))) for i in range(len(rows))]
    low = objective.autocast is not None or whole.dtype in (torch.bfloat16, torch.float16)
    tolerance = 1e-2 if low else 1e-4
    size = tolerance * float(whole.abs().max())
    if not torch.allclose(whole, torch.cat(parts), rtol=tolerance, atol=size):
        raise LossError(
            f"The {label} of an example changes with the other examples of its batch (batch "
            "normalisation in train mode, or a loss that couples rows). Influence needs one "
            "number per example that depends on that example alone."
        )


def _refuse_unshifted(loss: Loss, batch: Batch) -> None:
    """Labels that repeat an input are a language model's, to be shifted by its own loss."""
    if not isinstance(loss, CrossEntropy) or not isinstance(batch.inputs, dict):
        return
    for name, value in batch.inputs.items():
        if not isinstance(value, Tensor) or value.shape != batch.targets.shape or value.dim() < 2:
            continue
        counted = batch.targets != loss.ignore_index
        if bool((value == batch.targets)[counted].all()) and not value.is_floating_point():
            raise LossError(
                f"The labels repeat the input {name!r}, so each output would be compared with the "
                "token it has just read. Shift the labels by one (labels[:, :-1] = ids[:, 1:], the "
                "last ignored), or pass a loss that shifts."
            )


def refuse_flat(objective: Objective, data: Data) -> None:
    """Raise LossError for a loss without curvature in the outputs, whose Gauss-Newton matrix is 0.

    Its second derivative is taken at the outputs of a few rows and at others far around them.
    """
    if not isinstance(objective.loss, CustomLoss):
        return
    batch = _few(objective, data)
    with torch.no_grad():
        outputs = objective.call(batch)
    if not isinstance(outputs, Tensor):
        return
    generator = torch.Generator().manual_seed(0)
    along, *noise = torch.randn(4, *outputs.shape, generator=generator, dtype=torch.float64).to(
        outputs
    )
    steps = [size * one for size, one in zip((0.1, 1.0, 10.0), noise, strict=True)]
    points = [outputs, *(outputs + step for step in steps), *steps]
    for point in points:
        bend = _second(lambda z: objective.loss(z, batch.targets).sum(), point, along)
        if bool(bend.any()):
            return
    raise LossError(
        f"The loss {objective.loss.name!r} has no second derivative in the model's outputs (as "
        "nll_loss of log-probabilities, or |z − y|), so its Gauss-Newton matrix is 0 and scores "
        "would be plain products of gradients. Return logits and use loss='cross_entropy', or use "
        "a smooth loss, or method='exact' or the empirical Fisher."
    )


def _second(function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor) -> Tensor:
    """The second derivative at a point along a direction."""
    leaf = at.detach().clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        if not slope.requires_grad:
            return torch.zeros_like(leaf)
        found: tuple[Tensor, ...] = torch.autograd.grad(
            slope, leaf, along.to(slope), allow_unused=True, materialize_grads=True
        )
    return found[0]


def _doubled(objective: Objective) -> Objective | None:
    """The objective in double precision; None for a model too large for a copy, or without."""
    if objective.space.dtype == torch.float64:
        return objective
    if sum(p.numel() for p in objective.model.parameters()) > LARGEST_COPY:
        return None
    try:
        return objective.in_double()
    except (RuntimeError, TypeError):  # what torch or the model cannot copy
        return None


def refuse_asymmetric(objective: Objective, data: Data) -> None:
    """Raise ModelError where torch's second derivatives are none: u·Hv is not v·Hu.

    In double: the Hessian of a sure model is rounding in single precision.
    """
    twin = _doubled(objective)
    if twin is None:
        return
    batch = _few(twin, data)
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(2, twin.space.size, generator=generator, dtype=torch.float64)
    pair = pair.to(twin.space.device)

    def total(row: Tensor) -> Tensor:
        return twin.losses(twin.space.unflatten(row), batch).sum()

    bent = torch.stack([_second(total, twin.space.row(), one) for one in pair])
    one, other = (bent[0] * pair[1]).sum(), (bent[1] * pair[0]).sum()
    if not bool((one - other).abs() <= ASYMMETRY * bent.norm(dim=1).max()):
        raise ModelError(
            "The second derivatives of this model are not symmetric, so that torch's are wrong "
            "(those of weight_norm are, in some versions, and of an autograd.Function whose "
            "backward is not differentiable). Remove the parametrization "
            "(torch.nn.utils.parametrize.remove_parametrizations), or use method='ggn_cg' or "
            "another with first derivatives alone."
        )


def require_finite(values: Tensor, what: str, batch: Batch) -> None:
    """Raise NonFiniteError naming the first row of the batch that is not finite."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        row = (
            int((~finite).flatten(1).any(1).nonzero()[0])
            if values.dim() > 1
            else int((~finite).nonzero()[0])
        )
        raise NonFiniteError(
            f"{what} is {values[row].flatten()[~finite[row].flatten()][0].item()} at row "
            f"{int(batch.positions[row])} (batch of rows {int(batch.positions[0])} to "
            f"{int(batch.positions[-1])}). Look for NaN inputs, log(0) or overflow there."
        )
