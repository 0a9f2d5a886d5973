"""The second moment of projected gradients."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.bars import track
from upweight.budget import in_steps
from upweight.checks import probe
from upweight.errors import LossError
from upweight.gradients import batch_rows, per_example
from upweight.linalg import Dense
from upweight.linalg.gram import add_gram, mirror
from upweight.objective import Measure
from upweight.projections.operator import Projected
from upweight.projections.projection import Projection
from upweight.risk import Risk

__all__ = ["ProjectedFit", "ProjectedKernel"]

PROBED = 4


class ProjectedFit(ABC):
    """Fits a curvature in the dimensions of a projection, in passes over all of the data."""

    @abstractmethod
    def __call__(self, risk: Risk) -> Projected:
        """Fit over the training data."""

    def fitted(self, risk: Risk) -> int:
        """How many of the examples it is fitted on."""
        return len(risk.data)

    def batch(self, risk: Risk) -> int:
        """How many of them it looks at together."""
        return batch_rows(risk)

    def kept(self, risk: Risk) -> int:
        """Bytes of gradients that it keeps for a second pass."""
        del risk
        return 0

    def trial(self, risk: Risk, rows: int) -> Projected:
        """A fit to the first examples, made positive as all of them may make it."""
        chosen = torch.arange(min(rows, len(risk.data)), device="cpu")
        found = self(Risk(risk.objective, risk.data.take(chosen)))
        parts = [part + max(part.trace(), 0.0) / part.size for part in found.parts]
        return Projected(found.projection, parts, found.compression)


@final
@dataclass(frozen=True)
class ProjectedKernel(ProjectedFit):
    """K = Σ_i share_i (P m_i)(P m_i)ᵀ + Λ of gradients m_i of a measure, in one pass over the data.

    Parts that the projection keeps apart have a matrix each, without the products between them.

    Of margins, f = log(p/(1 − p)), it is TRAK's (Park et al., 2023): with φ = P ∇f, and
    ∇ℓ = −(1 − p) ∇f for a cross-entropy, the score of a query's margin is

        share_i ∇f_q Pᵀ K⁻¹ P ∇ℓ_i = −(1 − p_i) φ_q (ΦᵀΦ)⁻¹ φ_i,

    minus TRAK's, which says what an example adds and not what its removal does. The Gauss-Newton
    matrix has p(1 − p) φ φᵀ in place of φ φᵀ: left out as published, so that values are too small.

    Args:
        projection: makes P of a Risk.
        measure: of the training examples, whose gradients are taken; their losses by default, for
            which K is the projected empirical Fisher.

    Raises:
        LossError: the loss has no such measure.

    Example:
        >>> from torch import nn
        >>> from upweight import Data, Objective
        >>> from upweight.projections import RademacherEntries
        >>> data = Data.of((torch.eye(8), torch.arange(8) % 2))
        >>> risk = Risk(Objective(nn.Linear(8, 2), "cross_entropy"), data)
        >>> ProjectedKernel(RademacherEntries(5), "margin")(risk).to_dense().shape
        torch.Size([5, 5])
    """

    projection: Callable[[Risk], Projection]
    measure: Measure = "loss"

    def __call__(self, risk: Risk) -> Projected:
        """Fit over the training data."""
        self._check(risk)
        projection, l2 = self.projection(risk), risk.objective.l2
        wide = l2.to(torch.promote_types(l2.dtype, torch.float32))  # sums of many batches
        totals = [wide.new_zeros(width, width) for width in projection.widths]

        def work(start: int, stop: int) -> tuple[Tensor, Tensor]:
            batch, share = risk.rows(start, stop)
            values = projection.project(per_example(risk.objective, batch, self.measure))
            # An example without weight may have no measure.
            return torch.where(share[:, None] > 0, values, 0), share

        count, size = len(risk.data), batch_rows(risk)
        for values, share in track(in_steps(count, size, work), "kernel", -(-count // size)):
            for total, part in zip(totals, values.split(projection.widths, 1), strict=True):
                add_gram(total, part, share)
        ridges = projection.ridge(wide).split(projection.widths)
        for total, ridge in zip(totals, ridges, strict=True):
            total.diagonal().add_(ridge)
        parts = [Dense(mirror(total)) for total in totals]
        return Projected(projection, parts, projection.compression())

    def _check(self, risk: Risk) -> None:
        """Raise LossError where the training examples have no such measure."""
        counted = risk.weights.nonzero()[:PROBED, 0]
        try:
            probe(risk.objective, risk.data.take(counted), self.measure, role="training data")
        except LossError as error:
            raise LossError(
                "The curvature of this method is made of gradients of the training examples' "
                f"{self.measure!r}. {error} Use method='logra', which takes those of their losses, "
                "or ProjectedKernel(..., measure=...) with a callable (outputs, targets) -> [n]."
            ) from error
