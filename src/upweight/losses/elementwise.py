"""Losses that are a function of each output alone: binary cross-entropy, squared error, hinges."""

from abc import ABC, abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.errors import LossError
from upweight.losses.base import MOST_OUTPUTS, OutputLoss, Signs

__all__ = ["BinaryCrossEntropy", "Hinge", "MeanSquaredError", "SmoothHinge"]


def _like(targets: Tensor, outputs: Tensor, name: str) -> Tensor:
    """Targets in the outputs' shape: never a silent broadcast of [n] against [n, 1]."""
    sizes = [[n for n in x.shape[1:] if n != 1] for x in (targets, outputs)]
    if sizes[0] != sizes[1] or targets.shape[:1] != outputs.shape[:1]:
        raise LossError(
            f"{name} expects targets of the outputs' size, got targets {tuple(targets.shape)} for "
            f"outputs {tuple(outputs.shape)}."
        )
    return targets.reshape(outputs.shape).to(outputs.dtype)


def _mean_rest(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1) if values.dim() > 1 else values


class ElementwiseLoss(OutputLoss):
    """A loss that is a mean of functions of each output alone."""

    @abstractmethod
    def bend(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Second derivative of the example's loss in each output, of the outputs' shape."""

    @final
    def curve(self, outputs: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """The second derivatives times rows."""
        return rows * self.bend(outputs, targets)[:, None, :]

    @final
    def draw(self, outputs: Tensor, targets: Tensor, signs: Signs) -> Tensor:
        """Random signs times the roots of the second derivatives."""
        return signs(outputs.shape[1:]).to(outputs) * self.bend(outputs.detach(), targets).sqrt()

    @final
    def columns(self, outputs: Tensor, targets: Tensor) -> list[Tensor]:
        """One per output."""
        root = self.bend(outputs.detach(), targets).sqrt()
        flat = root.reshape(len(root), -1)
        if flat.shape[1] > MOST_OUTPUTS:
            return super().columns(outputs, targets)
        eye = torch.eye(flat.shape[1]).to(flat)
        return [(flat * eye[k]).view_as(root) for k in range(len(eye))]


def _count(outputs: Tensor) -> int:
    """Outputs per example."""
    return outputs[0].numel() if outputs.dim() > 1 else 1


@final
class BinaryCrossEntropy(ElementwiseLoss):
    """Binary cross-entropy with logits, −y log σ(z) − (1−y) log σ(−z), mean over outputs, in nats.

    Args:
        pos_weight: factor on the positive part, a tensor that broadcasts over outputs.

    Example:
        >>> round(BinaryCrossEntropy()(torch.zeros(1), torch.ones(1)).item(), 4)
        0.6931
    """

    def __init__(self, *, pos_weight: Tensor | None = None) -> None:
        self.pos_weight = pos_weight
        self.name, self.unit = "binary_cross_entropy", "nats"

    def _positive(self, y: Tensor) -> Tensor:
        return y if self.pos_weight is None else y * self.pos_weight.to(y)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Losses ``[n]`` in nats."""
        y = _like(targets, outputs, self.name)
        loss = self._positive(y) * F.softplus(-outputs) + (1 - y) * F.softplus(outputs)
        return _mean_rest(loss)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise LossError for targets outside [0, 1] or of another size."""
        y = _like(targets, outputs, self.name)
        wrong = (y < 0) | (y > 1)
        if bool(wrong.any()):
            raise LossError(
                f"binary_cross_entropy expects targets between 0 and 1, got {float(y[wrong][0])}. "
                "Map labels −1/+1 to 0/1, or use the hinge loss."
            )

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(1−y) σ(z) − y σ(−z), divided by the number of outputs."""
        y = _like(targets, outputs, self.name)
        slope = (1 - y) * torch.sigmoid(outputs) - self._positive(y) * torch.sigmoid(-outputs)
        return slope / outputs.shape[1]

    def bend(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """σ(z) σ(−z), divided by the number of outputs."""
        y = _like(targets, outputs, self.name)
        bend = torch.sigmoid(outputs) * torch.sigmoid(-outputs) * (self._positive(y) + 1 - y)
        return bend / _count(outputs)

    def fisher(self, outputs: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """σ(z) σ(−z) rows; a mean over k independent outputs gives 1/k²."""
        if self.pos_weight is not None:
            return super().fisher(outputs, targets, rows)
        bend = torch.sigmoid(outputs) * torch.sigmoid(-outputs)
        return rows * bend / _count(outputs) ** 2

    def logit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Z where y is 1 and −z where it is 0, ``[n]`` (single output)."""
        y = _like(targets, outputs, self.name)
        return _single((2 * y - 1) * outputs)

    def margin(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The log-odds of the target: the logit."""
        return self.logit(outputs, targets)

    def log_probability(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log σ(±z), mean over outputs, ``[n]``."""
        return -BinaryCrossEntropy()(outputs, targets)

    def predict(self, outputs: Tensor) -> Tensor | None:
        """1 where z > 0, for a single output."""
        return (outputs.reshape(-1) > 0).long() if outputs.numel() == len(outputs) else None


def _single(values: Tensor) -> Tensor:
    if values.numel() != values.shape[0]:
        raise LossError(f"This measure needs one output per example, got {tuple(values.shape)}.")
    return values.reshape(-1)


@final
class MeanSquaredError(ElementwiseLoss):
    """Squared error (y − z)², mean over outputs, without the factor ½, as in torch.

    Example:
        >>> MeanSquaredError()(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])).tolist()
        [1.0, 4.0]
    """

    def __init__(self) -> None:
        self.name, self.unit = "mean_squared_error", "squared target units"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Losses ``[n]``."""
        return _mean_rest((outputs - _like(targets, outputs, self.name)) ** 2)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise LossError for targets of another size."""
        _like(targets, outputs, self.name)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """2 (z − y) / c."""
        return 2 * (outputs - _like(targets, outputs, self.name)) / outputs.shape[1]

    def bend(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """2 / c."""
        del targets
        return torch.full_like(outputs, 2 / _count(outputs))

    def fisher(self, outputs: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """2 rows / c: the loss is −log of a normal density of variance c/2."""
        del targets
        return rows * (2 / _count(outputs))


class SignedLoss(ElementwiseLoss, ABC):
    """A loss of the margin y z alone, for labels −1 and +1 and a single output."""

    @final
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise LossError for labels other than −1 and +1."""
        y = _like(targets, outputs, self.name)
        wrong = y.abs() != 1
        if bool(wrong.any()):
            raise LossError(
                f"{self.name} expects labels −1 and +1, got {float(y[wrong][0]):g}. Map 0/1 to "
                "2·y − 1."
            )

    @final
    def logit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The margin."""
        return self.margin(outputs, targets)

    @final
    def margin(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Y z, ``[n]``."""
        return _single(_like(targets, outputs, self.name) * outputs)

    @final
    def predict(self, outputs: Tensor) -> Tensor | None:
        """The sign of the output."""
        return _single(outputs).sign().long()


@final
class Hinge(SignedLoss):
    """Hinge loss max(0, 1 − y z) for labels −1 and +1; its curvature is zero.

    Example:
        >>> Hinge()(torch.tensor([0.5, 2.0]), torch.tensor([1, 1])).tolist()
        [0.5, 0.0]
    """

    def __init__(self) -> None:
        self.name, self.unit = "hinge", "hinge loss"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Losses ``[n]``."""
        return torch.relu(1 - self.margin(outputs, targets))

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """−y where the margin is below 1, else 0."""
        y = _like(targets, outputs, self.name)
        return -y * (y * outputs < 1)

    def bend(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Zero: Koh & Liang (2017) smooth the hinge for this reason."""
        del targets
        return torch.zeros_like(outputs)


@final
class SmoothHinge(SignedLoss):
    """Smooth hinge t·log(1 + exp((1 − y z)/t)) for labels −1 and +1 (Koh & Liang, 2017).

    Args:
        temperature: t > 0; the hinge is the limit t → 0.

    Example:
        >>> SmoothHinge(0.001)(torch.tensor([0.5]), torch.tensor([1])).item()
        0.5
    """

    def __init__(self, temperature: float = 0.001) -> None:
        if not temperature > 0:
            raise LossError(
                f"The temperature must be positive, got {temperature}. Use Hinge() for 0."
            )
        self.temperature = temperature
        self.name, self.unit = "smooth_hinge", "hinge loss"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Losses ``[n]``."""
        t = self.temperature
        return t * F.softplus((1 - self.margin(outputs, targets)) / t)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """−y σ((1 − y z)/t)."""
        y = _like(targets, outputs, self.name)
        return -y * torch.sigmoid((1 - y * outputs) / self.temperature)

    def bend(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """σ(u) σ(−u)/t, with u = (1 − y z)/t."""
        u = (1 - _like(targets, outputs, self.name) * outputs) / self.temperature
        return torch.sigmoid(u) * torch.sigmoid(-u) / self.temperature
