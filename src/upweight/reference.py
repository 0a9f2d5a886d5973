"""The naive whole in one file: dense matrices, Python loops, float64. Tests and docs only.

Read this first. Everything else in the library computes these numbers faster.

A problem is n examples with losses ℓ_i(θ), shares of the mean that sum to 1, and L2:

    R(θ) = Σ_i share_i ℓ_i(θ) + ½ Σ_k λ_k θ_k²

Removing example i and minimising again changes a query's measure m by about

    score_i = share_i · ∇m(θ)ᵀ (∇²R(θ) + damping)⁻¹ (∇ℓ_i(θ) + [L2 inside each loss] λ θ)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor
from torch.autograd.functional import hessian as dense_hessian
from torch.autograd.functional import jacobian

__all__ = [
    "Problem",
    "diagonal",
    "ekfac",
    "empirical_fisher",
    "expand",
    "gauss_newton",
    "gradient",
    "gradient_matrix",
    "hessian",
    "kfac",
    "l2_derivative",
    "lookup",
    "newton_step",
    "perturbation",
    "reduce",
    "ridge",
    "ridge_leave_one_out",
    "scores",
    "shampoo",
    "train",
]

Scalar = Callable[[Tensor], Tensor]
# One gradient G = Σ_s l_s r_sᵀ of a weight [o, i]: its share, and (l [o], r [i]) of every position.
Samples = list[tuple[float, list[tuple[Tensor, Tensor]]]]
# Left [o, o] and right [i, i] second moments, and the mass they both hold.
Moments = tuple[Tensor, Tensor, float]


@final
@dataclass(frozen=True)
class Problem:
    """n examples and what was minimised over them.

    Attributes:
        loss: (θ ``[p]``, i) -> ℓ_i(θ), a scalar.
        shares: share of each example in the mean, ``[n]``.
        l2: λ of every parameter, ``[p]``.
        l2_inside: whether L2 is part of each example's loss (and leaves with it).
    """

    loss: Callable[[Tensor, int], Tensor]
    shares: Tensor
    l2: Tensor
    l2_inside: bool = True

    def risk(self, theta: Tensor) -> Tensor:
        """R(θ)."""
        mean = sum(self.shares[i] * self.loss(theta, i) for i in range(len(self.shares)))
        return mean + 0.5 * (self.l2 * theta**2).sum()

    def without(self, removed: list[int]) -> "Problem":
        """The problem after a removal: with L2 inside, the rest is averaged anew."""
        shares = self.shares.clone()
        shares[removed] = 0
        return Problem(
            self.loss, shares / shares.sum() if self.l2_inside else shares, self.l2, self.l2_inside
        )


def gradient(function: Scalar, theta: Tensor) -> Tensor:
    """∇f(θ), ``[p]``.

    Example:
        >>> gradient(lambda t: (t**2).sum(), torch.tensor([1.0, 2.0]))
        tensor([2., 4.])
    """
    leaf = theta.detach().clone().requires_grad_(True)
    return torch.autograd.grad(function(leaf), leaf)[0]


def hessian(problem: Problem, theta: Tensor) -> Tensor:
    """∇²R(θ), ``[p, p]``, entry by entry."""
    matrix: Tensor = dense_hessian(problem.risk, theta.detach())
    return matrix


def gauss_newton(
    problem: Problem,
    theta: Tensor,
    outputs: Callable[[Tensor, int], Tensor],
    output_loss: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Σ_i share_i J_iᵀ ∇²_z ℓ_i J_i + diag λ, ``[p, p]``."""
    total = torch.diag(problem.l2)
    for i, share in enumerate(problem.shares):
        z = outputs(theta, i).detach()
        slope: Tensor = jacobian(partial(_flat, outputs, i), theta)
        bend: Tensor = dense_hessian(partial(_at, output_loss, i, z.shape), z.reshape(-1))
        total = total + share * slope.T @ bend @ slope
    return total


def _flat(outputs: Callable[[Tensor, int], Tensor], i: int, theta: Tensor) -> Tensor:
    return outputs(theta, i).reshape(-1)


def _at(
    output_loss: Callable[[Tensor, int], Tensor], i: int, shape: torch.Size, flat: Tensor
) -> Tensor:
    return output_loss(flat.reshape(shape), i)


def _losses(problem: Problem, i: int, theta: Tensor) -> Tensor:
    return problem.loss(theta, i)


