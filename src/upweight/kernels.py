"""Kernel machines as linear models on exact features, so that they are models like any other."""

from typing import final

import torch
from torch import Tensor, nn

from upweight.errors import InputError

__all__ = ["RBFFeatures"]

JITTER = 1e-10


@final
class RBFFeatures(nn.Module):
    """Features whose inner products are an RBF kernel: φ(x) = L⁻¹ k(X, x), with K = L Lᵀ.

    φ(x)·φ(x′) = k(x, x′) = exp(−γ ‖x − x′‖²) whenever one of the two is a landmark. With the
    training inputs as landmarks, a linear model on φ with ½λ‖w‖² is therefore the kernel machine
    with ½λ‖f‖² in the kernel's space, by the representer theorem (Schölkopf & Smola, 2002), and
    every method, solver and proof applies to it. There is nothing to train here.

    Args:
        landmarks: ``[n, ...]``, flattened; the training inputs for the exact machine, some of them
            for a Nyström approximation.
        gamma: γ, in one over the squared unit of the inputs.

    Raises:
        InputError: γ is not positive, or the kernel matrix is not positive definite (inputs that
            repeat each other).

    Example:
        >>> x = torch.randn(5, 2, dtype=torch.float64)
        >>> features = RBFFeatures(x, gamma=0.5)
        >>> machine = nn.Sequential(features, nn.Linear(5, 1, bias=False).double())
        >>> torch.allclose(features(x) @ features(x).T, torch.exp(-0.5 * torch.cdist(x, x) ** 2))
        True
    """

    landmarks: Tensor
    factor: Tensor

    def __init__(self, landmarks: Tensor, gamma: float) -> None:
        super().__init__()
        if not 0 < gamma < float("inf"):
            raise InputError(f"gamma must be a positive number, got {gamma}.")
        self.gamma = float(gamma)
        rows = landmarks.detach().flatten(1)
        self.register_buffer("landmarks", rows)
        matrix = self._kernel(rows)
        matrix.diagonal().add_(JITTER)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed) or not bool(torch.isfinite(factor).all()):
            raise InputError(
                f"The kernel matrix of {len(rows)} landmarks is not positive definite in "
                f"{rows.dtype}: some repeat each other, or gamma={gamma:g} is too small for their "
                "distances. Use float64, drop repeated landmarks, or raise gamma."
            )
        self.register_buffer("factor", factor)

    def _kernel(self, rows: Tensor) -> Tensor:
        """k(landmark, row), ``[landmarks, n]``."""
        # Distances are differences of squares, which cancel far from the origin.
        centre = self.landmarks.mean(0)
        apart = torch.cdist(self.landmarks - centre, rows - centre)
        return torch.exp(-self.gamma * apart.square())

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"landmarks={len(self.landmarks)}, gamma={self.gamma:g}"

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[n, landmarks]`` of inputs ``[n, ...]``."""
        kernel = self._kernel(x.flatten(1))
        rows: Tensor = torch.linalg.solve_triangular(self.factor, kernel, upper=False).T
        return rows
