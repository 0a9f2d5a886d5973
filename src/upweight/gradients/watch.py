"""Sees every operation of a forward pass and keeps the two factors of those that use a parameter.

Operations are watched and not modules: a weight used in a function, twice, or by two layers is
seen wherever it is used, and the user's model is not touched. One rule per operation, registered
by ``@rule``, says which outer products the gradient of its weight is made of.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from upweight.errors import ModelError
from upweight.linalg import Outer
from upweight.sources import leaves

__all__ = ["RULES", "Call", "Given", "Use", "Watch", "rule"]

Factors = Callable[[Tensor], Outer]
Rule = Callable[["Watch", "Given"], Any]
Kind = tuple[Any, ...]
RULES: dict[Any, tuple[Rule, Mapping[str, Any]]] = {}


@final
class Given(SimpleNamespace):
    """An operation and its arguments by name, with the defaults of those left out."""

    operation: Callable[..., Any]

    def run(self, changed: Mapping[str, Any] | None = None) -> Any:
        """The operation's output, some arguments changed."""
        named = {key: value for key, value in vars(self).items() if key != "operation"}
        return self.operation(*{**named, **(changed or {})}.values())


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


# The data decide how many rows these give, or in which order.
ROUTES = {torch.nonzero, Tensor.nonzero, torch.argwhere, torch.masked_select, Tensor.masked_select}
SORTS = {torch.sort, Tensor.sort, torch.argsort, Tensor.argsort, torch.topk, Tensor.topk}
_T: Any = Tensor.T
_MT: Any = Tensor.mT
TURNS = {Tensor.t, torch.t, _T.__get__, _MT.__get__, Tensor.transpose, torch.transpose}
VIEWS = TURNS | {
    *(Tensor.__getitem__, Tensor.narrow, Tensor.view, Tensor.reshape, torch.reshape),
    *(Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, torch.squeeze, Tensor.flatten),
}


@final
@dataclass(frozen=True)
class View:
    """A tensor that shows a parameter, or is it.

    Attributes:
        tensor: kept, so that no other takes its id.
        name: of the parameter.
        shape: of the parameter.
        shown: the view of any tensor like the parameter.
        turned: whether it is the parameter's matrix transposed; None if neither that nor itself.
    """

    tensor: Tensor
    name: str
    shape: torch.Size
    shown: Callable[[Tensor], Tensor]
    turned: bool | None

    def pull(self, slopes: Tensor) -> Tensor:
        """From gradients in the view ``[n, ...]`` to those in the parameter, ``[n, *shape]``."""
        if self.turned is False:
            return slopes
        with torch.enable_grad():
            base = slopes.new_zeros(self.shape).requires_grad_()
            out = self.shown(base)
        return torch.autograd.grad(out, base, slopes, is_grads_batched=True)[0]


@final
@dataclass
class Call:
    """One use of parameters by one operation.

    Attributes:
        uses: of each parameter that was chosen.
        shape: of the output.
        kind: the operation, with the parameter and the rank of every argument.
        slope: gradient in the output, batch first, once a backward pass has come by.
    """

    uses: tuple[Use, ...]
    shape: torch.Size
    kind: Kind
    slope: Tensor | None = field(default=None, repr=False)


