"""Per-example gradients as outer products: one forward pass, one backward pass of activations.

A layout says which parameters are seen, and is proved before it is used: on a few rows, a random
combination of the captured gradients must equal what autograd gives for it. A parameter that fails
(used by an operation without a rule, or in a way its rule does not cover) is differentiated by
``torch.func`` instead, so every chosen parameter is always covered.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from upweight.data import Batch
from upweight.gradients.autograd import AutogradGradients, open_attention
from upweight.gradients.rules.elementwise import as_outer, matrix_shape
from upweight.gradients.watch import Call, Kind, Use, Watch
from upweight.linalg import Block, BlockGradients, Outer
from upweight.objective import Measure, Objective
from upweight.sources import map_leaves

__all__ = ["Layout", "Observation", "layout_of", "observe"]

PROOF_ROWS = 4
# Wide for float64: many a model does its norms and softmax in float32 whatever it is in.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
LOOSE = 0.05
engine: Any = torch.autograd.Variable._execution_engine


@final
@dataclass(frozen=True)
class Layout:
    """How the chosen parameters of a model are seen.

    Attributes:
        blocks: of the parameter row, each parameter in one.
        axes: where the batch is in the output of each kind of call.
        joined: weights whose bias is a column of their block, with its name.
        general: parameters differentiated by ``torch.func``.
        row_bytes: memory that one example takes while it is looked at.
    """

    blocks: tuple[Block, ...]
    axes: Mapping[Kind, int | None]
    joined: Mapping[str, str]
    general: frozenset[str]
    row_bytes: int = 0

    @property
    def seen(self) -> bool:
        """Whether any parameter is seen without ``torch.func``."""
        return len(self.general) < len(self.blocks) + len(self.joined)

    def names(self, places: Collection[int]) -> frozenset[str]:
        """Parameters of some blocks."""
        weights = {self.blocks[place].name for place in places}
        return frozenset(weights | {b for w, b in self.joined.items() if w in weights})


@final
class Observation:
    """One batch that went through the model under watch.

    Args:
        objective: the model and its parameters.
        layout: how they are seen.
        batch: placed examples.
        places: blocks to look at, all by default; gradients of others are left 0, and the backward
            pass ends at the first one.
    """

    def __init__(
        self,
        objective: Objective,
        layout: Layout,
        batch: Batch,
        places: Collection[int] | None = None,
    ) -> None:
        self.objective, self.layout, self.batch = objective, layout, batch
        space = objective.space
        self.anchor = torch.zeros((), dtype=space.dtype, device=space.device, requires_grad=True)
        asked = layout.names(range(len(layout.blocks)) if places is None else places)
        self.general = layout.general & asked
        seen = {k: p for k, p in space.parameters().items() if k in asked - layout.general}
        watch = Watch(seen, len(batch), layout.axes, self.anchor)
        # Inputs that require gradients would have a graph of their own.
        fixed = replace(batch, inputs=map_leaves(Tensor.detach, batch.inputs))
        with frozen(objective.model), torch.enable_grad(), watch:
            self.outputs = objective.call(fixed)
        self.watch, self.calls = watch, watch.calls

    def gradients(self, measure: Measure = "loss", *, keep: bool = False) -> BlockGradients:
        """Gradients of a measure of each example.

        Args:
            measure: what to differentiate.
            keep: whether another backward pass will follow.
        """
        return self._with_general(self._captured(measure, keep=keep), measure, self.batch)

    def captured(self, measure: Measure = "loss") -> BlockGradients:
        """The same without parameters of the general path, whose gradients are left 0."""
        return self._assembled(self._captured(measure, keep=False))

    def pulled(self, slope: Tensor, *, keep: bool = False) -> BlockGradients:
        """Gradients ``J_iᵀ slope_i`` of each example for slopes in the outputs' shape."""
        terms = self._pull(self.outputs, slope, keep=keep)
        asked = replace(self.batch, targets=slope)
        return self._with_general(terms, lambda a, b: (a * b).reshape(len(a), -1).sum(1), asked)

    def _captured(self, measure: Measure, *, keep: bool) -> dict[str, list[Outer]]:
        with torch.enable_grad():
            asked = self.objective.measured_at(measure)
            total = asked(self.outputs, self.batch.targets).sum()
        return self._pull(total, None, keep=keep)

    def _pull(self, total: Tensor, slope: Tensor | None, *, keep: bool) -> dict[str, list[Outer]]:
        for call in self.calls:
            call.slope = None
        if total.requires_grad:
            # As in the forward pass: activation checkpoints run parts of it again here.
            with frozen(self.objective.model), self.watch.repeat():
                # The engine itself: autograd.grad would switch the watch off meanwhile.
                slope = torch.ones_like(total) if slope is None else slope
                engine.run_backward((total,), (slope,), keep, False, (self.anchor,), True)
        terms: dict[str, list[Outer]] = {}
        columns = set(self.layout.joined.values())
        for call in self.calls:
            for use in call.uses:
                if call.slope is not None and use.name not in columns:
                    outer = _widened(use.factors(call.slope), self.anchor.dtype)
                    joined = use.name in self.layout.joined
                    terms.setdefault(use.name, []).append(replace(outer, ones=joined))
        return terms

    def _with_general(
        self, terms: dict[str, list[Outer]], measure: Measure, batch: Batch
    ) -> BlockGradients:
        objective = self.objective
        if self.general:
            part = objective.of_part([b.name for b in self.layout.blocks if b.name in self.general])
            dense = AutogradGradients(part, batch, measure).dense()
            for name, matrices in part.space.unflatten(dense).items():
                terms[name] = [as_outer(matrices, part.space.shapes[name])]
        return self._assembled(terms)

    def _assembled(self, terms: Mapping[str, list[Outer]]) -> BlockGradients:
        blocks = self.layout.blocks
        merged = [_merged(terms.get(block.name, [])) for block in blocks]
        return BlockGradients(blocks, merged, len(self.batch), self.objective.l2)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires gradients inside: a backward pass makes those of activations only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with open_attention():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def observe(objective: Objective, batch: Batch) -> Observation:
    """Send a batch through the model under watch.

    Example:
        >>> from torch import nn
        >>> objective = Objective(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), "mean_squared_error")
        >>> batch = Batch((torch.ones(4, 3),), torch.zeros(4, 2), torch.arange(4))
        >>> observe(objective, batch).gradients().dense().shape
        torch.Size([4, 8])
    """
    return Observation(objective, layout_of(objective, batch), batch)


