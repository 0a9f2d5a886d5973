"""Plans from trials: two batches are timed and counted as in the run, and the line is drawn."""

import math
from dataclasses import replace
from functools import cached_property, partial
from typing import Protocol, final, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight import baselines
from upweight.budget import budget
from upweight.curvature import CURVATURES, LinearCurvature, curvature
from upweight.data import Data
from upweight.engine import Job, Rescale, query_gradients, score
from upweight.errors import IndefiniteError
from upweight.gradients import (
    Compression,
    TrainingGradients,
    batch_rows,
    linear_form,
    per_example,
    risk_layout,
)
from upweight.linalg import (
    Cost,
    Inverse,
    Load,
    MeanOperator,
    Operator,
    RowValues,
    Solution,
    Status,
)
from upweight.methods import Baseline, Method
from upweight.plan.plan import Plan, Stage
from upweight.prepared import Prepared
from upweight.probes import elapsed, peak_bytes, seconds
from upweight.risk import DEFAULT_BATCH, Risk
from upweight.sinks import MatrixSink

__all__ = ["make_plan"]

PROBE_ROWS = 2 * DEFAULT_BATCH
PROBE_WIDTH, PROBE_QUERIES, FEW = 16, 128, 8
BLOCK = 64  # rows that are multiplied together
# Allocators and libraries hold more than the tensors: measured on the tasks of benchmarks/.
RESIDENT, LIBRARIES = 1.3, 16 * 2**20
# oneDNN keeps workspaces of convolutions that no tensor shows.
WORKSPACES = 64 * 2**20
CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}


@runtime_checkable
class _Fitted(Protocol):
    """A curvature that is fitted in passes over the data, as a part of the data shows."""

    def fitted(self, risk: Risk) -> int:
        """How many of the examples it is fitted on."""

    def batch(self, risk: Risk) -> int:
        """How many of them it looks at together."""

    def kept(self, risk: Risk) -> int:
        """Bytes that it keeps for a second pass."""

    def trial(self, risk: Risk, rows: int) -> Operator:
        """A fit to a few of the examples."""


@final
class _Counter(Inverse):
    """Stands for an inverse that is not there yet, and counts the rows that it is asked for."""

    def __init__(self, like: Operator) -> None:
        self.size, self.dtype, self.device = like.size, like.dtype, like.device
        self.rows, self.most = 0, 0

    def _count(self, rows: Tensor) -> None:
        self.rows, self.most = self.rows + len(rows), max(self.most, len(rows))

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """The rows themselves."""
        self._count(rows)
        return Solution(rows, rows.new_zeros(len(rows)), (Status.CONVERGED,) * len(rows))

    def quadratic(self, rows: Tensor) -> Tensor:
        """Their squared lengths."""
        self._count(rows)
        return rows.square().sum(1)


def _part(risk: Risk, rows: int) -> Risk:
    """The risk over the first examples."""
    rows = min(rows, len(risk.data))
    return Risk(risk.objective, risk.data.take(torch.arange(rows, device="cpu")))


def _floor(risk: Risk) -> float:
    """Seconds of one forward and backward pass over the data, from at most two batches."""
    rows = min(PROBE_ROWS, len(risk.data), 2 * batch_rows(risk))
    batch, share = risk.at(torch.arange(rows, device="cpu"))
    objective = risk.objective

    @torch.enable_grad()
    def work() -> None:
        row = objective.space.row().requires_grad_(True)
        loss = (objective.losses(objective.space.unflatten(row), batch) * share).sum()
        torch.autograd.grad(loss, row)

    return seconds(work) * len(risk.data) / rows


def _rate(dtype: torch.dtype) -> float:
    """Multiply-adds per second of a dense product."""
    side = 512
    a = torch.randn(side, side, dtype=dtype)
    return side**3 / max(seconds(lambda: a @ a), 1e-9)


