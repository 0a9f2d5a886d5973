"""The convolutional network of Figure 2, its curvature, and refits near a point."""

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

import upweight as uw
from reproduce.copies import kept_shares
from upweight.evaluation.descent import descend
from upweight.gradients import stacked_gradient
from upweight.linalg import Cholesky, CholeskyInverse, Dense
from upweight.risk import Risk

__all__ = [
    "LAYERS",
    "MOST_STEPS",
    "Network",
    "damped_inverse",
    "gauss_newton",
    "refitted",
    "value_and_slope",
]

SETTLED, MOST_STEPS = 1e-2, 40
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
    risk: Risk, start: Tensor, shares: Tensor, near: tuple[CholeskyInverse, float]
) -> Tensor:
    """Minimise reweighted objectives, held near θ* by ½ shift ‖θ − θ*‖², all copies together.

    What is left of ∇R at θ* is taken off as a constant, so that the copy that keeps everything
    stays there exactly. To first order the minimiser is then θ* plus the damped influence.

    Args:
        risk: the objective at θ*.
        start: θ*, ``[p]``, in float64.
        shares: of every example in each copy's mean, ``[m, n]``.
        near: inverse of a curvature near H + shift, in float64, and shift.

    Returns:
        Rows with what is left of the slope, as a share of the change's own, in the last column.
    """
    objective, (inverse, shift) = risk.objective, near
    everything = torch.arange(len(risk.data))
    whole, origin = risk.at(everything)[0], start.repeat(len(shares), 1)

    def slopes(rows: Tensor, shares: Tensor) -> Tensor:
        at = rows.to(objective.space.dtype)
        return stacked_gradient(objective, whole, at, shares).to(rows) + rows * objective.l2

    tilt = slopes(origin[:1], kept_shares(risk, everything, [everything[:0]]))

    def pulled(rows: Tensor, which: Tensor) -> Tensor:
        return slopes(rows, shares[which]) - tilt + shift * (rows - start)

    first = (slopes(origin, shares) - tilt).norm(dim=1)
    # The copy that keeps everything has no change of its own to be compared with.
    goal = (SETTLED * first).clamp_min(1e-3 * float(first.median()))
    found = descend(pulled, inverse, origin, goal=goal, max_steps=MOST_STEPS)
    left = found.slope / first.clamp_min(float(goal.min()))
    return torch.cat([found.rows, left[:, None]], dim=1)
