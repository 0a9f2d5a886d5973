"""Per-example losses: what each example added to the objective, and closed forms at the output.

A loss maps outputs and targets to one number per example, shape ``[n]``. Weights that depend on
the target (class weights, the number of tokens that count) are kept apart, in ``weights``, because
they belong to the average: R(θ) = Σ w_i ℓ_i / Σ w_i, as in torch's own weighted mean.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

from torch import Tensor

from upweight.errors import LossError

__all__ = ["CustomLoss", "Loss", "OutputLoss"]


class Loss(ABC):
    """A loss per example; custom callables are wrapped in one."""

    name: str
    unit: str

    @abstractmethod
    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Losses ``[n]`` of a batch."""

    def check(self, outputs: Any, targets: Any) -> None:
        """Raise LossError when the targets cannot be scored against the outputs."""
        del outputs, targets

    def weights(self, targets: Any) -> Tensor | None:
        """Weight ``[n]`` of each example in the mean, or None when all are 1."""
        del targets
        return None

    def logit(self, outputs: Any, targets: Any) -> Tensor:
        """The output ``[n]`` that speaks for the target; raises LossError where there is none."""
        raise LossError(f"The loss {self.name!r} has no logit. Pass a callable as the measure.")

    def margin(self, outputs: Any, targets: Any) -> Tensor:
        """How far ``[n]`` the target leads; raises LossError where that means nothing."""
        raise LossError(f"The loss {self.name!r} has no margin. Pass a callable as the measure.")

    def log_probability(self, outputs: Any, targets: Any) -> Tensor:
        """Log-probability ``[n]`` of the target in nats; raises LossError where there is none."""
        raise LossError(f"The loss {self.name!r} has no likelihood. Pass a callable as measure.")

    def predict(self, outputs: Any) -> Tensor | None:
        """Predicted label ``[n]``, or None when the loss does not say."""
        del outputs
        return None

    def fisher(self, outputs: Any, targets: Any, rows: Tensor) -> Tensor:
        """Product of the true Fisher at the output with rows shaped like the outputs.

        F_i = E[∇ℓ ∇ℓᵀ] over labels drawn from the model; raises LossError without a likelihood.
        """
        raise LossError(
            f"The true Fisher needs labels drawn from the model, and {self.name!r} is not the "
            "negative logarithm of a probability. Use the GGN or the empirical Fisher."
        )


class OutputLoss(Loss):
    """A loss with closed first and second derivatives in outputs of shape ``[n, c]``."""

    @abstractmethod
    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """First derivative ∂ℓ/∂z, ``[n, c]``."""

    @abstractmethod
    def curve(self, outputs: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """Second derivative ∂²ℓ/∂z² applied to rows ``[n, m, c]``."""


@final
class CustomLoss(Loss):
    """A user's callable ``(outputs, targets) -> [n]``."""

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.unit = "loss"

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Losses ``[n]`` as the callable gives them."""
        return self.function(outputs, targets)
