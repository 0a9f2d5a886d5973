"""Sees every operation of a forward pass and keeps the two factors of those that use a parameter.

Operations are watched and not modules: a weight used in a function, twice, or by two layers is
seen wherever it is used, and the user's model is not touched. One rule per operation, registered
by ``@rule``, says which outer products the gradient of its weight is made of.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from upweight.linalg import Outer

__all__ = ["RULES", "Call", "Given", "Use", "Watch", "rule"]

Factors = Callable[[Tensor], Outer]
Rule = Callable[["Watch", "Given"], Any]
RULES: dict[Any, tuple[Rule, Mapping[str, Any]]] = {}


@final
class Given(SimpleNamespace):
    """An operation and its arguments by name, with the defaults of those left out."""

    operation: Callable[..., Any]

    def run(self, **changed: Any) -> Any:
        """The operation's output, some arguments changed."""
        named = {key: value for key, value in vars(self).items() if key != "operation"}
        return self.operation(*{**named, **changed}.values())


def rule(*operations: Any, takes: Mapping[str, Any]) -> Callable[[Rule], Rule]:
    """Register a function (watch, given) -> output for operations with the same arguments.

    Args:
        operations: functions of torch.
        takes: their arguments in order, with defaults.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operations, (function, takes)))
        return function

    return register


@final
@dataclass(frozen=True)
class Use:
    """How an operation used a parameter.

    Attributes:
        name: of the parameter.
        shape: (g, o, i) of its matrices.
        factors: from the gradient in the output, batch first ``[n, ...]``, to the outer products.
        bias: of a weight: the parameter that would be the column of a constant 1.
        transposed: whether the parameter is stored ``[g, i, o]``.
    """

    name: str
    shape: tuple[int, int, int]
    factors: Factors
    bias: str | None = None
    transposed: bool = False


@final
@dataclass
class Call:
    """One use of parameters by one operation.

    Attributes:
        uses: of each parameter that was chosen.
        shape: of the output.
        slope: gradient in the output, batch first, once a backward pass has come by.
    """

    uses: tuple[Use, ...]
    shape: torch.Size
    slope: Tensor | None = field(default=None, repr=False)


@final
class Watch(TorchFunctionMode):
    """A context in which operations on known parameters are kept.

    Args:
        parameters: to be watched, by name.
        count: n, rows of the batch.
        axes: where the rows are in the output of each call; None in a trial run, which only notes
            shapes.
        anchor: a scalar 0 that requires gradients, so that all frozen layers have a graph.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        count: int,
        axes: Sequence[int | None] | None,
        anchor: Tensor,
    ) -> None:
        super().__init__()
        self.names = {id(value): name for name, value in parameters.items()}
        self.count, self.axes, self.anchor = count, axes, anchor
        self.calls: list[Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, by its rule if it has one."""
        del types
        known = RULES.get(func)
        if known is None or not self._concerned(args, kwargs):
            return func(*args, **(kwargs or {}))
        function, takes = known
        named = {**takes, **dict(zip(takes, args, strict=False)), **(kwargs or {})}
        if len(named) > len(takes) or len(args) > len(takes):  # an overload without a rule
            return func(*args, **(kwargs or {}))
        return function(self, Given(operation=func, **named))

    def _concerned(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
        """Whether a chosen parameter is among the arguments."""
        given = (*args, *kwargs.values()) if kwargs else args
        return any(
            id(x) in self.names
            or (isinstance(x, (list, tuple)) and any(id(item) in self.names for item in x))
            for x in given
        )

    def name(self, tensor: Any) -> str | None:
        """The name of a tensor if it is a chosen parameter."""
        return self.names.get(id(tensor)) if isinstance(tensor, Tensor) else None

    @property
    def axis(self) -> int | None:
        """Where the rows of the batch are in the output of the call that comes next."""
        place = len(self.calls)
        return self.axes[place] if self.axes is not None and place < len(self.axes) else 0

    def rows(self, x: Tensor, features: int = 1) -> Tensor:
        """An operand batch first, ``[n, s, *features]``.

        Where the batch is not an axis of it, every row has the same operand.
        """
        axis, n, x = self.axis, self.count, x.detach()
        if axis == 1:
            x = x.movedim(1, 0)
        elif axis is None and not self._spread(x, features):
            x = x.expand(n, *x.shape)
        elif axis is None:
            x = x.expand(n, *x.shape[1:])
        shape = x.shape[x.dim() - features :] if features else ()
        return x.reshape(n, -1, *shape)

    @staticmethod
    def _spread(x: Tensor, features: int) -> bool:
        return x.dim() > features + 1 and x.shape[0] == 1

    def skip(self, out: Tensor) -> Tensor:
        """Count a call whose parameters its rule cannot follow; the layout's proof finds them."""
        self.calls.append(Call((), out.shape))
        return out

    def keep(self, out: Tensor, uses: Sequence[Use | None], features: int = 1) -> Tensor:
        """Note a call, and have its output report the gradient that comes back to it.

        Args:
            out: output of the operation.
            uses: of its parameters.
            features: trailing axes of the output that are not positions.
        """
        axis = self.axis
        call = Call(tuple(use for use in uses if use is not None), out.shape)
        self.calls.append(call)
        if self.axes is None or not torch.is_grad_enabled():
            return out
        if axis is None:
            spread = self._spread(out, features)
            out = out.expand(self.count, *out.shape[1 if spread else 0 :])
        if not out.requires_grad:
            out = out + self.anchor

        def report(slope: Tensor) -> None:
            call.slope = slope.movedim(1, 0) if axis == 1 else slope

        out.register_hook(report)
        return out