def empirical_fisher(problem: Problem, theta: Tensor) -> Tensor:
    """Σ_i share_i ∇ℓ_i ∇ℓ_iᵀ + diag λ, ``[p, p]``."""
    total = torch.diag(problem.l2)
    for i, share in enumerate(problem.shares):
        g = gradient(partial(_losses, problem, i), theta)
        total = total + share * torch.outer(g, g)
    return total


def scores(problem: Problem, theta: Tensor, matrix: Tensor, measures: list[Scalar]) -> Tensor:
    """score[q, i] = share_i ∇m_q(θ) A⁻¹ (∇ℓ_i + [inside] λθ), ``[q, n]``, for a curvature A."""
    inverse = torch.linalg.inv(matrix)
    table = torch.zeros(len(measures), len(problem.shares), dtype=theta.dtype)
    for i, share in enumerate(problem.shares):
        g = gradient(partial(_losses, problem, i), theta)
        g = g + problem.l2 * theta if problem.l2_inside else g
        for q, measure in enumerate(measures):
            table[q, i] = share * gradient(measure, theta) @ inverse @ g
    return table


def newton_step(problem: Problem, theta: Tensor, removed: list[int], damping: float) -> Tensor:
    """Δθ = (∇²R_rest + damping)⁻¹ g when a group leaves, ``[p]``; ∇R(θ) counts as zero.

    −∇R_rest is then what the group pulled with, g = Σ share_i (∇ℓ_i + [inside] λθ), over the share
    that is left where the rest is averaged anew.
    """
    rest = problem.without(removed)
    pull = torch.zeros_like(theta)
    for i in removed:
        g = gradient(partial(_losses, problem, i), theta)
        pull = pull + problem.shares[i] * (g + problem.l2 * theta if problem.l2_inside else g)
    left = 1 - problem.shares[removed].sum() if problem.l2_inside else 1.0
    matrix = hessian(rest, theta) + damping * torch.eye(len(theta), dtype=theta.dtype)
    step: Tensor = torch.linalg.solve(matrix, pull / left)
    return step


def l2_derivative(theta: Tensor, matrix: Tensor, block: Tensor, measures: list[Scalar]) -> Tensor:
    """dm_q/dλ of the λ on a block of parameters: −∇m_q(θ) A⁻¹ (block · θ), ``[q]``.

    Args:
        theta: a minimiser, ``[p]``.
        matrix: curvature A there, ``[p, p]``.
        block: 1 on the block and 0 elsewhere, ``[p]``.
        measures: θ -> scalar.
    """
    moved = -torch.linalg.solve(matrix, block * theta)
    return torch.stack([gradient(measure, theta) @ moved for measure in measures])


def perturbation(
    example: Callable[[Tensor, Tensor], Tensor], theta: Tensor, x: Tensor, s: Tensor
) -> Tensor:
    """∇_x (s · ∇_θ ℓ(x, θ)), of x's shape, for one example ``(θ, x) -> ℓ``."""
    point = x.detach().clone().requires_grad_(True)
    leaf = theta.detach().clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(example(leaf, point), leaf, create_graph=True)
    return torch.autograd.grad(slope @ s, point)[0]


def gradient_matrix(positions: list[tuple[Tensor, Tensor]]) -> Tensor:
    """G = Σ_s l_s r_sᵀ, ``[o, i]``."""
    left, right = positions[0]
    total = left.new_zeros(len(left), len(right))
    for left, right in positions:
        total = total + torch.outer(left, right)
    return total


