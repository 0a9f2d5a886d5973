"""What a run will cost, from a timed probe of two batches, before it runs."""

import time
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.budget import budget
from upweight.curvature import Fit, curvature, kronecker_fit
from upweight.engine import Job, score
from upweight.gradients import (
    TrainingGradients,
    batch_rows,
    linear_form,
    per_example,
    risk_layout,
)
from upweight.keepers import DirectoryKeeper
from upweight.linalg import CG, BlockRows, Cholesky, Inverse, Spectral
from upweight.methods import Baseline, Method
from upweight.prepared import Prepared
from upweight.probes import peak_bytes, seconds
from upweight.risk import DEFAULT_BATCH, Risk
from upweight.sinks import MatrixSink
from upweight.solvers import LiSSA
from upweight.tables import Table

__all__ = ["Plan", "Stage", "make_plan"]

PROBE_ROWS = 2 * DEFAULT_BATCH
TYPICAL_STEPS, PROBE_WIDTH, PROBE_QUERIES = 10, 16, 128
# Allocators and libraries hold more than the tensors: measured on the tasks of benchmarks/.
RESIDENT, LIBRARIES = 1.5, 16 * 2**20
# oneDNN keeps workspaces of convolutions that no tensor shows.
WORKSPACES = 64 * 2**20
CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
GIB = 2**30


@final
@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Attributes:
        name: what is done.
        passes: forward and backward passes over the training data that it amounts to.
        seconds: estimated wall time.
        bytes: estimated peak memory on top of model and data.
        disk: bytes that are written if its results are stored.
    """

    name: str
    passes: float
    seconds: float
    bytes: float
    disk: float = 0.0


@final
@dataclass(frozen=True)
class Plan:
    """Estimated cost of explaining some queries.

    Attributes:
        stages: in order.
        coverage: share of the model's parameters that the scores see.
        floor: seconds of one forward and backward pass over the training data.
    """

    stages: tuple[Stage, ...]
    coverage: float
    floor: float

    @property
    def seconds(self) -> float:
        """Estimated wall time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def bytes(self) -> float:
        """Estimated peak memory on top of model and data."""
        return max(stage.bytes for stage in self.stages)

    def table(self) -> Table:
        """One row per stage."""
        columns = {
            "stage": [s.name for s in self.stages],
            "passes": [f"{s.passes:.1f}" for s in self.stages],
            "seconds": [f"{s.seconds:.2f}" for s in self.stages],
            "memory_gib": [f"{s.bytes / GIB:.2f}" for s in self.stages],
            "disk_gib": [f"{s.disk / GIB:.2f}" for s in self.stages],
        }
        return Table(
            columns,
            f"About {self.seconds:.1f} s ({self.seconds / max(self.floor, 1e-9):.0f} x one forward "
            f"and backward pass), {self.bytes / GIB:.2f} GiB at the peak; {self.coverage:.1%} of "
            "parameters covered. Disk: if results are stored.",
        )

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


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


def _product(risk: Risk, name: str | Fit, queries: int) -> float:
    """Seconds of one curvature product of all queries over the data, from a sample."""
    width = min(queries, PROBE_WIDTH)
    part = _part(risk, PROBE_ROWS)
    sample = curvature(name, part)
    block = torch.randn(width, sample.size, dtype=sample.dtype, device=sample.device)
    scale = len(risk.data) / len(part.data) * queries / width
    return seconds(lambda: sample.apply(block)) * scale


def _rate(dtype: torch.dtype) -> float:
    """Multiply-adds per second of a dense product."""
    side = 512
    a = torch.randn(side, side, dtype=dtype)
    return side**3 / max(seconds(lambda: a @ a), 1e-9)


