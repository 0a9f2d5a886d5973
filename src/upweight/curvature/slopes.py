"""Slopes at the outputs whose second moments are the curvature that a factorisation fits.

A slope v_i gives the gradient G_i = J_iᵀ v_i. With E[v_i v_iᵀ] = ∂²ℓ_i/∂z² the second moment of the
gradients G_i is the generalised Gauss-Newton matrix, and with v_i = ∂ℓ_i/∂z the empirical Fisher.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from upweight.errors import InputError
from upweight.gradients import Observation
from upweight.linalg import BlockGradients

__all__ = ["Columns", "Draws", "Labels", "Slopes", "principal", "random_bits", "uniform"]

MOST_TURNED = 32  # columns: an eigendecomposition of so many per example costs less than passes
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)


def _wrapped(value: int) -> int:
    """A 64-bit pattern as torch's signed integer."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A logical shift to the right."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def random_bits(positions: Tensor, count: int, seed: int) -> Tensor:
    """Words of 64 random bits ``[n, count]`` that depend on position, place and seed alone.

    However rows are batched or padded, a row gets the same words (SplitMix64, Steele, Lea &
    Flood, 2014, as a counter-based generator).

    Example:
        >>> words = random_bits(torch.tensor([3, 7]), 2, seed=0)
        >>> torch.equal(words[1:], random_bits(torch.tensor([7]), 2, seed=0))
        True
    """
    place = torch.arange(count, device=positions.device) * _wrapped(_MIX[0])
    row = positions[:, None] * _wrapped(_MIX[3]) + _wrapped((seed + 1) * _MIX[1])
    return _mixed(_mixed(row) + place)


def uniform(positions: Tensor, shape: torch.Size, seed: int) -> Tensor:
    """Numbers between 0 and 1, ``[n, *shape]``, that depend on position, place and seed alone.

    Example:
        >>> rows = uniform(torch.tensor([3, 7]), torch.Size([2]), seed=0)
        >>> torch.equal(rows[1:], uniform(torch.tensor([7]), torch.Size([2]), seed=0))
        True
    """
    bits = random_bits(positions, shape.numel(), seed)
    return (_shifted(bits, 11).double() / 2**53).view(len(positions), *shape)


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _wrapped(_MIX[1])
    bits = (bits ^ _shifted(bits, 27)) * _wrapped(_MIX[2])
    return bits ^ _shifted(bits, 31)


class Slopes(ABC):
    """Slopes at the outputs of a batch, and the gradients they give."""

    @abstractmethod
    def gradients(self, seen: Observation) -> Iterator[tuple[BlockGradients, float]]:
        """Gradients for each slope, with its weight in the second moment."""


@final
@dataclass(frozen=True)
class Draws(Slopes):
    """Random slopes: labels drawn from the model, or signs times the root of the curvature.

    Args:
        count: draws of each example; each costs one more backward pass. "auto": two where every
            weight sees a single position of an example, else one, as every position is a draw.
        seed: of the draws.
    """

    count: int | Literal["auto"] = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count != "auto" and self.count < 1:
            raise InputError(f"At least one draw per example is needed, got {self.count}.")

    def gradients(self, seen: Observation) -> Iterator[tuple[BlockGradients, float]]:
        """One after another, from one forward pass."""
        loss, batch = seen.objective.loss, seen.batch
        device = seen.objective.space.device

        def drawn(number: int, *, keep: bool) -> BlockGradients:
            def noise(shape: torch.Size) -> Tensor:
                return uniform(batch.positions, shape, self.seed * 1_000_003 + number).to(device)

            return seen.pulled(loss.draw(seen.outputs, batch.targets, noise), keep=keep)

        first = drawn(0, keep=self.count != 1)
        count = (2 if first.single else 1) if self.count == "auto" else self.count
        yield first, 1 / count
        for number in range(1, count):
            yield drawn(number, keep=number + 1 < count), 1 / count


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
    stacked = torch.stack([column.flatten(1) for column in columns], 2)
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
