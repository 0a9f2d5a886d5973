"""Gradients and measures of many copies of one model at once."""

import torch
from torch import Tensor

from upweight.data import Batch
from upweight.gradients.autograd import map_rows, math_attention
from upweight.gradients.linear import linear_form, residual
from upweight.linalg.values import join_blocks
from upweight.objective import Measure, Objective

__all__ = ["stacked_gradient", "stacked_measure"]

PIECE_BYTES = 64 * 2**20
MODELS, CELLS = 4, 512


def stacked_gradient(objective: Objective, batch: Batch, rows: Tensor, weights: Tensor) -> Tensor:
    """Σ_i weight[m, i] ∇ℓ_i(θ_m) for models θ_m, without L2.

    Args:
        objective: the model's form and loss.
        batch: placed examples, n of them.
        rows: parameters of m models, ``[m, p]``.
        weights: of each example for each model, ``[m, n]``.

    Returns:
        ``[m, p]``.
    """
    form = linear_form(objective, batch)
    if form is None:
        return _by_pieces(objective, batch, rows, weights)
    x, _ = form.seen(batch)
    m, c = len(rows), form.outputs
    total_blocks = torch.zeros(m * c, x.shape[1], dtype=x.dtype, device=x.device)
    size = max(1, PIECE_BYTES // (m * c * x.element_size()))
    for start in range(0, len(x), size):
        cut = slice(start, start + size)
        z = form.at(x[cut], rows)
        targets = batch.targets[cut].repeat_interleave(m, dim=0)
        slope = residual(objective, z.flatten(0, 1), targets, "loss").view_as(z)
        slope = slope * weights[:, cut].T[:, :, None]
        total_blocks.addmm_(slope.reshape(len(slope), m * c).T, x[cut])
    return join_blocks(total_blocks.view(m, c, -1), bias=form.bias)


def _by_pieces(objective: Objective, batch: Batch, rows: Tensor, weights: Tensor) -> Tensor:
    """The same by autograd, a few models and examples at a time.

    Small pieces stay in the processor's cache, and a vectorised convolution of many models is a
    slow one. The derivative is taken of the stacked losses: faster than stacking derivatives.
    """
    found = []
    for some, weight in zip(rows.split(MODELS), weights.split(MODELS), strict=True):
        total = torch.zeros_like(some)
        size = max(1, CELLS // len(some))
        for start in range(0, len(batch), size):
            cut = slice(start, start + size)
            part, leaf = batch.part(cut), some.detach().requires_grad_(True)

            def losses(row: Tensor, part: Batch = part) -> Tensor:
                return objective.losses(objective.space.unflatten(row), part)

            with torch.enable_grad(), math_attention():
                value = (map_rows(losses, leaf) * weight[:, cut]).sum()
            total += torch.autograd.grad(value, leaf)[0]
        found.append(total)
    return torch.cat(found)


def stacked_measure(objective: Objective, batch: Batch, rows: Tensor, measure: Measure) -> Tensor:
    """The measure ``[m, q]`` of a batch of queries under models with parameters ``[m, p]``."""
    measured = objective.measured(measure)
    with torch.no_grad(), math_attention():
        return map_rows(lambda row: measured(objective.space.unflatten(row), batch), rows)