def _widened(outer: Outer, dtype: torch.dtype) -> Outer:
    """Factors in the dtype of the parameters: under autocast activations are of a lower one."""
    left = outer.left if outer.indexed else outer.left.to(dtype)
    return replace(outer, left=left, right=outer.right.to(dtype))


def _merged(terms: list[Outer]) -> list[Outer]:
    """Terms of one kind as one, side by side along the positions."""
    if len(terms) < 2:
        return terms
    merged: list[Outer] = []
    for indexed in (True, False):
        some = [term for term in terms if term.indexed == indexed]
        if some:
            left = torch.cat([term.left for term in some], dim=1 if indexed else 2)
            right = torch.cat([term.right for term in some], dim=2)
            merged.append(Outer(left, right, some[0].ones))
    return merged


_LAYOUTS: WeakKeyDictionary[Objective, Layout] = WeakKeyDictionary()


def layout_of(objective: Objective, batch: Batch) -> Layout:
    """The layout of an objective, made and proved on rows of a first batch, then kept."""
    known = _LAYOUTS.get(objective)
    if known is None:
        # Rules are right or wrong in any precision, and sharply so in the parameters' own.
        known = _LAYOUTS[objective] = _proved(objective.in_full_precision(), batch)
    return known


def _proved(objective: Objective, batch: Batch) -> Layout:
    everything = _assembled(objective, {}, {}, frozenset(objective.space.shapes), {})
    rows = torch.linspace(0, len(batch) - 1, PROOF_ROWS).long()
    some = _gather(batch, rows)
    try:
        routed = frozenset(_axes(objective, batch, frozenset())[1])
        axes, _ = _axes(objective, batch, routed)
        trial = Observation(objective, replace(everything, axes=axes, general=routed), some)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError):
        return everything
    uses, wrong = _agreeing(trial.calls)
    joined = _joined(objective, trial.calls, uses)
    layout = _assembled(objective, uses, joined, routed, axes)
    # A gradient of 0 proves nothing of what no rule has seen.
    unseen = set(objective.space.shapes) - set(uses) - set(joined.values())
    wrong |= routed | unseen | _disproved(objective, layout, some)
    if wrong:
        axes, _ = _axes(objective, batch, wrong)
        joined = {w: b for w, b in joined.items() if not {w, b} & wrong}
        kept = {name: use for name, use in uses.items() if name not in wrong}
        layout = _assembled(objective, kept, joined, frozenset(wrong), axes)
    return replace(layout, row_bytes=_row_bytes(objective, layout, some))


def _gather(batch: Batch, rows: Tensor) -> Batch:
    inputs, targets = (
        map_leaves(lambda x: x[rows.to(x.device)], t) for t in (batch.inputs, batch.targets)
    )
    return Batch(inputs, targets, batch.positions[rows])


