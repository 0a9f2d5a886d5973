"""Slopes at the outputs whose second moments are the curvature that a factorisation fits.

A slope v_i gives the gradient G_i = J_iᵀ v_i. With E[v_i v_iᵀ] = ∂²ℓ_i/∂z² the second moment of the
gradients G_i is the generalised Gauss-Newton matrix, and with v_i = ∂ℓ_i/∂z the empirical Fisher.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.errors import InputError
from upweight.gradients import Observation
from upweight.linalg import BlockGradients
from upweight.noise import random_signs

__all__ = ["Columns", "Draws", "Labels", "Slopes", "principal"]

MOST_TURNED = 32  # columns: an eigendecomposition of so many per example costs less than passes


class Slopes(ABC):
    """Slopes at the outputs of a batch, and the gradients they give."""

    @abstractmethod
    def gradients(self, seen: Observation) -> Iterator[tuple[BlockGradients, float]]:
        """Gradients for each slope, with its weight in the second moment."""


@final
@dataclass(frozen=True)
class Draws(Slopes):
    """Random signs times the root of the curvature: Σ_k ε_k b_k with ∂²ℓ/∂z² = Σ_k b_k b_kᵀ.

    The expectation of v vᵀ is that of the gradients for labels drawn from the model, the true
    Fisher matrix, at less variance: a model that is sure of 99 % of its labels shows no slope in 99
    of 100 drawn labels and one of length 1 in the other, and here nearly the same in each.

    Args:
        count: draws of each example; each costs one more backward pass.
        seed: of the draws.
    """

    count: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"At least one draw per example is needed, got {self.count}.")

    def gradients(self, seen: Observation) -> Iterator[tuple[BlockGradients, float]]:
        """One after another, from one forward pass."""
        loss, batch = seen.objective.loss, seen.batch
        device = seen.objective.space.device

        def drawn(number: int, *, keep: bool) -> BlockGradients:
            def signs(shape: torch.Size) -> Tensor:
                seed = self.seed * 1_000_003 + number
                return random_signs(batch.positions, shape, seed).to(device)

            return seen.pulled(loss.draw(seen.outputs, batch.targets, signs), keep=keep)

        for number in range(self.count):
            yield drawn(number, keep=number + 1 < self.count), 1 / self.count


@final
@dataclass(frozen=True)
class Columns(Slopes):
    """All columns of the root of ∂²ℓ/∂z²: the exact expectation, one backward pass per output."""

    def gradients(self, seen: Observation) -> Iterator[tuple[BlockGradients, float]]:
        """One after another, from one forward pass."""
        columns = principal(seen.objective.loss.columns(seen.outputs, seen.batch.targets))
        for number, slope in enumerate(columns):
            yield seen.pulled(slope, keep=number + 1 < len(columns)), 1.0


def principal(columns: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonal columns ``[n, ...]`` with the same Σ_k b_k b_kᵀ, an example's longest first.

    Those that are 0 up to rounding in all examples are left out: of c classes, c − 1 are left, and
    of examples that waver between two classes, one.

    Example:
        >>> columns = [torch.tensor([[0.5, -0.5]]), torch.tensor([[-0.5, 0.5]])]
        >>> [column.abs().round(decimals=4) for column in principal(columns)]
        [tensor([[0.7071, 0.7071]])]
    """
    if len(columns) > MOST_TURNED:
        return list(columns)
    stacked = torch.stack([column.reshape(len(column), -1) for column in columns], 2)
    wide = stacked.double()
    squares, turns = torch.linalg.eigh(wide.mT @ wide)
    least = torch.finfo(stacked.dtype).eps * squares.sum(1, keepdim=True)
    kept = max(1, int((squares > least).any(0).sum()))
    turned = (wide @ turns[..., -kept:]).flip(2).to(stacked.dtype)
    return [column.view_as(columns[0]) for column in turned.unbind(2)]


@final
@dataclass(frozen=True)
class Labels(Slopes):
    """The slopes of the loss with the given labels: the empirical Fisher."""

    def gradients(self, seen: Observation) -> Iterator[tuple[BlockGradients, float]]:
        """Once."""
        yield seen.gradients(), 1.0
