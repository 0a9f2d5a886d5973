"""Per-example losses: what each example added to the objective, and closed forms at the output.

A loss maps outputs and targets to one number per example, shape ``[n]``. Weights that depend on
the target (class weights, the number of tokens that count) are kept apart, in ``weights``, because
they belong to the average: R(θ) = Σ w_i ℓ_i / Σ w_i, as in torch's own weighted mean.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.func import hessian, vmap

from upweight.errors import LossError
from upweight.sources import map_leaves

__all__ = ["CustomLoss", "Loss", "OutputLoss", "Signs"]

Signs = Callable[[torch.Size], Tensor]
MOST_OUTPUTS = 256
ROUNDING = 1e-12  # of a second derivative in double: what is smaller has no sign


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

    def draw(self, outputs: Any, targets: Any, signs: Signs) -> Tensor:
        """A random slope v ``[n, ...]`` of the outputs' shape with E[v vᵀ] = ∂²ℓ/∂z².

        It is Σ_k ±v_k for a root Σ_k v_k v_kᵀ of the second derivative, with random signs.

        Args:
            outputs: z.
            targets: as the loss takes them.
            signs: makes ±1 of a given shape per example, ``[n, *shape]``.

        Raises:
            LossError: the second derivative is not known to be positive.
        """
        raise LossError(
            f"The curvature of {self.name!r} at the outputs cannot be drawn from. Use the "
            "empirical Fisher, or method='ggn_cg'."
        )

    def columns(self, outputs: Any, targets: Any) -> list[Tensor]:
        """Slopes v_k ``[n, ...]`` with Σ_k v_k v_kᵀ = ∂²ℓ/∂z², where they are few.

        Raises:
            LossError: they are many, or not known.
        """
        raise LossError(
            f"The curvature of {self.name!r} at the outputs has no short list of columns. Draw "
            "from it instead."
        )

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

    def rows(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Any, Tensor] | None:
        """Outputs ``[m, c]``, targets and factors ``[m]`` of the losses that are added up.

        None where an example's loss is no such sum.
        """
        return None if outputs.dim() != 2 else (outputs, targets, outputs.new_ones(len(outputs)))

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

    def draw(self, outputs: Any, targets: Any, signs: Signs) -> Tensor:
        """Random signs times the square root of every example's second derivative."""
        root = self._root(outputs, targets)
        return (root @ signs(root.shape[2:]).to(root)[..., None])[..., 0].view_as(outputs)

    def columns(self, outputs: Any, targets: Any) -> list[Tensor]:
        """The columns of the square roots."""
        return [column.view_as(outputs) for column in self._root(outputs, targets).unbind(2)]

    def _root(self, outputs: Any, targets: Any) -> Tensor:
        """The square root ``[n, c, c]`` of ∂²ℓ_i/∂z² of every example."""
        count = outputs[0].numel() if isinstance(outputs, Tensor) else 0
        if not 0 < count <= MOST_OUTPUTS:
            raise LossError(
                f"The second derivative of {self.name!r} is taken for tensors of up to "
                f"{MOST_OUTPUTS} outputs per example. Use the empirical Fisher, or a named loss."
            )

        def single(flat: Tensor, target: Any) -> Tensor:
            shaped = flat.view(1, *outputs.shape[1:])
            alone = map_leaves(lambda leaf: leaf[None], target)
            return self.function(shaped, alone)[0]

        over = (0, None if targets is None else 0)
        # In double: a sure model's p − p² is rounding in single precision.
        wide = outputs.detach().double().reshape(len(outputs), -1)
        second = vmap(hessian(single), in_dims=over)(wide, targets)
        values, vectors = torch.linalg.eigh(second)
        if bool((values < -1e-6 * values.abs().amax(1, keepdim=True) - ROUNDING).any()):
            raise LossError(
                f"{self.name!r} is not convex in the outputs, so its Gauss-Newton matrix is not "
                "positive. Use the empirical Fisher."
            )
        root: Tensor = vectors * values.clamp_min(0).sqrt()[:, None]
        return root.to(outputs)