def _axes(
    objective: Objective, batch: Batch, without: Set[str]
) -> tuple[dict[Kind, int | None], set[str]]:
    """Where the batch is in each kind of call's output: the axis that grows with it.

    And the parameters used on rows that the data choose.
    """
    calls, routed = [], set()
    seen = {k: p for k, p in objective.space.parameters().items() if k not in without}
    for count in (2, 3):
        repeated = _gather(batch, torch.zeros(count, dtype=torch.long))
        watch = Watch(seen, count, None, objective.l2)
        with torch.no_grad(), open_attention(), watch:
            objective.call(repeated)
        calls.append(watch.calls)
        routed |= watch.routed
    axes: dict[Kind, int | None] = {}
    for two, three in zip(*calls, strict=True):
        axis = _grown(two.shape, three.shape)
        if axes.setdefault(two.kind, axis) != axis:
            routed |= {use.name for use in two.uses}
    return axes, routed


def _grown(two: torch.Size, three: torch.Size) -> int | None:
    found = [k for k, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    return found[0] if found else None


def _agreeing(calls: Sequence[Call]) -> tuple[dict[str, Use], set[str]]:
    """One use of each parameter, and those that are seen as different matrices."""
    uses: dict[str, Use] = {}
    odd = set()
    for call in calls:
        for use in call.uses:
            first = uses.setdefault(use.name, use)
            if (first.shape, first.transposed) != (use.shape, use.transposed):
                odd.add(use.name)
    return {name: use for name, use in uses.items() if name not in odd}, odd


def _joined(objective: Objective, calls: Sequence[Call], uses: Mapping[str, Use]) -> dict[str, str]:
    """Weights whose bias is theirs alone, in every call, under one L2."""
    blocks = objective.space.unflatten(objective.l2)
    pairs = {w: use.bias for w, use in uses.items() if use.bias is not None}
    for call in calls:
        names = {use.name for use in call.uses}
        for weight, bias in list(pairs.items()):
            if len(names & {weight, bias}) == 1:
                del pairs[weight]
    return {
        weight: bias
        for weight, bias in pairs.items()
        if bias is not None
        and list(pairs.values()).count(bias) == 1
        and float(blocks[weight].flatten()[0]) == float(blocks[bias].flatten()[0])
    }


def _assembled(
    objective: Objective,
    uses: Mapping[str, Use],
    joined: Mapping[str, str],
    general: frozenset[str],
    axes: Mapping[Kind, int | None],
) -> Layout:
    """Blocks in the order of the parameter row; what is not used and not general has none."""
    shapes = objective.space.shapes
    starts, at = {}, 0
    for name, shape in shapes.items():
        starts[name] = at
        at += shape.numel()
    blocks = []
    for name, shape in shapes.items():
        if name in joined.values():
            continue
        use = uses.get(name)
        g, o, i = matrix_shape(shape) if use is None else use.shape
        bias = joined.get(name)
        blocks.append(
            Block(
                name, g, o, i + (bias is not None), starts[name],
                None if bias is None else starts[bias],
                use is not None and use.transposed,
            )
        )  # fmt: skip
    return Layout(tuple(blocks), dict(axes), dict(joined), general)


def _disproved(objective: Objective, layout: Layout, some: Batch) -> set[str]:
    """Parameters whose captured gradients, randomly combined, are not autograd's."""
    generator = torch.Generator().manual_seed(0)
    dtype, device = objective.space.dtype, objective.space.device
    weights = torch.rand(2, len(some), generator=generator, dtype=torch.float64) + 0.5
    # Losses of different size tell even equal rows apart, as those of a batch of one.
    scales, weights = weights.to(device, dtype)

    def scaled(outputs: Any, targets: Any) -> Tensor:
        losses: Tensor = objective.loss(outputs, targets) * scales
        return losses

    with torch.enable_grad(), open_attention():
        losses = scaled(objective.call(some), some.targets)
        slopes = torch.autograd.grad(
            (losses * weights).sum(), list(objective.space.parameters().values()), allow_unused=True
        )
    try:
        found = Observation(objective, layout, some).captured(scaled).combine(weights[None])
    except (RuntimeError, ValueError, AssertionError):
        return set(objective.space.shapes)
    blocks = objective.space.unflatten(found[0].detach())
    wrong = set()
    tolerance = TOLERANCE.get(dtype, LOOSE)
    scale = max((float(s.norm()) for s in slopes if s is not None), default=0.0)
    for (name, captured), slope in zip(blocks.items(), slopes, strict=True):
        wanted = torch.zeros_like(captured) if slope is None else slope
        gap = float((captured - wanted).norm())
        if not gap <= tolerance * max(float(wanted.norm()), 1e-3 * scale) or slope is None:
            wrong.add(name)
    return wrong


def _row_bytes(objective: Objective, layout: Layout, some: Batch) -> int:
    """Memory of one example: its factors, as much again for the graph, general gradients twice."""
    factors = Observation(objective, layout, some).captured().bytes() // len(some)
    general = sum(objective.space.shapes[name].numel() for name in layout.general)
    return 2 * (factors + objective.l2.element_size() * general)
