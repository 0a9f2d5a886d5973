"""Gradients of many perceptrons at once, written out by hand: products that write in place.

Autograd makes every gradient anew, and of several megabytes at a time that is pages the system
must clear. Here each product writes where the optimiser reads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from upweight.errors import ModelError
from upweight.objective import Objective
from upweight.retraining.minibatches import Minibatch
from upweight.retraining.slopes import Slopes, output_slope

__all__ = ["Layers", "stages_of"]


@final
@dataclass(frozen=True)
class Activation:
    """A function of every number by itself, and its derivative as a function of its value."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation(torch.relu_, lambda value: value > 0),
    nn.Tanh: Activation(torch.tanh_, lambda value: 1 - value.square()),
    nn.Sigmoid: Activation(torch.sigmoid_, lambda value: value * (1 - value)),
}


@final
@dataclass(frozen=True)
class Stage:
    """A linear layer, by the names of its parameters, and what follows it."""

    weight: str
    bias: str | None
    activation: Activation | None


@final
class Layers(Slopes):
    """Perceptrons: linear layers with ReLU, tanh or the logistic function between them.

    Args:
        objective: the models' form, and its loss.

    Raises:
        ModelError: the model is something else.
    """

    name = "stacked layers"

    def __init__(self, objective: Objective) -> None:
        stages = stages_of(objective, axes=2) or stages_of(objective, axes=3)
        if stages is None:
            raise ModelError("The model is no sequence of linear layers. Use Mapped or Single.")
        self._objective, self._stages = objective, stages
        self._slopes: dict[str, Tensor] = {}

    def __call__(self, blocks: Mapping[str, Tensor], step: Minibatch) -> Sequence[Tensor]:
        """Gradients ``[m, *shape]``, in memory that the next call writes again."""
        if next(iter(self._slopes.values()), torch.empty(0)).shape[:1] != step.shape[:1]:
            self._slopes = {name: torch.empty_like(block) for name, block in blocks.items()}
        with torch.no_grad():
            values = self._forward(blocks, step)
            slope = self._output(values[-1], step)
            for place in reversed(range(len(self._stages))):
                stage = self._stages[place]
                if stage.activation is not None:
                    slope = slope * stage.activation.slope(values[place + 1])
                self._write(stage, slope, values[place])
                if place:
                    slope = torch.bmm(slope, blocks[stage.weight])
        return list(self._slopes.values())

    def _forward(self, blocks: Mapping[str, Tensor], step: Minibatch) -> list[Tensor]:
        """Inputs and what every stage makes of them, ``[m, b, i]``; shared inputs ``[b, i]``."""
        inputs = step.batch.inputs
        assert isinstance(inputs, tuple)
        x: Tensor = inputs[0].flatten(1)
        values = [x if step.together else x.unflatten(0, step.shape)]
        for stage in self._stages:
            weight, before = blocks[stage.weight], values[-1]
            if before.dim() == 2:  # one product for all models
                found = (weight.flatten(0, 1) @ before.T).view(*weight.shape[:2], -1).mT
                if stage.bias is not None:
                    found = found + blocks[stage.bias][:, None]
            elif stage.bias is None:
                found = torch.bmm(before, weight.mT)
            else:
                found = torch.baddbmm(blocks[stage.bias][:, None], before, weight.mT)
            values.append(found if stage.activation is None else stage.activation.value(found))
        return values

    def _output(self, outputs: Tensor, step: Minibatch) -> Tensor:
        """The gradient of Σ share ℓ in the outputs, ``[m, b, c]``."""
        flat = outputs.reshape(-1, outputs.shape[2])
        slope = output_slope(self._objective, flat, step)
        if slope is None:
            leaf = flat.requires_grad_()
            with torch.enable_grad():
                value = self._objective.loss(leaf, step.batch.targets) * step.shares.reshape(-1)
                (slope,) = torch.autograd.grad(value.sum(), leaf)
        return slope.view_as(outputs)

    def _write(self, stage: Stage, slope: Tensor, before: Tensor) -> None:
        """Gradients of a stage's parameters from those of its outputs ``[m, b, o]``."""
        weight = self._slopes[stage.weight]
        if before.dim() == 2:
            torch.mm(slope.mT.reshape(-1, len(before)), before, out=weight.flatten(0, 1))
        else:
            torch.bmm(slope.mT, before, out=weight)
        if stage.bias is not None:
            torch.sum(slope, 1, out=self._slopes[stage.bias])


def _hooked(module: nn.Module) -> bool:
    """Whether a call does more than the forward of its class."""
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _rows(module: nn.Flatten) -> bool:
    """Whether it makes one row of each example."""
    return (module.start_dim, module.end_dim) == (1, -1)


def stages_of(objective: Objective, axes: int = 2) -> list[Stage] | None:
    """The layers of a sequence of linear layers and activations, or None.

    Exact types without hooks, every parameter trained and used once; everything else is autograd's.

    Args:
        objective: the model and its loss.
        axes: of the inputs, rows first.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> len(stages_of(Objective(net, "cross_entropy")))
        2
    """
    model = objective.model
    alone = type(model) is nn.Linear
    # One module at two places is called twice, and named_children() names it once.
    named: list[tuple[str, Any]] = [("", model)] if alone else list(model._modules.items())
    if not (alone or type(model) is nn.Sequential) or objective.autocast is not None:
        return None
    if any(_hooked(module) for module in model.modules()):
        return None
    if axes != 2 and not (named and type(named[0][1]) is nn.Flatten):
        return None
    stages: list[Stage] = []
    for place, (name, module) in enumerate(named):
        prefix = f"{name}." if name else ""
        if type(module) is nn.Linear:
            bias = None if module.bias is None else f"{prefix}bias"
            stages.append(Stage(f"{prefix}weight", bias, None))
        elif type(module) in ACTIVATIONS and stages and stages[-1].activation is None:
            last = stages[-1]
            stages[-1] = Stage(last.weight, last.bias, ACTIVATIONS[type(module)])
        elif not (place == 0 and type(module) is nn.Flatten and _rows(module)):
            return None
    names = [name for stage in stages for name in (stage.weight, stage.bias) if name]
    return stages if sorted(names) == sorted(objective.space.shapes) else None