def _used(positions: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Positions that add to the gradient: those of padding do not."""
    return [(left, right) for left, right in positions if torch.outer(left, right).any()]


def _empty(samples: Samples) -> Moments:
    matrix = gradient_matrix(samples[0][1])
    o, i = matrix.shape
    return matrix.new_zeros(o, o), matrix.new_zeros(i, i), 0.0


def expand(samples: Samples) -> Moments:
    """K-FAC's moments where every position that is used is an example."""
    left, right, mass = _empty(samples)
    for share, positions in samples:
        for l, r in _used(positions):
            left = left + share * torch.outer(l, l)
            right = right + share * torch.outer(r, r)
            mass += share
    return left, right, mass


def reduce(samples: Samples) -> Moments:
    """K-FAC's moments of the sum of left factors and the mean of right ones."""
    left, right, mass = _empty(samples)
    for share, positions in samples:
        used = _used(positions)
        if used:
            l = torch.stack([l for l, _ in used]).sum(0)
            r = torch.stack([r for _, r in used]).mean(0)
            left = left + share * torch.outer(l, l)
            right = right + share * torch.outer(r, r)
            mass += share
    return left, right, mass


def lookup(samples: Samples) -> Moments:
    """The same where left factors are one-hot: tokens are counted, right factors summed."""
    left, right, mass = _empty(samples)
    for share, positions in samples:
        used = _used(positions)
        if used:
            r = torch.stack([r for _, r in used]).sum(0)
            left = left + share * torch.stack([l for l, _ in used]).mean(0).diag()
            right = right + share * torch.outer(r, r)
            mass += share
    return left, right, mass


def shampoo(samples: Samples) -> Moments:
    """Σ share G Gᵀ and Σ share Gᵀ G; their mass is the trace that they share."""
    left, right, _ = _empty(samples)
    for share, positions in samples:
        g = gradient_matrix(positions)
        left, right = left + share * g @ g.T, right + share * g.T @ g
    return left, right, float(right.trace())


def kfac(moments: Moments) -> Tensor:
    """L ⊗ R / mass on rows of vec G, ``[o i, o i]``."""
    left, right, mass = moments
    return torch.kron(left, right) / mass


def ekfac(samples: Samples, left: Tensor, right: Tensor) -> Tensor:
    """(Q_L ⊗ Q_R) diag(Λ) (Q_L ⊗ Q_R)ᵀ, Λ = Σ share (Q_Lᵀ G Q_R)², ``[o i, o i]``.

    Args:
        samples: gradients of a weight ``[o, i]``.
        left: Q_L, eigenvectors of a left moment, in columns.
        right: Q_R, of a right moment.
    """
    values = left.new_zeros(len(left), len(right))
    for share, positions in samples:
        values = values + share * (left.T @ gradient_matrix(positions) @ right) ** 2
    basis = torch.kron(left.contiguous(), right.contiguous())
    return basis @ values.flatten().diag() @ basis.T


def diagonal(samples: Samples) -> Tensor:
    """The diagonal of Σ share vec G vec Gᵀ, ``[o i, o i]``."""
    total = torch.zeros_like(gradient_matrix(samples[0][1]))
    for share, positions in samples:
        total = total + share * gradient_matrix(positions) ** 2
    return total.flatten().diag()


def train(problem: Problem, theta: Tensor, steps: int = 50) -> Tensor:
    """The minimiser near θ by Newton's method with halved steps, ``[p]``."""
    theta = theta.detach().clone()
    for _ in range(steps):
        g = gradient(problem.risk, theta)
        if g.norm() < 1e-13:
            break
        step = torch.linalg.solve(hessian(problem, theta), g)
        size, known = 1.0, float(problem.risk(theta))
        # Near the minimum a fall is smaller than rounding, and must not shorten the step.
        while problem.risk(theta - size * step) > known + 1e-14 * abs(known) and size > 1e-8:
            size /= 2
        theta = theta - size * step
    return theta


def ridge(x: Tensor, y: Tensor, l2: float, weights: Tensor) -> Tensor:
    """Argmin Σ w_i (x_i·θ − y_i)² + ½ l2 ‖θ‖², solved once, ``[p]``.

    Example:
        >>> ridge(torch.eye(2), torch.tensor([1.0, 2.0]), 0.0, torch.ones(2))
        tensor([1., 2.])
    """
    normal = 2 * (x * weights[:, None]).T @ x + l2 * torch.eye(x.shape[1], dtype=x.dtype)
    solution: Tensor = torch.linalg.solve(normal, 2 * x.T @ (weights * y))
    return solution


def ridge_leave_one_out(x: Tensor, y: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Change of θ when each example leaves a ridge fit of fixed L2, through the leverage.

    θ₋ᵢ − θ = − share · H⁻¹ 2 x_i (y_i − x_i·θ) / (1 − h_i), h_i = 2 share x_iᵀ H⁻¹ x_i.

    Returns:
        Changes ``[n, p]`` and leverages ``[n]``.
    """
    share = 1 / len(x)
    theta = ridge(x, y, l2, torch.full((len(x),), share, dtype=x.dtype))
    matrix = 2 * share * x.T @ x + l2 * torch.eye(x.shape[1], dtype=x.dtype)
    turned = torch.linalg.solve(matrix, x.T).T
    leverage = 2 * share * (x * turned).sum(1)
    residual = y - x @ theta
    return -2 * share * turned * (residual / (1 - leverage))[:, None], leverage
