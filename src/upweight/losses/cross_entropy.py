"""Softmax cross-entropy per example, for rows, sequences and images."""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.errors import LossError
from upweight.losses.base import OutputLoss, Signs

__all__ = ["CrossEntropy"]

FEW = 16  # float32 numbers in the widest vector register


def _softmax(outputs: Tensor) -> Tensor:
    """Softmax of rows ``[n, c]``.

    Torch's takes the numbers of a row one by one where they do not fill a register; these four
    passes over all rows take a fifth of its time for ten classes. Half precision rounds at each.
    """
    if outputs.shape[1] >= FEW or outputs.device.type != "cpu" or outputs.element_size() < 4:
        return outputs.softmax(1)
    powers = (outputs - outputs.amax(1, keepdim=True)).exp()
    return powers / powers.sum(1, keepdim=True)


def _require_normalised(outputs: Tensor) -> None:
    total = outputs.logsumexp(-1).abs().max()
    if not bool(total < (1e-3 if outputs.dtype.itemsize >= 4 else 5e-2)):
        raise LossError(
            "nll_loss expects log-probabilities, and the probabilities of a row sum to "
            f"{float(total.exp()):.3g}. Return log_softmax(...), or use 'cross_entropy'."
        )


@final
class CrossEntropy(OutputLoss):
    """Softmax cross-entropy, ℓ = −Σ_k y_k log softmax(z)_k, in nats.

    Outputs ``[n, c]`` with integer targets ``[n]`` or probabilities ``[n, c]``. Sequences and
    images: outputs ``[n, c, *s]`` (torch's layout) or ``[n, *s, c]`` (language models) with targets
    ``[n, *s]``; the loss is then the mean over the positions that count, and the example weighs as
    many as it has, so that R is torch's mean over all positions.

    Args:
        weight: class weights ``[c]``; they weigh examples in the mean, as in torch.
        label_smoothing: ε of Szegedy et al. (2016).
        ignore_index: target that does not count.
        normalised: whether outputs must be log-probabilities, as those of ``nn.NLLLoss`` are: they
            are their own log softmax, and what holds of logits holds of them.

    Raises:
        LossError: class weights together with label smoothing, or labels outside 0..c−1.

    Example:
        >>> CrossEntropy()(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        normalised: bool = False,
    ) -> None:
        if weight is not None and label_smoothing:
            raise LossError(
                "Class weights together with label smoothing weigh the smoothed part of each loss "
                "by other classes than its own. Use one of the two, or a callable returning [n]."
            )
        self.weight = weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.normalised = normalised
        self.name, self.unit = "cross_entropy", "nats"

    def _class_last(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.dim() == 2 or outputs.shape == targets.shape:
            return outputs
        last = outputs.shape[:-1] == targets.shape
        second = targets.shape == outputs.shape[:1] + outputs.shape[2:]
        if last and second:
            raise LossError(
                f"Outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} leave open "
                "which axis holds the classes. Pass a callable that flattens them."
            )
        return outputs if last else outputs.movedim(1, -1)

    def _positions(self, targets: Tensor) -> Tensor:
        counted = (targets != self.ignore_index).to(torch.get_default_dtype())
        if self.weight is not None:
            known = self.weight.to(targets.device)
            counted = counted * known[targets.clamp(0, len(known) - 1)]
        return counted

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Losses ``[n]`` in nats; 0 for an example whose positions are all ignored."""
        logits = self._class_last(outputs, targets)
        log_p = F.log_softmax(logits, dim=-1)
        if targets.is_floating_point():
            return -(self._smooth(targets) * log_p).flatten(1).sum(1)
        counted = targets != self.ignore_index
        nll = -log_p.gather(-1, torch.where(counted, targets, 0)[..., None])[..., 0]
        if self.label_smoothing:
            nll = (1 - self.label_smoothing) * nll - self.label_smoothing * log_p.mean(-1)
        if targets.dim() == 1:
            return nll * counted
        weight = self._positions(targets).to(nll.dtype)
        total = weight.flatten(1).sum(1)
        return (nll * weight).flatten(1).sum(1) / torch.where(total > 0, total, 1.0)

    def _smooth(self, probabilities: Tensor) -> Tensor:
        epsilon = self.label_smoothing
        return (1 - epsilon) * probabilities + epsilon / probabilities.shape[-1]

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise LossError for outputs of another shape or a label outside 0..c−1."""
        if not isinstance(outputs, Tensor) or outputs.dim() < 2:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise LossError(f"cross_entropy expects outputs [n, classes], got {shape}.")
        if targets.is_floating_point():
            if targets.shape != outputs.shape or self.weight is not None or outputs.dim() != 2:
                raise LossError(
                    f"Targets of dtype {targets.dtype} are read as probabilities [n, classes] "
                    f"without class weights, but have shape {tuple(targets.shape)} for outputs "
                    f"{tuple(outputs.shape)}. Use integer labels, or match the shapes."
                )
            off = (targets.sum(1) - 1).abs().max()
            if not bool(off <= (1e-3 if targets.dtype.itemsize >= 4 else 2e-2)):
                raise LossError(
                    f"Targets of dtype {targets.dtype} are read as probabilities, and a row of "
                    f"them is off a sum of 1 by {float(off):.2g}. Normalise them, or pass a "
                    "callable returning [n]."
                )
            return
        inner = outputs.shape[:1] + outputs.shape[2:]
        if targets.shape not in (outputs.shape[:-1], inner):
            raise LossError(
                f"Targets {tuple(targets.shape)} do not fit outputs {tuple(outputs.shape)}: "
                "expected one label per row (and position)."
            )
        last = self._class_last(outputs, targets)
        if self.normalised:
            _require_normalised(last)
        classes = last.shape[-1]
        wrong = (targets != self.ignore_index) & ((targets < 0) | (targets >= classes))
        if bool(wrong.any()):
            raise LossError(
                f"The label {int(targets[wrong][0])} is unknown: the model has {classes} outputs, "
                f"so labels are 0 to {classes - 1} (or ignore_index={self.ignore_index})."
            )
        if self.weight is not None and len(self.weight) != classes:
            raise LossError(f"{len(self.weight)} class weights for {classes} classes.")

    def weights(self, targets: Tensor) -> Tensor | None:
        """Σ over counted positions of the class weight, ``[n]``; None when all are 1."""
        if targets.is_floating_point():
            return None
        plain = self.weight is None and targets.dim() == 1
        if plain and not bool((targets == self.ignore_index).any()):
            return None
        positions = self._positions(targets)
        return positions.flatten(1).sum(1) if positions.dim() > 1 else positions

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """softmax(z) − y (smoothed), ``[n, c]``; 0 where ignored."""
        p = _softmax(outputs)
        if targets.is_floating_point():
            return p - self._smooth(targets)
        counted = targets != self.ignore_index
        hot = F.one_hot(torch.where(counted, targets, 0), outputs.shape[1]).to(p.dtype)
        return (p - self._smooth(hot)) * counted[:, None]

    def curve(self, outputs: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """(diag p − p pᵀ) rows, ``[n, m, c]``; 0 where ignored."""
        p = _softmax(outputs)
        if not targets.is_floating_point() and bool((targets == self.ignore_index).any()):
            rows = rows * (targets != self.ignore_index)[:, None, None]
        return (rows - rows @ p[:, :, None]).mul_(p[:, None, :])

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """One for each position, if the classes are the last axis."""
        if outputs.dim() == 2 or outputs.shape[:-1] != targets.shape:
            return super().rows(outputs, targets)
        share = self._shares(targets, outputs)
        return outputs.flatten(0, -2), targets.flatten(), share.flatten()

    def _shares(self, targets: Tensor, like: Tensor) -> Tensor:
        """What every position counts in its example's loss, ``[n, *s]``."""
        if targets.is_floating_point():
            return like.new_ones(len(like))
        if targets.dim() == 1:
            return (targets != self.ignore_index).to(like.dtype)
        weight = self._positions(targets).to(like.dtype)
        total = weight.flatten(1).sum(1)
        return weight / torch.where(total > 0, total, 1.0).view(-1, *[1] * (weight.dim() - 1))

    def draw(self, outputs: Tensor, targets: Tensor, signs: Signs) -> Tensor:
        """√p ε − p Σ_k √p_k ε_k at every position, times the root of its share."""
        wide = torch.promote_types(outputs.dtype, torch.float32)
        p = torch.softmax(self._class_last(outputs.detach(), targets).to(wide), -1)
        slope = p.sqrt().mul_(signs(p.shape[1:]))
        slope.addcmul_(p, slope.sum(-1, keepdim=True), value=-1)
        slope = slope.mul_(self._shares(targets, p).sqrt()[..., None]).to(outputs.dtype)
        return slope if slope.shape == outputs.shape else slope.movedim(-1, 1)

    def columns(self, outputs: Tensor, targets: Tensor) -> list[Tensor]:
        """√p_k (e_k − p) of every class, for outputs ``[n, c]``."""
        if outputs.dim() != 2:
            return super().columns(outputs, targets)
        p = _softmax(outputs.detach())
        share, eye = self._shares(targets, p), torch.eye(p.shape[1]).to(p)
        return [(share * p[:, k]).sqrt()[:, None] * (eye[k] - p) for k in range(p.shape[1])]

    def fisher(self, outputs: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """(diag p − p pᵀ) rows; positions are independent, so a mean over s gives 1/s²."""
        if self.label_smoothing or targets.is_floating_point():
            return super().fisher(outputs, targets, rows)
        p = torch.softmax(self._class_last(outputs, targets), -1)
        u = self._class_last(rows, targets)
        share = self._shares(targets, p)
        product = p * (u - (p * u).sum(-1, keepdim=True)) * (share**2)[..., None]
        return product if product.shape == outputs.shape else product.movedim(-1, 1)

    def _known(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``[n, *s, c]`` and labels ``[n, *s, 1]``, 0 where ignored."""
        if targets.is_floating_point():
            raise LossError("Logit and margin are of a label, and the targets are probabilities.")
        label = torch.where(targets != self.ignore_index, targets, 0)[..., None]
        return self._class_last(outputs, targets), label

    def _mean(self, values: Tensor, targets: Tensor) -> Tensor:
        """The mean ``[n]`` of values ``[n, *s]`` over positions that count; NaN where none does."""
        values = values.masked_fill(targets == self.ignore_index, torch.nan)
        return values.nanmean(tuple(range(1, values.dim()))) if values.dim() > 1 else values

    def logit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """z_y (mean over positions), ``[n]``; NaN where ignored."""
        logits, label = self._known(outputs, targets)
        return self._mean(logits.gather(-1, label)[..., 0], targets)

    def margin(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """z_y − log Σ_{k≠y} exp z_k, the log-odds of the target (mean over positions), ``[n]``.

        NaN where ignored.
        """
        logits, label = self._known(outputs, targets)
        others = logits.scatter(-1, label, -torch.inf).logsumexp(-1)
        return self._mean(logits.gather(-1, label)[..., 0] - others, targets)

    def log_probability(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log softmax(z)_y (mean over positions), without smoothing, ``[n]``."""
        return -CrossEntropy(ignore_index=self.ignore_index)(outputs, targets)

    def predict(self, outputs: Tensor) -> Tensor | None:
        """The largest output, ``[n]``, for outputs ``[n, c]``."""
        return outputs.argmax(1) if outputs.dim() == 2 else None
