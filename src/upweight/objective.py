"""What was minimised, R(θ) = Σ w_i ℓ(z_i, θ) / Σ w_i + ½ θᵀ Λ θ, and what is asked of a query."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from upweight.criteria import resolve
from upweight.data import Batch
from upweight.errors import InputError, LossError, ModelError
from upweight.losses import CustomLoss, Loss
from upweight.parameters import ParameterSpace, Select, Selection
from upweight.precision import Precision, uncompiled
from upweight.refusals import refuse_renormalising, refuse_train_mode, refused_untaken
from upweight.sources import map_leaves

__all__ = ["MEASURES", "Measure", "Objective", "Removal"]

Removal = Literal["mean", "sum"]
Measure = str | Callable[[Any, Any], Tensor]
MEASURES = ("loss", "margin", "logit", "log_probability")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, with its own parameter names, or the module."""
    # By name: importing torch's compiler to compare types takes seconds.
    while type(model).__name__ == "OptimizedModule":
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


@final
class Objective:
    """What was minimised, and what is asked of a query.

    R(θ) = Σ_i w_i ℓ(z_i, θ) / Σ_i w_i + ½ Σ_b λ_b ‖θ_b‖² over parameter blocks b.

    Made inside a ``torch.autocast`` block, it remembers autocast and runs the model under it ever
    after; the loss, and all algebra, are computed in the parameters' dtype.

    Args:
        model: any module, in the mode it is to be explained in. What ``torch.compile`` made of a
            module or its parts runs as it was written: compiled code hides its operations.
        loss: a name, a torch criterion, or a callable (outputs, targets) -> ``[n]``.
        l2: λ, or a mapping of name patterns to λ (the first that matches counts, else 0). Weight
            decay belongs here: it is part of the curvature. Adam's or AdamW's is not in the loss.
        removal: what happens to L2 when an example goes. ``"mean"``: L2 sits inside each example's
            loss, so a refit minimises the mean over n−1 plus the same L2 (Koh & Liang, 2017).
            ``"sum"``: L2 keeps its size against the sum of losses (Koh et al., 2019).
        parameters: which parameters to differentiate; None for all that require gradients. Less
            than a tenth of these must be meant: ``Selection(names, least_coverage=0.01)``.
        measure: what is asked of a query: ``"loss"`` (without L2), ``"margin"``, ``"logit"``,
            ``"log_probability"``, or a callable (outputs, targets) -> ``[q]``.

    Attributes:
        autocast: the autocast under which the model runs, or None.

    Raises:
        ModelError: random layers in train mode, layers that change their own weights, no parameter
            to differentiate, or too few of them.
        LossError: an unknown loss or measure.
        InputError: autocast in float16.

    Example:
        >>> objective = Objective(nn.Linear(3, 2), "cross_entropy", l2=0.01)
        >>> objective.space.size
        8
    """

    def __init__(
        self,
        model: nn.Module,
        loss: object,
        *,
        l2: float | Mapping[str, float] = 0.0,
        removal: Removal = "mean",
        parameters: Select = None,
        measure: Measure = "loss",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"The model must be a torch.nn.Module, got {type(model).__name__}.")
        if removal not in ("mean", "sum"):
            raise InputError(f"removal is 'mean' or 'sum', got {removal!r}.")
        refuse_train_mode(model)
        refuse_renormalising(model)
        self.model = unwrapped(model)
        self.loss: Loss = resolve(loss)
        self.removal: Removal = removal
        self.space = ParameterSpace(self.model, Selection.of(parameters))
        self.autocast = Precision.ambient(self.space.device)
        stated = l2 if isinstance(l2, Mapping) else {"*": l2}
        self.l2_patterns = self._l2_patterns(stated)
        self.l2 = self._l2_row(stated)
        self.measure = check_measure(measure)

    @property
    def precision(self) -> str | None:
        """In words, how the model runs if not in the dtype of its parameters."""
        return None if self.autocast is None else f"model run under {self.autocast}"

    def in_full_precision(self) -> "Objective":
        """The same objective of the same module, run without autocast."""
        twin = copy.copy(self)
        twin.autocast = None
        return twin

    def on(self, model: nn.Module) -> "Objective":
        """The same objective of another module, which answers with all of its own parameters."""
        twin = copy.copy(self)
        twin.model = model
        return twin

    def of(self, model: nn.Module) -> "Objective":
        """The same objective of another module of the same shape, in the same parameters."""
        twin = self.on(model)
        twin.space = ParameterSpace(model, list(self.space.shapes))
        return twin

    def in_double(self) -> "Objective":
        """The same objective on a float64 copy of the model, which autocast leaves alone."""
        twin = self.in_full_precision().of(copy.deepcopy(self.model).double())
        twin.l2 = self.l2.double()
        return twin

    def of_part(self, names: Sequence[str]) -> "Objective":
        """The same objective as a function of some of its parameters, the others held."""
        twin = copy.copy(self)
        twin.space = ParameterSpace(self.model, list(names))
        blocks = self.space.unflatten(self.l2)
        twin.l2 = twin.space.flatten({name: blocks[name] for name in twin.space.shapes})
        return twin

    def with_l2(self, row: Tensor) -> "Objective":
        """The same objective of the same module with another λ of every parameter, ``[p]``."""
        twin = copy.copy(self)
        twin.l2 = row
        return twin

    def _l2_patterns(self, stated: Mapping[str, float]) -> dict[str, str | None]:
        """The first stated pattern that matches each block, or None; refuses what cannot be."""
        for pattern, value in stated.items():
            if not (isinstance(value, (int, float)) and 0 <= value < float("inf")):
                raise InputError(f"l2 must be a finite number ≥ 0, got {value!r}.")
            if not any(fnmatchcase(name, pattern) for name in self.space.shapes):
                raise InputError(
                    f"The l2 pattern {pattern!r} matches no chosen parameter. "
                    f"They are: {', '.join(self.space.shapes)}."
                )
        return {
            name: next((pattern for pattern in stated if fnmatchcase(name, pattern)), None)
            for name in self.space.shapes
        }

    def _l2_row(self, stated: Mapping[str, float]) -> Tensor:
        """λ of every position of the parameter row, ``[p]``."""
        blocks = {}
        for name, shape in self.space.shapes.items():
            pattern = self.l2_patterns[name]
            value = 0.0 if pattern is None else stated[pattern]
            blocks[name] = torch.full(
                shape, value, dtype=self.space.dtype, device=self.space.device
            )
        return self.space.flatten(blocks)

    def place(self, batch: Batch) -> Batch:
        """The batch on the model's device in the model's dtype."""
        placed = batch.to(self.space.device, self.space.dtype)
        if isinstance(self.loss, CustomLoss):
            return placed

        def label(leaf: Tensor) -> Tensor:
            return leaf.long() if leaf.dtype == torch.bool else leaf

        return replace(placed, targets=map_leaves(label, placed.targets))

    def outputs(self, params: Mapping[str, Tensor], batch: Batch) -> Any:
        """Outputs of the model at given parameters; logits where the loss is a named one."""
        # Every attribute once, by a path to its module: of a module with two paths torch would put
        # back at the second what it had put in at the first. What was not chosen is a constant.
        first = {id(p): name for name, p in self.model.named_parameters()}
        values = {
            f"{path}.{key}".lstrip("."): params.get(first[id(p)], p.detach())
            for path, module in self.model.named_modules()
            for key, p in module.named_parameters(recurse=False, remove_duplicate=False)
        }
        given = ((), batch.inputs) if isinstance(batch.inputs, dict) else (batch.inputs, {})
        return self._run(lambda: functional_call(self.model, values, *given, tie_weights=False))

    def call(self, batch: Batch) -> Any:
        """Outputs of the module itself, as the user would call it."""
        arguments = batch.inputs
        if isinstance(arguments, dict):
            return self._run(lambda: self.model(**arguments))
        return self._run(lambda: self.model(*arguments))

    def _run(self, forward: Callable[[], Any]) -> Any:
        """What the loss is given: logits where it is a named one and the model returns more."""
        known = self.autocast
        with uncompiled(), refused_untaken():
            outputs = forward() if known is None else known.run(forward, self.space.dtype)
        if isinstance(self.loss, CustomLoss) or isinstance(outputs, Tensor):
            return outputs
        return getattr(outputs, "logits", outputs)

    def losses(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Losses ``[n]`` without L2 at given parameters (differentiable)."""
        return self.loss(self.outputs(params, batch), batch.targets)

    def measured(self, measure: Measure) -> Callable[[Mapping[str, Tensor], Batch], Tensor]:
        """The function (params, batch) -> ``[q]`` of a measure."""
        asked = self.measured_at(measure)
        return lambda params, batch: asked(self.outputs(params, batch), batch.targets)

    def measured_at(self, measure: Measure) -> Callable[[Any, Any], Tensor]:
        """The function (outputs, targets) -> ``[q]`` of a measure."""
        if callable(measure):
            return measure
        if measure == "loss":
            return self.loss
        asked: Callable[[Any, Any], Tensor] = getattr(self.loss, check_measure(measure))
        return asked


def check_measure(measure: Measure) -> Any:
    """The measure itself, if it is known."""
    if not callable(measure) and measure not in MEASURES:
        raise LossError(
            f"The measure {measure!r} is unknown. Use one of {', '.join(MEASURES)}, or a callable "
            "(outputs, targets) -> [q]."
        )
    return measure
