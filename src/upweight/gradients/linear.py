"""Models that are linear in their chosen parameters: closed forms without autograd."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from upweight.budget import budget
from upweight.data import Batch
from upweight.errors import ModelError
from upweight.linalg.values import split_rows
from upweight.losses import OutputLoss
from upweight.objective import Measure, Objective
from upweight.sources import leaves

__all__ = ["LinearForm", "last_linear", "linear_form", "residual"]


@final
class _Tap(TorchFunctionMode):
    """Sees what a forward pass does with the weight and the bias of a last linear layer.

    Args:
        chosen: the weight, and the bias if it is among the chosen parameters.
    """

    def __init__(self, chosen: Sequence[Tensor]) -> None:
        super().__init__()
        self.chosen, self.own = chosen, {id(parameter) for parameter in chosen}
        self.calls, self.others, self.bytes = list[Any](), 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and keep the one that is x Wᵀ + b."""
        del types
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in leaves(out) if id(leaf) not in self.own]
        self.bytes += sum(leaf.nbytes for leaf in made)
        if made and any(id(leaf) in self.own for leaf in leaves((args, kwargs or {}))):
            if func is F.linear:
                named = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
                self.calls.append((named["input"], named["weight"], named.get("bias"), out))
                self.versions = _version(named["input"]), _version(out)
            else:
                self.others += 1
        return out

    def seen(self, outputs: Any) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Input, output and bias of the layer, if it is what makes the outputs and nothing else."""
        if len(self.calls) != 1 or self.others:
            return None
        x, weight, bias, z = self.calls[0]
        whole = outputs is z and weight is self.chosen[0]
        whole = whole and (_version(x), _version(z)) == self.versions
        return (x, z, bias) if whole and (not self.chosen[1:] or bias is self.chosen[1]) else None


def _version(tensor: Tensor) -> int:
    """How often it was changed in place; unknown of what inference mode made, and taken for 0."""
    return 0 if tensor.is_inference() else tensor._version


@final
@dataclass(frozen=True)
class LinearForm:
    """z = x̃ Wᵀ + fixed, the model as seen by its chosen parameters.

    x̃ carries a 1 at its end when the bias is chosen too.

    Attributes:
        objective: whose model it is.
        outputs: c.
        bias: whether its bias is a chosen parameter.
        fixed: a bias that is not.
        shape: of the rows of x̃ that an example has: () where it has one.
        bytes: memory of an example in the forward pass, at most.
    """

    objective: Objective
    outputs: int
    bias: bool
    fixed: Tensor | None
    shape: torch.Size
    bytes: int

    def seen(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """x̃ ``[n, *s, d]`` and z ``[n, *s, c]``, of as many examples at a time as memory takes."""
        size = self.together(len(batch))
        cuts = [slice(at, at + size) for at in range(0, len(batch), size)]
        parts = [self._seen(batch.part(cut) if cuts[1:] else batch) for cut in cuts]
        if len(parts) == 1:
            return parts[0]
        x, z = zip(*parts, strict=True)
        return torch.cat(x), torch.cat(z)

    def together(self, most: int) -> int:
        """Examples that a quarter of the memory budget takes, and no more than that."""
        return max(1, min(most, budget() // 4 // max(self.bytes, 1)))

    def _seen(self, batch: Batch) -> tuple[Tensor, Tensor]:
        found = _tapped(self.objective, batch)[0]
        if found is None:
            raise ModelError(
                "The model uses its last layer in a way that it did not on the first example. Give "
                "all batches inputs of the same form."
            )
        x, z, _ = found
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1) if self.bias else x, z

    def at(self, features: Tensor, rows: Tensor) -> Tensor:
        """Z ``[n, m, c]`` of x̃ ``[n, d]`` at parameter rows ``[m, p]``."""
        blocks = split_rows(rows, features.shape[1], bias=self.bias)
        outputs = (features @ blocks.flatten(0, 1).T).view(len(features), *blocks.shape[:2])
        return outputs if self.fixed is None else outputs + self.fixed


def _tapped(objective: Objective, batch: Batch) -> tuple[Any, int]:
    chosen = list(objective.space.parameters().values())
    with torch.no_grad(), _Tap(chosen) as tap:
        outputs = objective.call(batch)
    return tap.seen(outputs), tap.bytes


def linear_form(objective: Objective, batch: Batch) -> LinearForm | None:
    """The closed form of a model whose chosen parameters are its last linear layer, or None.

    Any module will do whose output is what ``F.linear`` made of the weight, and that uses weight
    and bias nowhere else; with a loss that has closed derivatives, rows of features ``[n, d]`` and
    one target per row. Under autocast there is none: the numbers would be those of another
    precision than the model's.

    Example:
        >>> from torch import nn
        >>> objective = Objective(nn.Linear(3, 2), "cross_entropy")
        >>> batch = Batch((torch.zeros(1, 3),), torch.tensor([0]), torch.tensor([0]))
        >>> linear_form(objective, batch).bias
        True
    """
    found = last_linear(objective, batch)
    return None if found is None or len(found.shape) else found


def last_linear(objective: Objective, batch: Batch) -> LinearForm | None:
    """The same where an example may have several rows of features, as sequences have.

    Example:
        >>> from torch import nn
        >>> objective = Objective(nn.Linear(3, 2), "cross_entropy")
        >>> batch = Batch((torch.zeros(1, 5, 3),), torch.zeros(1, 5).long(), torch.tensor([0]))
        >>> last_linear(objective, batch).shape, linear_form(objective, batch)
        (torch.Size([5]), None)
    """
    shapes = list(objective.space.shapes.values())
    plain = shapes[0].numel() > 0 and len(shapes[0]) == 2 and shapes[1:] in ([], [shapes[0][:1]])
    if not plain or not isinstance(objective.loss, OutputLoss) or objective.autocast is not None:
        return None
    one = batch.part(slice(0, 1))
    found, held = _tapped(objective, one)
    if found is None or objective.loss.rows(found[1], one.targets) is None:
        return None
    x, _, bias = found
    held += sum(leaf.nbytes for leaf in leaves(one.inputs))
    both = len(shapes) > 1
    fixed = None if both or bias is None else bias.detach()
    return LinearForm(objective, shapes[0][0], both, fixed, x.shape[1:-1], held)


def residual(objective: Objective, outputs: Tensor, targets: Any, measure: Measure) -> Tensor:
    """Derivative ``[n, c]`` of a measure in the outputs; in closed form for the loss."""
    if measure == "loss" and isinstance(objective.loss, OutputLoss):
        return objective.loss.residual(outputs, targets)
    asked = measure if callable(measure) else getattr(objective.loss, measure)
    leaf = outputs.detach().requires_grad_(True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(asked(leaf, targets).sum(), leaf)
    return slope