@final
class Watch(TorchFunctionMode):
    """A context in which operations on known parameters are kept.

    Args:
        parameters: to be watched, by name.
        count: n, rows of the batch.
        axes: where the rows are in the output of each kind of call; None in a trial run, which
            only notes shapes and what is routed.
        anchor: a scalar 0 that requires gradients, so that all frozen layers have a graph.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        count: int,
        axes: Mapping[Kind, int | None] | None,
        anchor: Tensor,
    ) -> None:
        super().__init__()
        self.names = {id(value): name for name, value in parameters.items()}
        self.count, self.axes, self.anchor = count, axes, anchor
        self.calls: list[Call] = []
        self.views: dict[int, View] = {}
        self.again = False
        self.kind: Kind = ()
        self.routed: set[str] = set()
        self._loose: dict[int, Tensor] = {}

    def repeat(self) -> "Watch":
        """The same watch for parts of the forward pass run again, as activation checkpoints do."""
        self.again = True
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, by its rule if it has one."""
        del types
        out = self._run(func, args, kwargs or {})
        if self.axes is None:
            self._follow(func, args, kwargs, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if func in VIEWS and isinstance(args[0], Tensor) and self._concerned(args[:1], None):
            return self._view(func, args, kwargs)
        if not self._concerned(args, kwargs):
            return func(*args, **kwargs)
        function, takes = RULES.get(func, (None, {}))
        named = {**takes, **dict(zip(takes, args, strict=False)), **kwargs}
        if function is None or len(named) > len(takes) or len(args) > len(takes):
            return self._unruled(func(*args, **kwargs), leaves((args, kwargs)))
        parts = ((self.source(x), x) for x in named.values())
        used = [(s and s.name, x.dim() if isinstance(x, Tensor) else None) for s, x in parts]
        self.kind = (func, *used)
        return function(self, Given(operation=func, **named))

    def _unruled(self, out: Any, given: Iterable[Tensor]) -> Any:
        """Note parameters of an operation without a rule, which the proof's rows may not reach."""
        if self.axes is None and any(leaf.is_floating_point() for leaf in leaves(out)):
            self.routed |= {source.name for source in map(self.source, given) if source}
        return out

    def _follow(self, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
        """Note parameters used on rows that the data choose or sort: those are of no example."""
        routes = func in ROUTES or (func is torch.where and len(args) == 1)
        if func is Tensor.__getitem__:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            routes = any(isinstance(x, Tensor) and x.dtype == torch.bool for x in places)
            # An order of all rows need not come from torch.
            ordered = all(np.shape(x)[:1] == (self.count,) for x in (args[0], places[0]))
            routes |= ordered and not any(map(np.shape, places[1:])) and not self.source(args[0])
        elif func in SORTS:
            place = 2 if "topk" in func.__name__ else 1
            axis = kwargs.get("dim", args[place] if len(args) > place else -1)
            routes = axis in (0, -args[0].dim()) or args[0].dim() < 2
        given = {id(x): x for x in leaves((args, kwargs))}
        if routes or given.keys() & self._loose.keys():
            sources = map(self.source, given.values())
            self.routed |= {source.name for source in sources if source is not None}
            self._loose |= {id(x): x for x in leaves(out) if id(x) not in given}

    def _concerned(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
        """Whether a chosen parameter or a view of one is among the arguments."""
        given = (*args, *kwargs.values()) if kwargs else args
        flat = [y for x in given for y in (x if isinstance(x, (list, tuple)) else (x,))]
        return any(id(x) in self.names or id(x) in self.views for x in flat)

    def _view(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run an operation that shows a parameter another way, and know its output by that."""
        out = func(*args, **kwargs)
        source = self.source(args[0])
        if isinstance(out, Tensor) and source is not None:

            def shown(base: Tensor) -> Tensor:
                value: Tensor = func(source.shown(base), *args[1:], **kwargs)
                return value

            turned = func in TURNS and source.turned is not None and args[0].dim() == 2
            self.views[id(out)] = View(
                out, source.name, source.shape, shown, not source.turned if turned else None
            )
        return out

    def source(self, tensor: Any) -> "View | None":
        """The parameter that a tensor is or shows."""
        if not isinstance(tensor, Tensor):
            return None
        name = self.names.get(id(tensor))
        if name is None:
            return self.views.get(id(tensor))
        return View(tensor, name, tensor.shape, lambda base: base, turned=False)

    def name(self, tensor: Any) -> str | None:
        """The name of a tensor if it is a chosen parameter."""
        return self.names.get(id(tensor)) if isinstance(tensor, Tensor) else None

    @property
    def axis(self) -> int | None:
        """Where the rows of the batch are in the output of the present call."""
        if self.axes is None:
            return 0
        if self.kind not in self.axes:
            raise ModelError(
                f"The model uses {', '.join(x[0] for x in self.kind[1:] if x[0])} in a way that it "
                "did not on the first batch. Give all batches inputs of the same form."
            )
        return self.axes[self.kind]

    def rows(self, x: Tensor, features: int = 1) -> Tensor:
        """An operand batch first, ``[n, s, *features]``.

        Where the batch is not an axis of it, every row has the same operand.
        """
        axis, n, x = self.axis, self.count, x.detach()
        if axis == 1:
            x = x.movedim(1, 0)
        if axis is not None and self.axes is not None and len(x) % n:
            raise ModelError(
                f"The model runs {n} rows in parts: an operation has {len(x)} of them. Let it run "
                "a batch whole, and choose the batch size in the data."
            )
        if axis is None and not self._spread(x, features):
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
        if not self.again:
            self.calls.append(Call((), out.shape, self.kind))
        return out

    def keep(self, out: Tensor, uses: Sequence[Use | None], features: int = 1) -> Tensor:
        """Note a call, and have its output report the gradient that comes back to it.

        Args:
            out: output of the operation.
            uses: of its parameters.
            features: trailing axes of the output that are not positions.
        """
        axis = self.axis
        call = Call(tuple(use for use in uses if use is not None), out.shape, self.kind)
        if not self.again:
            self.calls.append(call)
        if self.axes is None or not torch.is_grad_enabled():
            return out
        if axis is None:
            spread = self._spread(out, features)
            out = out.expand(self.count, *out.shape[1 if spread else 0 :])
        if not out.requires_grad:
            out = out + self.anchor
        if self.again:
            return out

        dtype = self.anchor.dtype

        # The graph holds this function: were it to hold the watch, which holds all calls and
        # through them the graph, no collector would ever find the circle.
        def report(slope: Tensor) -> None:
            slope = slope.reshape(shape).to(dtype)
            call.slope = slope.movedim(1, 0) if axis == 1 else slope

        # A view loses its hooks when it is changed in place; what it shows keeps them.
        base, shape = out._base, out.shape
        whole = base is not None and base.numel() == out.numel() and base.is_contiguous()
        (base if base is not None and whole and out.is_contiguous() else out).register_hook(report)
        return out
