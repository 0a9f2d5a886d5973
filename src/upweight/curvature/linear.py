"""The curvature of linear, logistic and softmax models in closed form, without autograd."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from upweight.bars import track
from upweight.budget import budget
from upweight.gradients import LinearForm
from upweight.linalg import MeanOperator
from upweight.linalg.gram import gram
from upweight.linalg.values import join_blocks, split_rows
from upweight.losses import OutputLoss
from upweight.risk import Risk

__all__ = ["LinearCurvature"]

ROWS = 8192
BLOCK_BYTES = 128 * 2**20


@final
@dataclass(frozen=True)
class _Part:
    """Rows of some examples, as many of each."""

    features: Tensor
    outputs: Tensor
    targets: Tensor
    share: Tensor
    each: int

    def example(self, place: int) -> tuple[Tensor, ...]:
        """Features, outputs, targets and shares of one."""
        cut = slice(place * self.each, (place + 1) * self.each)
        return self.features[cut], self.outputs[cut], self.targets[cut], self.share[cut]


@final
class LinearCurvature(MeanOperator):
    """Σ_i share_i (∂²ℓ_i/∂z²) ⊗ x_i x_iᵀ + Λ, the Hessian of a model that is linear in θ.

    It is also the GGN, and for likelihood losses the true Fisher. Features are kept (``N·d``
    numbers, views where the data is in memory); per-example gradients are never formed. Where an
    example has positions, i runs over all of them.

    Args:
        risk: the objective and its data.
        form: the linear form of the objective.
    """

    def __init__(self, risk: Risk, form: LinearForm) -> None:
        space = risk.objective.space
        self.risk, self.form, self.count = risk, form, len(risk.data)
        self.size, self.dtype, self.device = space.size, space.dtype, space.device
        assert isinstance(risk.objective.loss, OutputLoss)
        self._loss = risk.objective.loss
        self._parts, self._starts = list[_Part](), [0]
        for batch, share in risk.batches(form.together(ROWS // form.shape.numel())):
            x, outputs = form.seen(batch)
            rows = self._loss.rows(outputs, batch.targets)
            assert rows is not None
            z, targets, factor = rows
            each = len(z) // len(batch)
            share = share.repeat_interleave(each) * factor
            self._parts.append(_Part(x.reshape(len(z), -1), z, targets, share, each))
            self._starts.append(self._starts[-1] + len(batch))
        self.width = self._parts[0].features.shape[1]

    @staticmethod
    def fits(risk: Risk, form: LinearForm) -> bool:
        """Whether what is kept of positions stays within half of the memory budget."""
        space = risk.objective.space
        row = (space.size / form.outputs + 2 * form.outputs) * space.dtype.itemsize
        return not form.shape or len(risk.data) * form.shape.numel() * row < budget() / 2

    @property
    def l2(self) -> Tensor:
        """The objective's."""
        return self.risk.objective.l2

    def apply(self, rows: Tensor) -> Tensor:
        """Two matrix products per piece of the data, for all rows."""
        rows = rows.to(self.dtype)
        blocks = split_rows(rows, self.width, bias=self.form.bias)
        m, c, d = blocks.shape
        flat, total = blocks.flatten(0, 1), torch.zeros_like(blocks).flatten(0, 1)
        size = max(64, BLOCK_BYTES // (m * c * rows.element_size()))
        for part in self._parts:
            for at in range(0, len(part.features), size):
                cut = slice(at, at + size)
                x = part.features[cut]
                u = (x @ flat.T).view(len(x), m, c)
                bent = self._loss.curve(part.outputs[cut], part.targets[cut], u)
                bent = bent.mul_(part.share[cut, None, None])
                total.addmm_(bent.view(len(x), m * c).T, x)
        return join_blocks(total.view(m, c, d), bias=self.form.bias) + rows * self.risk.objective.l2

    def apply_sampled(self, rows: Tensor, positions: Tensor) -> Tensor:
        """All groups at once: gather, project, bend, project back."""
        blocks = split_rows(rows, self.width, bias=self.form.bias)
        x, z, targets, share = self._gather(positions)
        u = torch.einsum("gbd,gqcd->gbqc", x, blocks)
        bent = self._loss.curve(z.flatten(0, 1), targets.flatten(0, 1), u.flatten(0, 1))
        bent = bent.view_as(u) * (share * (self.count / positions.shape[1]))[:, :, None, None]
        total = torch.einsum("gbqc,gbd->gqcd", bent, x)
        return join_blocks(total, bias=self.form.bias) + rows * self.risk.objective.l2

    def _gather(self, positions: Tensor) -> Iterator[Tensor]:
        """Features, outputs, targets and shares ``[g, b·s, ...]`` of given examples.

        Those with fewer positions than the longest are filled up with rows of no share.
        """
        found = []
        for i in positions.flatten().tolist():
            part = bisect_right(self._starts, i) - 1
            found.append(self._parts[part].example(i - self._starts[part]))
        filled = (pad_sequence(list(some), batch_first=True) for some in zip(*found, strict=True))
        return (some.unflatten(0, positions.shape).flatten(1, 2) for some in filled)

    def restrict(self, positions: Tensor) -> "LinearCurvature":
        """The same curvature over some of the examples."""
        risk = Risk(self.risk.objective, self.risk.data.take(positions))
        return LinearCurvature(risk, self.form)

    def _bends(self, part: _Part, rows: Tensor | slice = slice(None)) -> Tensor:
        """share_i ∂²ℓ_i/∂z² of rows of a part, ``[n, c, c]``."""
        outputs = part.outputs[rows]
        n, c = outputs.shape
        eye = torch.eye(c, dtype=self.dtype, device=self.device).expand(n, c, c)
        return self._loss.curve(outputs, part.targets[rows], eye) * part.share[rows, None, None]

    def sampled(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Features ``[size, d]`` and A_i ``[size, c, c]`` whose mean of A_i ⊗ x_i x_iᵀ is A − Λ.

        Rows are drawn in proportion to tr A_i plus a tenth of its mean, and weighed back.
        """
        traces = [self._bends(part).diagonal(dim1=1, dim2=2).sum(1) for part in self._parts]
        trace = torch.cat(traces).double()
        chance = trace.clamp_min(0) + 0.1 * trace.mean().clamp_min(1e-30)
        chance = (chance / chance.sum()).cpu()
        draws = torch.multinomial(
            chance, size, replacement=True, generator=torch.Generator().manual_seed(seed)
        )
        draws, features, kept, start = draws.sort().values, [], [], 0
        for part in self._parts:
            end = start + len(part.features)
            inside = draws[(draws >= start) & (draws < end)]
            weight = (1 / chance[inside]).to(self.device, self.dtype)
            here = (inside - start).to(self.device)
            features.append(part.features[here])
            kept.append(self._bends(part, here) * weight[:, None, None])
            start = end
        return torch.cat(features), torch.cat(kept)

    def to_dense(self) -> Tensor:
        """The matrix, one weighted Gram matrix of the features per pair of outputs."""
        c, d = self._parts[0].outputs.shape[1], self.width
        blocks = torch.zeros(c, d, c, d, dtype=torch.float64, device=self.device)
        pairs = [(k, l) for k in range(c) for l in range(k, c)]
        for part in track(self._parts, "dense curvature"):
            bend = self._bends(part)
            # Where every A_i annihilates 1, as softmax's do, the diagonal follows from the rest.
            closed = c > 1 and bool(bend.sum(2).abs().max() <= 1e-5 * bend.abs().max())
            for k, l in pairs:
                if (closed and k == l) or not bool(bend[:, k, l].any()):
                    continue
                block = gram(part.features, bend[:, k, l])
                blocks[k, :, l, :] += block
                if k != l:
                    blocks[l, :, k, :] += block
                if closed:
                    blocks[k, :, k, :] -= block
                    blocks[l, :, l, :] -= block
        dense = self._arranged(blocks)
        dense.diagonal().add_(self.risk.objective.l2)
        return dense

    def _arranged(self, blocks: Tensor) -> Tensor:
        """Blocks ``[c, d, c, d]`` as a matrix in the order of the parameter row."""
        c, d = blocks.shape[:2]
        if not self.form.bias:
            return blocks.reshape(c * d, c * d)
        order = join_blocks(torch.arange(c * d, device=self.device).view(c, d), bias=True)
        return blocks.reshape(c * d, c * d)[order][:, order]