@final
class _Estimate:
    """The stages of one method for some queries.

    Args:
        made: what will be asked.
        queries: of whom.
    """

    def __init__(self, made: Prepared, queries: Data) -> None:
        self.made, self.risk, self.asked = made, made.risk, queries
        self.queries, self.space = len(queries), made.objective.space
        self.item = self.space.dtype.itemsize
        self.load = Load(self.space.size, self.queries, len(self.risk.data), self.item)
        self.floor = _floor(self.risk)
        self.matrix = float(self.queries * len(self.risk.data) * self.item)
        self.whole, self.notes = True, list[str]()
        self.compression: Compression | None = None

    def resident(self, tensors: float) -> float:
        """What a process holds when its tensors take so many bytes."""
        one, _ = self.risk.rows(0, 1)
        convolves = linear_form(self.risk.objective, one) is None and any(
            kind[0] in CONVOLUTIONS for kind in risk_layout(self.risk).axes
        )
        return RESIDENT * tensors + LIBRARIES + (WORKSPACES if convolves else 0)

    def stage(self, name: str, spent: float, held: float, disk: float = 0.0) -> Stage:
        """A stage of some seconds and bytes."""
        return Stage(name, spent / self.floor, spent, held, disk)

    def stages(self) -> list[Stage]:
        """All of them, in order."""
        method = self.made.method
        if isinstance(method, Baseline):
            return [self.similarities(method)]
        fitting, operator = self.fitting(method)
        solver = method.solver
        self.compression = method.compression and method.compression(operator)
        if solver is None:
            inverse = method.invert(operator, self.made.shift)
            return [self.scores(self.directions(), method, inverse)]
        cost = solver.cost(self.load)
        if cost == Cost():
            inverse = self.inverted(method, operator)
            turning, rows = self.preconditioning(inverse)
            return [*fitting, turning, self.scores(rows, method, inverse)]
        counter = _Counter(operator)
        scores = self.scores(self.directions(), method, counter)
        if cost is None:
            name = f"solve ({type(solver).__name__} does not say what it takes)"
            return [*fitting, Stage(name, math.nan, math.nan, math.nan), scores]
        solving = self.solving(method, operator, cost)
        return [*fitting, *solving, *self.weighing(method, operator, counter), scores]

    def inverted(self, method: Method, operator: Operator) -> Inverse:
        """The inverse of a trial's curvature, which may lack what all of the data determine."""
        if not method.fits:
            return method.invert(operator, self.made.shift)
        shift = self.made.resolved(operator)
        try:
            return method.invert(operator, shift)
        except IndefiniteError as error:
            mean = operator.trace() / operator.size
            if self.whole or not mean > 0:
                raise
            self.notes.append(f"on the part of the data that was tried: {error}")
            return method.invert(operator, shift + mean)

    @cached_property
    def part(self) -> Risk:
        """The first examples."""
        return _part(self.risk, PROBE_ROWS)

    def fitting(self, method: Method) -> tuple[list[Stage], Operator]:
        """What fitting the curvature takes, and the curvature of a part of the data."""
        if method.solver is None:
            return [], method.fit(self.risk)
        name = method.curvature
        fit: object = CURVATURES.get(name) if isinstance(name, str) else name
        if isinstance(fit, _Fitted):
            return self.trial(fit)
        return [], curvature(name, self.part)

    def trial(self, fit: _Fitted) -> tuple[list[Stage], Operator]:
        """Fits to one and to two batches tell what a batch costs and what it leaves behind."""
        risk = self.risk
        size, fitted = fit.batch(risk), fit.fitted(risk)
        few, more = min(size, fitted), min(2 * size, fitted)
        self.whole = more == fitted
        operator = fit.trial(risk, few)  # warms up and proves the layout
        spent, tensors = [], []
        for rows in (few, more):
            took, operator = elapsed(partial(fit.trial, risk, rows))
            spent.append(took)
            tensors.append(peak_bytes(partial(fit.trial, risk, rows))[0])
        steps = (fitted - more) / max(more - few, 1)
        whole = spent[1] + max(spent[1] - spent[0], 0.0) * steps
        rest = 1 - more / fitted  # what the trial kept is counted already
        held = self.resident(max(tensors) + fit.kept(risk) * rest)
        disk = 4.0 * self.space.size * self.item
        return [self.stage("fitting the curvature", whole, held, disk)], operator

    def preconditioning(self, inverse: Inverse) -> tuple[Stage, Tensor | RowValues]:
        """Solving without products, timed as it is, and rows that it gave."""
        took, rows = elapsed(partial(self.preconditioned, inverse))
        wide = self.queries / len(rows)
        tensors, _ = peak_bytes(partial(self.preconditioned, inverse))
        held = self.resident(tensors * max(1.0, wide) + 3.0 * self.space.size * self.item)
        return self.stage("preconditioning", took * wide, held), rows

    def preconditioned(self, inverse: Inverse) -> Tensor | RowValues:
        """Training examples as if they were queries."""
        some = _part(self.risk, min(self.queries, PROBE_QUERIES))
        return inverse.precondition(query_gradients(some.objective, some.data, "loss")).value

    def directions(self) -> Tensor:
        """Random rows of parameters, as many as queries or as a probe needs."""
        count = min(self.queries, PROBE_WIDTH)
        like = self.risk.objective.l2
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, self.space.size, generator=generator).to(like)

    def solving(self, method: Method, operator: Operator, cost: Cost) -> list[Stage]:
        """Making the inverse and solving with it, by products or by a matrix of the curvature."""
        spent = cost.products * self.product(operator, self.queries) + cost.passes * self.floor
        if cost.single:
            spent += cost.single * self.product(operator, 1)
        if cost.steps and isinstance(operator, MeanOperator):
            spent += cost.steps * self.step(operator, cost.drawn)
        if not cost.matrix:
            spent += cost.operations / _rate(self.space.dtype) if cost.operations else 0.0
            held = self.resident(self.multiplying(method) + cost.bytes)
            without = f", without {cost.without}" if cost.without else ""
            count = cost.products + cost.single + cost.steps * cost.drawn / self.load.examples
            name = f"solve (about {count:.0f} products{without})"
            return [self.stage(name, spent, held)]
        p, low = self.space.size, self.item < 8
        spent += cost.operations / _rate(torch.float64)
        held = p * p * (8.0 + (self.item if low else 0)) + LIBRARIES
        return [
            self.stage("dense curvature", self.dense(operator), held),
            self.stage("factorisation and solve", spent, cost.bytes + LIBRARIES),
        ]

    def product(self, operator: Operator, rows: float) -> float:
        """Seconds of products of so many rows with the curvature, a block of them at a time.

        What a pass takes for itself and for each row shows in products of one row and of some, over
        a part of the data where the curvature is a mean over them.
        """
        width = max(1, min(math.ceil(rows), PROBE_WIDTH))
        block = torch.randn(width, operator.size, dtype=operator.dtype, device=operator.device)
        one, some = (seconds(partial(operator.apply, block[:m])) for m in (1, width))
        each = max(some - one, 0.0) / max(width - 1, 1)
        summed = isinstance(operator, MeanOperator)
        scale = len(self.risk.data) / len(self.part.data) if summed else 1.0
        return scale * (math.ceil(rows / BLOCK) * max(one - each, 0.0) + rows * each)

    def step(self, operator: MeanOperator, drawn: int) -> float:
        """Seconds of a product of all rows with a few examples' part, mostly its own start."""
        rows = self.directions()[None]
        positions = torch.zeros(1, drawn, dtype=torch.long, device="cpu")
        took = seconds(partial(operator.apply_sampled, rows, positions))
        return took * max(1.0, self.queries / rows.shape[1])

    def dense(self, operator: Operator) -> float:
        """Seconds of a curvature's matrix: in closed form, or by its product with the identity."""
        p = self.space.size
        if not isinstance(operator, LinearCurvature):
            return self.product(operator, p)
        form = operator.form
        width, rows = p / form.outputs, len(self.risk.data) * form.shape.numel()
        pairs = form.outputs * (form.outputs + 1) / 2
        return float(rows * pairs * width**2 * 0.625 / _rate(self.space.dtype))

    def multiplying(self, method: Method) -> float:
        """Bytes of tensors in a product."""
        operator = curvature(method.curvature, _part(self.risk, 2 * PROBE_ROWS))
        return float(peak_bytes(lambda: operator.apply(self.directions()))[0])

    def weighing(self, method: Method, operator: Operator, counter: _Counter) -> list[Stage]:
        """Solves for factors on training gradients, beside those of the queries."""
        if method.rescale is None or method.solver is None:
            return []
        part = _part(self.risk, batch_rows(self.risk))
        rescale = method.rescale(counter, part)
        counter.rows = counter.most = 0
        self.scored(part, self.directions()[:1], rescale)
        rows = counter.rows * len(self.risk.data) / len(part.data)
        whole, some, none = (
            method.solver.cost(replace(self.load, rows=m)) for m in (round(rows), counter.most, 0)
        )
        if not rows or whole is None or some is None or none is None:
            return []
        own = (whole.operations - none.operations) / _rate(self.space.dtype)
        spent = whole.products * self.product(operator, rows) + own
        held = self.resident(self.multiplying(method) + some.bytes)
        return [self.stage(f"factors of training gradients ({rows:,.0f} solves)", spent, held)]

    def scored(self, part: Risk, rows: Tensor | RowValues, rescale: Rescale | None = None) -> None:
        """Score a part of the data as all of it will be."""
        sink = MatrixSink(len(rows), len(part.data), self.space.dtype)
        score(self.training(part), [Job(rows, sink, rescale)])

    def training(self, part: Risk) -> TrainingGradients:
        """Gradients of a part of the data, as those of all of it will be looked at."""
        return TrainingGradients(part, compression=self.compression)

    def scores(self, rows: Tensor | RowValues, method: Method, inverse: Inverse) -> Stage:
        """The pass over the training data, from one batch of it."""
        part = _part(self.risk, batch_rows(self.risk))
        count, wide = len(part.data), self.queries / len(rows)
        plain = partial(self.scored, part, rows)
        tensors = peak_bytes(plain)[0] * max(wide, 1.0)
        looking = seconds(lambda: list(self.training(part).each(lambda seen: None, "looking")))
        whole = max(seconds(plain), looking)
        spent = looking + (whole - looking) * wide
        if method.rescale is not None:
            weighed = partial(plain, method.rescale(inverse, part))
            tensors = max(tensors, peak_bytes(weighed)[0])
            spent += max(seconds(weighed) - whole, 0.0)
        row = self.row_bytes(part)
        whole_set, rest = row * len(self.risk.data), row * (len(self.risk.data) - count)
        stays = rest if whole_set <= budget() // 4 else 0.0
        asked = (rows.nbytes if isinstance(rows, Tensor) else rows.bytes()) * max(wide, 1.0)
        held = self.resident(tensors + asked + stays) + self.matrix
        stored = self.matrix + (whole_set if self.made.keeps_gradients else 0.0)
        return self.stage("scores", spent * len(self.risk.data) / count, held, stored)

    def row_bytes(self, part: Risk) -> float:
        """Bytes that are kept of an example's gradient."""
        if self.compression is None:
            if self.made.keeps_gradients:
                _ = self.made.training  # refuses what cannot be kept
            return risk_layout(part).row_bytes / 2
        few, _ = part.rows(0, min(FEW, len(part.data)))
        kept = self.compression.compress(per_example(part.objective, few))
        return kept.bytes() / len(few)

    def similarities(self, baseline: Baseline) -> Stage:
        """What a baseline says of one and of two batches tells what all of the data cost."""
        objective, data = self.made.objective, self.risk.data
        asked = self.asked.take(torch.arange(min(self.queries, PROBE_QUERIES), device="cpu"))
        size = batch_rows(self.risk)
        few, more = min(size, len(data)), min(2 * size, len(data))
        spent, tensors = [], 0
        for rows in (few, more):
            part = _part(self.risk, rows)
            work = partial(baselines.compare, baseline, part, asked, objective.measure)
            spent.append(seconds(work))
            tensors = peak_bytes(work)[0]
        each = max(spent[1] - spent[0], 0.0) / max(more - few, 1)
        whole = spent[1] + each * (len(data) - more)
        held = self.resident(tensors) + self.matrix
        return self.stage("similarities", whole * self.queries / len(asked), held, self.matrix)


def make_plan(made: Prepared, queries: Data) -> Plan:
    """Estimate passes, seconds, memory and disk of each stage.

    Args:
        made: what will be asked.
        queries: of whom.

    Raises:
        InputError: whatever would stop the run before it solves.
    """
    estimate = _Estimate(made, queries)
    stages, coverage = tuple(estimate.stages()), made.objective.space.coverage
    return Plan(stages, coverage, estimate.floor, tuple(estimate.notes))
