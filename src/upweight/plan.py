"""What a run will cost, from a timed probe of two batches, before it runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch

from upweight.curvature import CURVATURES, EKFAC, KFAC, Fit, curvature
from upweight.curvature.kronecker import BATCH_BYTES, FIT_BYTES
from upweight.gradients import layout_of, linear_form, per_example
from upweight.linalg import CG, Cholesky, LiSSA, Spectral
from upweight.methods import Baseline, Method
from upweight.risk import DEFAULT_BATCH, Risk
from upweight.tables import Table

__all__ = ["Plan", "Stage", "make_plan"]

PROBE_ROWS = 2 * DEFAULT_BATCH
TYPICAL_STEPS, PROBE_WIDTH = 10, 16
FIT_PROBES = 32, 96
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
    """

    name: str
    passes: float
    seconds: float
    bytes: float


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

    def table(self) -> Table:
        """One row per stage."""
        columns = {
            "stage": [s.name for s in self.stages],
            "passes": [f"{s.passes:.1f}" for s in self.stages],
            "seconds": [f"{s.seconds:.2f}" for s in self.stages],
            "memory_gib": [f"{s.bytes / GIB:.2f}" for s in self.stages],
        }
        return Table(
            columns,
            f"About {self.seconds:.1f} s ({self.seconds / max(self.floor, 1e-9):.0f} x one forward "
            f"and backward pass); {self.coverage:.1%} of parameters covered.",
        )

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _seconds(work: Callable[[], object]) -> float:
    """Wall time of some work, the least of three after a first."""
    work()
    found = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def _floor(risk: Risk) -> float:
    """Seconds of one forward and backward pass over the data, from at most two batches."""
    rows = min(PROBE_ROWS, len(risk.data))
    batch, share = risk.at(torch.arange(rows, device="cpu"))
    objective = risk.objective

    @torch.enable_grad()
    def work() -> None:
        row = objective.space.row().requires_grad_(True)
        loss = (objective.losses(objective.space.unflatten(row), batch) * share).sum()
        torch.autograd.grad(loss, row)

    return _seconds(work) * len(risk.data) / rows


def _product(risk: Risk, name: str | Fit, queries: int) -> float:
    """Seconds of one curvature product of all queries over the data, from a sample."""
    rows, width = min(PROBE_ROWS, len(risk.data)), min(queries, PROBE_WIDTH)
    sample = curvature(name, Risk(risk.objective, risk.data.take(torch.arange(rows, device="cpu"))))
    block = torch.randn(width, sample.size, dtype=sample.dtype, device=sample.device)
    return _seconds(lambda: sample.apply(block)) * len(risk.data) / rows * queries / width


def _scoring(risk: Risk, queries: int) -> float:
    """Seconds of the products of all queries with every training gradient, from a sample."""
    rows, width = min(PROBE_ROWS, len(risk.data)), min(queries, PROBE_WIDTH)
    batch, _ = risk.at(torch.arange(rows, device="cpu"))
    space = risk.objective.space
    block = torch.randn(width, space.size, dtype=space.dtype, device=space.device)
    gradients = per_example(risk.objective, batch)
    return _seconds(lambda: gradients.dot(block)) * len(risk.data) / rows * queries / width


def _rate(dtype: torch.dtype) -> float:
    """Multiply-adds per second of a dense product."""
    side = 512
    a = torch.randn(side, side, dtype=dtype)
    return side**3 / max(_seconds(lambda: a @ a), 1e-9)


def _solve_stages(risk: Risk, method: Method, queries: int, floor: float) -> list[Stage]:
    space = risk.objective.space
    p, item = space.size, torch.empty(0, dtype=space.dtype).element_size()
    if method.solver is None:
        return []
    if isinstance(method.solver, Spectral):
        return _kronecker_stages(risk, method, queries, floor)
    one = _product(risk, method.curvature, queries)
    if isinstance(method.solver, Cholesky):
        form = linear_form(risk.objective, risk.at(torch.tensor([0], device="cpu"))[0])
        if form is not None and method.curvature in ("hessian", "ggn"):
            width, outputs = p / form.layer.out_features, form.layer.out_features
            dense = (
                len(risk.data) * outputs * (outputs + 1) / 2 * width**2 * 0.625 / _rate(space.dtype)
            )
        else:
            dense = one * p / queries
        factor = p**3 / 3 / _rate(torch.float64)
        return [
            Stage("dense curvature", dense / floor, dense, 8.0 * p * p),
            Stage("factorisation and solve", factor / floor, factor + one, 3 * 8.0 * p * p),
        ]
    steps = TYPICAL_STEPS if isinstance(method.solver, CG) else 1
    if isinstance(method.solver, LiSSA):
        solver = method.solver
        steps = max(1, solver.depth * solver.repeats * solver.batch_size // len(risk.data))
    memory = 6.0 * queries * p * item
    return [Stage(f"solve (about {steps} products)", steps * one / floor, steps * one, memory)]


def _kronecker_stages(risk: Risk, method: Method, queries: int, floor: float) -> list[Stage]:
    """A fit's cost is a line in its rows: what a row costs, and what decomposing costs."""
    space, count = risk.objective.space, len(risk.data)
    few, more = sorted((min(FIT_PROBES[0], count), min(FIT_PROBES[1], count)))
    times = []
    for rows in (few, few, more):  # the first run warms up and proves the layout
        part = Risk(risk.objective, risk.data.take(torch.arange(rows, device="cpu")))
        start = time.perf_counter()
        curvature(method.curvature, part)
        times.append(time.perf_counter() - start)
    slope = max(times[2] - times[1], 0.0) / max(more - few, 1)
    fit = (
        CURVATURES.get(method.curvature) if isinstance(method.curvature, str) else method.curvature
    )
    fitted = fit.fitted(risk) if isinstance(fit, (KFAC, EKFAC)) else count
    seconds = max(times[2] + slope * (fitted - more), times[2])
    row = layout_of(risk.objective, risk.at(torch.tensor([0], device="cpu"))[0]).row_bytes
    kept = min(FIT_BYTES, fitted * row / 2) + min(BATCH_BYTES, fitted * row)
    item = torch.empty(0, dtype=space.dtype).element_size()
    return [
        Stage("Kronecker factors", seconds / floor, seconds, kept + 4.0 * space.size * item),
        Stage("preconditioning", 0.0, 0.0, 2.0 * queries * space.size * item),
    ]


def make_plan(risk: Risk, method: Method | Baseline, queries: int) -> Plan:
    """Estimate passes, seconds and memory of each stage.

    Args:
        risk: objective and training data.
        method: row of the table.
        queries: how many.
    """
    space, floor = risk.objective.space, _floor(risk)
    item = torch.empty(0, dtype=space.dtype).element_size()
    matrix = float(queries * len(risk.data) * item)
    stages = []
    if isinstance(method, Method):
        stages = _solve_stages(risk, method, queries, floor)
    scoring = _scoring(risk, queries) if isinstance(method, Method) else floor
    held = matrix + queries * space.size * item
    stages.append(Stage("scores", scoring / floor, scoring, held))
    return Plan(tuple(stages), space.coverage, floor)