@final
class _Estimate:
    """The stages of one method for so many queries.

    Args:
        made: what will be asked.
        queries: how many.
    """

    def __init__(self, made: Prepared, queries: int) -> None:
        self.made, self.risk, self.queries = made, made.risk, queries
        self.space = made.objective.space
        self.item = self.space.dtype.itemsize
        self.floor = _floor(self.risk)
        self.matrix = float(queries * len(self.risk.data) * self.item)

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
            return [self.stage("similarities", self.floor, self.matrix, self.matrix)]
        if isinstance(method.solver, Spectral):
            return self.kronecker(method)
        return [*self.solve(method), self.scores(self.directions())]

    def solve(self, method: Method) -> list[Stage]:
        """Making the curvature and solving with it, by direct or iterative solvers."""
        p = self.space.size
        if method.solver is None or not method.fits:
            return []
        one = _product(self.risk, method.curvature, self.queries)
        if isinstance(method.solver, Cholesky):
            factor = p**3 / 3 / _rate(torch.float64)
            dense = self.dense(method, one)
            held = (p * p * (self.item if self.item < 8 else 0)) + 8.0 * p * p + LIBRARIES
            return [
                self.stage("dense curvature", dense, held),
                self.stage("factorisation and solve", factor + one, 2 * 8.0 * p * p + LIBRARIES),
            ]
        steps = TYPICAL_STEPS if isinstance(method.solver, CG) else 1
        if isinstance(method.solver, LiSSA):
            solver = method.solver
            drawn = solver.depth * solver.repeats * solver.batch_size
            steps = max(1, drawn // len(self.risk.data))
        held = self.iterating(method)
        return [self.stage(f"solve (about {steps} products)", steps * one, held)]

    def dense(self, method: Method, product: float) -> float:
        """Seconds of a curvature's matrix: in closed form, or by its product with the identity."""
        p, risk = self.space.size, self.risk
        form = linear_form(risk.objective, risk.at(torch.tensor([0], device="cpu"))[0])
        if form is None or method.curvature not in ("hessian", "ggn"):
            return product * p / self.queries
        width, outputs = p / form.layer.out_features, form.layer.out_features
        pairs = outputs * (outputs + 1) / 2
        return float(len(risk.data) * pairs * width**2 * 0.625 / _rate(self.space.dtype))

    def iterating(self, method: Method) -> float:
        """Bytes of an iterative solve: those of a product, and of the rows it carries."""
        operator = curvature(method.curvature, _part(self.risk, 2 * PROBE_ROWS))
        tensors, _ = peak_bytes(lambda: operator.apply(self.directions()))
        return self.resident(tensors + 5.0 * self.queries * self.space.size * self.item)

    def kronecker(self, method: Method) -> list[Stage]:
        """Fits to one and to two batches tell what a batch costs and what it leaves behind."""
        fit, risk = kronecker_fit(method.curvature), self.risk
        size, fitted = fit.batch(risk), fit.fitted(risk)
        few, more = min(size, fitted), min(2 * size, fitted)
        fit.trial(risk, few)  # warms up and proves the layout
        spent, tensors = [], []
        for rows in (few, more):
            start = time.perf_counter()
            operator = fit.trial(risk, rows)
            spent.append(time.perf_counter() - start)
            tensors.append(peak_bytes(partial(fit.trial, risk, rows))[0])
        steps = (fitted - more) / max(more - few, 1)
        whole = spent[1] + max(spent[1] - spent[0], 0.0) * steps
        rest = 1 - more / fitted  # what the trial kept is counted already
        held = self.resident(max(tensors) + fit.kept(risk) * rest)
        p = self.space.size * self.item
        inverse = method.invert(operator, self.made.resolved(operator))
        start = time.perf_counter()
        some = self.preconditioned(inverse)
        turning = (time.perf_counter() - start) * self.queries / len(some)
        bytes_of, _ = peak_bytes(partial(self.preconditioned, inverse))
        turned = self.resident(bytes_of * max(1.0, self.queries / len(some)) + 3.0 * p)
        return [
            self.stage("Kronecker factors", whole, held, 4.0 * p),
            self.stage("preconditioning", turning, turned),
            self.scores(some),
        ]

    def preconditioned(self, inverse: Inverse) -> Tensor | BlockRows:
        """Training examples as if they were queries."""
        count = min(self.queries, PROBE_QUERIES, len(self.risk.data))
        batch, _ = self.risk.rows(0, count)
        return inverse.precondition(per_example(self.risk.objective, batch)).value

    def directions(self) -> Tensor:
        """Random rows of parameters, as many as queries or as a probe needs."""
        count = min(self.queries, PROBE_WIDTH)
        like = self.risk.objective.l2
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, self.space.size, generator=generator).to(like)

    def scores(self, rows: Tensor | BlockRows) -> Stage:
        """The pass over the training data, from one batch of it."""
        part = _part(self.risk, batch_rows(self.risk))
        count = len(part.data)

        def work() -> None:
            sink = MatrixSink(len(rows), count, self.space.dtype)
            score(TrainingGradients(part), [Job(rows, sink)])

        tensors, _ = peak_bytes(work)
        wide = self.queries / len(rows)
        looking = seconds(lambda: [per_example(part.objective, b) for b, _ in part.batches(count)])
        whole = max(seconds(work), looking)
        spent = (looking + (whole - looking) * wide) * len(self.risk.data) / count
        row = risk_layout(part).row_bytes / 2
        whole_set, rest = row * len(self.risk.data), row * (len(self.risk.data) - count)
        stays = rest if whole_set <= budget() // 4 else 0.0
        held = self.resident(tensors * max(wide, 1.0) + stays) + self.matrix
        on_disk = isinstance(self.made.training.keeper, DirectoryKeeper)
        stored = self.matrix + (whole_set if on_disk else 0.0)
        return self.stage("scores", spent, held, stored)


def make_plan(made: Prepared, queries: int) -> Plan:
    """Estimate passes, seconds, memory and disk of each stage.

    Args:
        made: what will be asked.
        queries: how many.
    """
    estimate = _Estimate(made, queries)
    return Plan(tuple(estimate.stages()), made.objective.space.coverage, estimate.floor)
