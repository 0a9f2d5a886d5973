"""A preconditioner for conjugate gradients on linear models, made from a sample of the data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from upweight.curvature.linear import LinearCurvature
from upweight.linalg import Operator, unshifted
from upweight.linalg.values import join_blocks, split_rows

__all__ = ["FirstOf", "Sketch"]

Maker = Callable[[Operator, int], Operator | None]


@final
@dataclass(frozen=True)
class FirstOf:
    """The first preconditioner of several that there is for an operator.

    Args:
        makers: functions of (A, number of rows to solve).

    Example:
        >>> from upweight.linalg import Dense
        >>> FirstOf((Sketch(),))(Dense(torch.eye(2)), 10) is None
        True
    """

    makers: tuple[Maker, ...]

    def __call__(self, operator: Operator, rows: int) -> Operator | None:
        """The first that one of them makes, or None."""
        found = (maker(operator, rows) for maker in self.makers)
        return next((one for one in found if one is not None), None)


@final
@dataclass(frozen=True)
class Sketch:
    """An approximate inverse of Σ share_i A_i ⊗ x_i x_iᵀ + Λ + λ.

    Outputs are rotated to the eigenvectors of the mean A, features to those of their second moment
    weighed by tr A_i. Among the leading features the matrix is that of a random sample of examples,
    drawn in proportion to tr A_i, and inverted exactly; on the rest it is taken to be the Kronecker
    product of the two means. Conjugate gradients correct it, so it decides the number of steps and
    not the answer.

    Args:
        size: examples drawn.
        features: leading features treated exactly.
        rows: right-hand sides below which plain conjugate gradients are cheaper.
        seed: of the draw.
    """

    size: int = 16_000
    features: int = 150
    rows: int = 8
    seed: int = 0

    def __call__(self, operator: Operator, rows: int) -> Operator | None:
        """The preconditioner of A or A + λ for a number of rows, or None where it would not pay."""
        base, shift = unshifted(operator)
        if not isinstance(base, LinearCurvature) or rows < self.rows:
            return None
        shift += float(base.risk.objective.l2.mean())
        return None if shift <= 0 else _sketched(base, self, shift)


@final
class _Rotated(Operator):
    """Rotate outputs and features, invert a leading block, divide the rest, rotate back."""

    def __init__(
        self,
        outputs: Tensor,
        features: Tensor,
        spread: Tensor,
        *,
        block: tuple[int, Tensor],
        bias: bool,
    ) -> None:
        self.size = len(outputs) * len(features)
        self.dtype, self.device = outputs.dtype, outputs.device
        self.outputs, self.features, self.spread = outputs, features, spread
        self.kept, self.factor = block
        self.bias = bias

    def apply(self, rows: Tensor) -> Tensor:
        """The approximate inverse times rows."""
        blocks = split_rows(rows, len(self.features), bias=self.bias)
        turned = self.outputs.T @ blocks @ self.features
        solved = turned / self.spread
        # The leading outputs and features come last, as eigenvalues ascend.
        c, d = self.kept, len(self.factor) // self.kept
        lead = turned[:, -c:, -d:].reshape(len(rows), -1)
        exact = torch.cholesky_solve(lead.T, self.factor).T
        solved[:, -c:, -d:] = exact.reshape(-1, c, d)
        return join_blocks(self.outputs @ solved @ self.features.T, bias=self.bias)


def _sketched(base: LinearCurvature, sketch: Sketch, shift: float) -> Operator | None:
    """The preconditioner, or None where rounding leaves nothing to invert."""
    x, bend = base.sampled(sketch.size, sketch.seed)
    mean = bend.mean(0)
    values, outputs = torch.linalg.eigh(mean)
    kept = max(1, int((values > 1e-5 * values[-1]).sum()))
    trace = bend.diagonal(dim1=1, dim2=2).sum(1)
    if not bool(trace.mean() > 0):
        return None
    moment, features = torch.linalg.eigh((x * (trace / trace.mean())[:, None]).T @ x / len(x))
    lead = min(sketch.features, x.shape[1])
    z = x @ features[:, -lead:]
    turned = outputs[:, -kept:].T @ bend @ outputs[:, -kept:]
    block = z.new_zeros(kept, lead, kept, lead)
    for k in range(kept):
        for l in range(k, kept):
            gram = (z * turned[:, k, l, None]).T @ z / len(z)
            block[k, :, l, :], block[l, :, k, :] = gram, gram.T
    dense = block.view(kept * lead, kept * lead)
    dense.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(dense)
    if int(info):
        return None
    spread = values.clamp_min(0)[:, None] * moment.clamp_min(0)[None] + shift
    return _Rotated(outputs, features, spread, block=(kept, factor), bias=base.form.bias)
