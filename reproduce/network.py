"""The convolutional network of Figure 2, its curvature, and refits near a point."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

import upweight as uw
from upweight.evaluation.training import copies_gradient, kept_shares
from upweight.linalg import Cholesky, CholeskyInverse, Dense
from upweight.risk import Risk

__all__ = [
    "LAYERS",
    "Network",
    "damped_inverse",
    "gauss_newton",
    "refitted",
    "value_and_slope",
]

SETTLED, MOST_STEPS = 1e-2, 12
LAYERS = ((1, 8, 3, 1), (8, 8, 3, 2), (8, 8, 3, 1), (8, 8, 3, 2), (8, 8, 3, 1), (8, 10, 1, 1))


class Network(nn.Module):
    """The paper's network: six convolutions, tanh after each, a mean over space, ten outputs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.convolutions = nn.ModuleList(nn.Conv2d(*layer[:3], layer[3]) for layer in LAYERS)
        self.top = nn.Linear(10, 10)
        for layer in (*self.convolutions, self.top):
            size = layer.weight[0].numel()
            std = (1.0 if layer is self.top else 2.0) / size**0.5
            nn.init.trunc_normal_(layer.weight, 0, std, -2 * std, 2 * std, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """Ten scores of images given as rows ``[n, 784]``."""
        # Channels last, as a view: convolutions of few channels are fastest so.
        x = pixels.unflatten(-1, (28, 28, 1)).permute(0, 3, 1, 2)
        for layer in self.convolutions:
            x = torch.tanh(layer(x))
        scores: Tensor = self.top(x.mean((2, 3)))
        return scores


def gauss_newton(risk: Risk) -> Tensor:
    """The Gauss-Newton matrix with L2, in float64, from the Jacobians of ten outputs.

    Σ Jᵀ(diag p − p pᵀ)J = Σ (SᵀJ)ᵀ(SᵀJ) with S = diag √p − p √pᵀ: ten rows an example, where
    products with a matrix would take 2,616 passes over the data.
    """
    space, objective = risk.objective.space, risk.objective
    row = space.row()
    outer = torch.zeros(space.size, space.size, dtype=torch.float64)

    def outputs(at: Tensor, pixels: Tensor) -> Tensor:
        batch = uw.Data.of((pixels[None], torch.zeros(1))).rows()
        found: Tensor = objective.outputs(space.unflatten(at), batch)
        return found[0]

    jacobian = vmap(jacrev(outputs), in_dims=(None, 0))
    for batch, share in risk.batches(100):
        chance = objective.outputs(space.values(), batch).softmax(1)
        root = chance.sqrt() * share.sqrt()[:, None]
        factor = torch.diag_embed(root) - chance[:, :, None] * root[:, None, :]
        rows = torch.einsum("nck,ncp->nkp", factor, jacobian(row, batch.inputs[0])).flatten(0, 1)
        outer += rows.T @ rows
    outer.diagonal().add_(objective.l2)
    return outer


def damped_inverse(ggn: Tensor, damping: float, dtype: torch.dtype) -> CholeskyInverse:
    shifted = ggn.clone()
    shifted.diagonal().add_(damping)
    return Cholesky().init(Dense(shifted.to(dtype)))


def value_and_slope(risk: Risk, row: Tensor) -> tuple[Tensor, Tensor]:
    """R and ∇R at a row."""
    objective = risk.objective
    leaf = row.detach().requires_grad_(True)
    value = 0.5 * (objective.l2 * leaf * leaf).sum()
    value.backward()  # type: ignore[no-untyped-call]
    for batch, share in risk.batches(250):
        part = (objective.losses(objective.space.unflatten(leaf), batch) * share).sum()
        part.backward()  # type: ignore[no-untyped-call]
        value = value.detach() + part.detach()
    assert leaf.grad is not None
    return value, leaf.grad


def refitted(
    risk: Risk, start: Tensor, gone: Sequence[Tensor], inverse: CholeskyInverse, *, shift: float
) -> Tensor:
    """Minimise R without some examples, held near θ* by ½ shift ‖θ − θ*‖², for all copies.

    What is left of ∇R at θ* is taken off as a constant, so that the copy that keeps everything
    stays there exactly. To first order the minimiser is then θ* plus the damped influence. Steps
    are along the damped Gauss-Newton inverse, halved for a copy whose slope grows.

    Args:
        risk: the objective at θ*.
        start: θ*, ``[p]``, in float64.
        gone: positions each copy leaves out.
        inverse: of a curvature near H + shift.
        shift: λ.

    Returns:
        Rows with what is left of the slope, as a share of the removal's own, in the last column.
    """
    objective, everything = risk.objective, torch.arange(len(risk.data))
    whole, origin = risk.at(everything)[0], start.repeat(len(gone), 1)
    shares = kept_shares(risk, everything, gone)

    def slopes(rows: Tensor, shares: Tensor) -> Tensor:
        found = copies_gradient(objective, whole, rows.to(objective.space.dtype), shares)
        return found.to(rows) + rows * objective.l2

    tilt = slopes(origin[:1], kept_shares(risk, everything, [everything[:0]]))
    rows, slope = origin.clone(), slopes(origin, shares) - tilt
    first, size = slope.norm(dim=1), torch.ones_like(slope[:, :1])
    for _ in range(MOST_STEPS):
        open_ = (slope.norm(dim=1) > SETTLED * first).nonzero()[:, 0]
        if not len(open_):
            break
        step = inverse.apply(slope[open_].to(inverse.dtype)).to(rows)
        tried = rows[open_] - size[open_] * step
        found = slopes(tried, shares[open_]) - tilt + shift * (tried - start)
        better = found.norm(dim=1) < slope[open_].norm(dim=1)
        good = open_[better]
        rows[good], slope[good] = tried[better], found[better]
        size[open_[~better]] /= 2
    left = slope.norm(dim=1) / first.clamp_min(torch.finfo(first.dtype).tiny)
    return torch.cat([rows, left[:, None]], dim=1)
