"""DataInf: the mean of the examples' own inverses in place of the inverse of their mean."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from upweight.curvature import EmpiricalFisher
from upweight.errors import IndefiniteError, InputError
from upweight.gradients import Seen, TrainingGradients, risk_layout
from upweight.linalg import Block, BlockGradients, DenseGradients, FactoredGradients, Outer
from upweight.linalg.cost import Cost, Load
from upweight.linalg.operator import Operator, unshifted
from upweight.linalg.solution import Solution, Status, relative_residual
from upweight.linalg.solver import Inverse, Solver
from upweight.linalg.values import Gradients
from upweight.risk import Risk

__all__ = ["DataInf"]


@final
@dataclass(frozen=True)
class DataInf(Solver):
    """Σ_i share_i (λ_l + g_i g_iᵀ)⁻¹ in every layer l, g_i = ∇ℓ_i there (Kwon et al., 2024).

    Each inverse is 1/λ_l − g_i g_iᵀ / (λ_l (λ_l + ‖g_i‖²)) (Sherman & Morrison, 1950), so that
    rows take one pass over the training gradients, which stay outer products where they are. It
    stands for (F + λ)⁻¹, F = Σ_i share_i g_i g_iᵀ the empirical Fisher matrix, and is larger than
    the inverse of F's own blocks wherever examples overlap: the residual against F + λ is measured
    in a second pass, and may exceed 1.

    λ_l is the layer's L2 plus damping, as for every other method. Where both are 0 it is what the
    paper takes, a share of the layer's mean squared gradient per parameter:
    0.1 · Σ_i share_i ‖g_i‖² / d_l. A layer is a weight with its bias.

    Args:
        share: see above.

    Raises:
        InputError: the curvature is not the empirical Fisher matrix.
        IndefiniteError: a layer has neither L2, nor damping, nor a gradient.

    Example:
        >>> from torch import nn
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.eye(2), torch.tensor([[1.0], [0.0]])))
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> risk = Risk(Objective(model, "mean_squared_error"), data)  # gradients (−2, 0), (0, 0)
        >>> DataInf().init(EmpiricalFisher(risk) + 1.0) @ torch.ones(2)
        tensor([0.6000, 1.0000])
    """

    share: float = 0.1

    def init(self, operator: Operator) -> "DataInfInverse":
        """Find λ of every layer, by a pass over the gradients where it depends on them."""
        base, shift = unshifted(operator)
        if not isinstance(base, EmpiricalFisher):
            raise InputError(
                f"DataInf averages over gradients of the losses, not {type(base).__name__}. Use "
                "method='datainf', or a Method with curvature='empirical_fisher'."
            )
        return DataInfInverse(base.risk, shift, self.share)

    def cost(self, load: Load) -> Cost:
        """A pass over the gradients for the answer, and one for its residual."""
        return Cost(products=2, bytes=3 * load.bytes)


def _layers(gradients: Gradients, blocks: Sequence[Block]) -> list[Gradients]:
    """The gradients in each block, as rows of its matrices."""
    plain = [replace(block, weight=0, bias=None, transposed=False) for block in blocks]
    if isinstance(gradients, FactoredGradients) and len(blocks) == 1:
        left, right = gradients.residual[None, :, None], gradients.features[None, :, None]
        return [BlockGradients(plain, [[Outer(left, right)]], gradients.count, left)]
    if isinstance(gradients, BlockGradients):
        n, like, known = gradients.count, gradients.like, zip(plain, gradients.terms, strict=True)
        return [BlockGradients([block], [terms], n, like) for block, terms in known]
    dense = gradients.dense()
    return [DenseGradients(block.read(dense).flatten(1)) for block in blocks]


@final
class DataInfInverse(Inverse):
    """The mean of the examples' inverses.

    Args:
        risk: objective and training data.
        shift: damping.
        share: of the mean squared gradient, for layers without L2 and damping.

    Raises:
        IndefiniteError: a layer has neither L2, nor damping, nor a gradient.
    """

    def __init__(self, risk: Risk, shift: float, share: float) -> None:
        space, l2 = risk.objective.space, risk.objective.l2
        self.size, self.dtype, self.device = space.size, space.dtype, space.device
        self.training, self.blocks = TrainingGradients(risk), risk_layout(risk).blocks
        self.dampings = [float(l2[block.weight]) + shift for block in self.blocks]
        self.notes = ("mean of inverses for the inverse of a mean: residuals may exceed 1",)
        bare = [place for place, damping in enumerate(self.dampings) if not damping > 0]
        if bare:
            means = self._mean_squares()
            for place in bare:
                self.dampings[place] = share * means[place] / self.blocks[place].size
            found = [self.dampings[place] for place in bare]
            if not min(found) > 0:
                raise IndefiniteError(
                    f"The layer of {self.blocks[bare[found.index(min(found))]].name!r} has no "
                    "gradient, L2 or damping, and so no λ. Add damping, or leave it out."
                )
            self.notes += (
                f"λ of {len(bare)} of {len(self.blocks)} layers is {share:g} of the mean squared "
                f"gradient per parameter ({min(found):.1e} to {max(found):.1e})",
            )

    def _mean_squares(self) -> list[float]:
        """Σ_i share_i ‖g_i‖² of every layer."""

        def work(seen: Seen) -> Tensor:
            parts = _layers(seen.gradients, self.blocks)
            return torch.stack([part.squared_norms() @ seen.share for part in parts])

        found: list[float] = torch.stack(list(self.training.each(work, "layers"))).sum(0).tolist()
        return found

    def _answered(self, rhs: Tensor) -> Tensor:
        """Rows (b − Σ_i share_i (b·g_i) g_i / (λ + ‖g_i‖²)) / λ, layer by layer."""
        asked = [block.read(rhs).flatten(1) for block in self.blocks]

        def work(seen: Seen) -> list[Tensor]:
            taken = []
            for place, part in enumerate(_layers(seen.gradients, self.blocks)):
                scale = seen.share / (self.dampings[place] + part.squared_norms())
                taken.append(part.combine(part.dot(asked[place]) * scale))
            return taken

        left = [rows.clone() for rows in asked]
        for taken in self.training.each(work, "DataInf"):
            for rows, part in zip(left, taken, strict=True):
                rows -= part
        value = torch.empty_like(rhs)
        for block, rows, damping in zip(self.blocks, left, self.dampings, strict=True):
            block.write(value, rows.view(-1, *block.shape) / damping)
        return value

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """One pass for the answer, and one for how it compares with the inverse of the mean."""
        rhs = rows.to(self.dtype)
        value = self._answered(rhs)
        product = torch.empty_like(rhs)
        for block, damping in zip(self.blocks, self.dampings, strict=True):
            block.write(product, block.read(value) * damping)

        def work(seen: Seen) -> Tensor:
            return seen.gradients.combine(seen.gradients.dot(value) * seen.share)

        product += sum(self.training.each(work, "residuals"))
        residual = relative_residual(rhs, product)
        return Solution(value, residual, (Status.CONVERGED,) * len(rhs))

    def quadratic(self, rows: Tensor) -> Tensor:
        """B A⁻¹ b of every row, by a pass over the gradients."""
        return (rows * self._answered(rows.to(self.dtype))).sum(1)
