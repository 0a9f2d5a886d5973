"""Reference scores of a network: its Gauss-Newton matrix solved to a measured residual.

    python -m benchmarks.reference TASK [--minutes 20]      # go on where it was left

Every step multiplies the exact matrix, in torch alone, with a direction per query, and takes the
combination of all directions of all queries that leaves the least residual (block GMRES, right
preconditioned). The preconditioner is upweight's ``Leading``: it decides how many steps are needed
and nothing else, as the residual is measured with the exact matrix. The state is kept in scratch,
so that a run that was stopped goes on, and the residual that was reached is kept beside the scores.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.datasets import scratch

__all__ = ["Flat", "GaussNewton", "Krylov", "Plan", "gradients", "guess", "run", "scores"]

Map = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class Plan:
    """How a reference is computed.

    Attributes:
        dtype: of the network and the vectors.
        batch: examples at once.
        together: vectors at once in a product; 1 where batching them is slow.
        tolerance: residual over right side, in norms; the largest over the queries.
        minutes: of one run, in CPU time.
    """

    dtype: torch.dtype = torch.float64
    batch: int = 500
    together: int = 10
    tolerance: float = 1e-3
    minutes: float = 15.0


@final
class Flat:
    """The network as a function of one parameter vector."""

    def __init__(self, problem: Any, dtype: torch.dtype) -> None:
        self._model = problem.model(dtype)
        self._fixed = dict(self._model.named_buffers())
        named = dict(self._model.named_parameters())
        self._shapes = {name: p.shape for name, p in named.items()}
        self.theta = torch.cat([p.detach().flatten() for p in named.values()])

    def __call__(self, theta: Tensor, inputs: Tensor) -> Tensor:
        """Outputs for a batch."""
        parts = theta.split([shape.numel() for shape in self._shapes.values()])
        named = {
            name: part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
        outputs: Tensor = functional_call(self._model, {**named, **self._fixed}, (inputs,))
        return outputs


@final
class GaussNewton:
    """(1/n) Σ_i J_iᵀ H_i J_i + λ, times the columns of a matrix ``[p, k]``.

    H_i is the curvature of an example's mean cross-entropy in its outputs, λ the score's damping.
    """

    def __init__(self, problem: Any, plan: Plan) -> None:
        self._problem = problem.to(plan.dtype)
        self._flat = Flat(self._problem, plan.dtype)
        self._plan = plan

    def __call__(self, columns: Tensor) -> Tensor:
        """One pass over the examples for all columns."""
        total = self._problem.damping * columns
        for inputs, _ in self._problem.batches(self._plan.batch):
            with sdpa_kernel(SDPBackend.MATH):  # the only one with a forward derivative
                total += self._part(inputs, columns)
        return total

    def _part(self, inputs: Tensor, columns: Tensor) -> Tensor:
        theta, flat = self._flat.theta, self._flat
        outputs, back = vjp(lambda t: flat(t, inputs), theta)
        p = torch.softmax(outputs, -1)
        rows = outputs[..., 0].numel() / len(outputs) * len(self._problem.inputs)

        def product(vector: Tensor) -> Tensor:
            moved = jvp(lambda t: flat(t, inputs), (theta,), (vector,))[1]
            bent = p * moved
            bent = bent - p * bent.sum(-1, keepdim=True)
            result: Tensor = back(bent / rows)[0]
            return result

        if self._plan.together == 1:
            return torch.stack([product(v) for v in columns.T], 1)
        return vmap(product, in_dims=1, out_dims=1, chunk_size=self._plan.together)(columns)


def guess(problem: Any, queries: int) -> Map:
    """Times columns, something near the inverse of the matrix."""
    # Here, because the environments of the peers import this file and have no upweight.
    from upweight import Data, Objective  # noqa: PLC0415
    from upweight.curvature import GaussNewton as Matrix  # noqa: PLC0415
    from upweight.curvature import Leading  # noqa: PLC0415
    from upweight.risk import Risk  # noqa: PLC0415

    objective = Objective(problem.model(), "cross_entropy", l2=problem.damping)
    matrix = Matrix(Risk(objective, Data.of((problem.inputs, problem.labels))))
    found = Leading()(matrix, queries)
    assert found is not None, "the L2 is positive"
    return lambda columns: found.apply(columns.T).T.contiguous()


@final
@dataclass
class Krylov:
    """The columns X that leave the least ‖B − A X‖, from the directions so far.

    Attributes:
        right: B ``[p, k]``.
        solved: X.
        gap: B − A X, by recursion.
        directions: Z, a block ``[p, k]`` per step.
        images: A Z, orthonormal.
    """

    right: Tensor
    solved: Tensor
    gap: Tensor
    directions: list[Tensor]
    images: list[Tensor]

    @classmethod
    def start(cls, right: Tensor) -> "Krylov":
        """X = 0."""
        return cls(right, torch.zeros_like(right), right, [], [])

    def step(self, product: Map, inverse: Map) -> None:
        """One product with the exact matrix."""
        directions = inverse(self.gap)
        directions = directions / directions.norm(dim=0)
        image = product(directions)
        for _ in range(2):  # a second time, as rounding leaves a part of what is taken out
            for known, found in zip(self.directions, self.images, strict=True):
                share = found.T @ image
                image, directions = image - found @ share, directions - known @ share
            image, small = torch.linalg.qr(image)
            directions = torch.linalg.solve_triangular(small, directions, upper=True, left=False)
        part = image.T @ self.gap
        self.solved = self.solved + directions @ part
        self.gap = self.gap - image @ part
        self.directions.append(directions)
        self.images.append(image)

    def residual(self) -> float:
        """The largest relative one, by recursion."""
        return float((self.gap.norm(dim=0) / self.right.norm(dim=0)).max())


def gradients(problem: Any, flat: Flat, inputs: Tensor, labels: Tensor) -> Tensor:
    """∇ℓ of each example ``[b, p]``, without the L2 term."""

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        one: Tensor = problem.losses(flat(theta, x[None]), y[None])[0]
        return one

    with sdpa_kernel(SDPBackend.MATH):
        found: Tensor = vmap(grad(loss), in_dims=(None, 0, 0))(flat.theta, inputs, labels)
    return found


def scores(problem: Any, flat: Flat, solved: Tensor) -> Tensor:
    """(1/n) xᵀ ∇ℓ(i) for each column x: a derivative along x, no gradient is formed."""
    blocks = []
    for inputs, labels in problem.batches(500):

        def losses(theta: Tensor, x: Tensor = inputs, y: Tensor = labels) -> Tensor:
            found: Tensor = problem.losses(flat(theta, x), y)
            return found

        with sdpa_kernel(SDPBackend.MATH):
            rows = [jvp(losses, (flat.theta,), (x,))[1] for x in solved.T]
        blocks.append(torch.stack(rows))
    return torch.cat(blocks, 1) / len(problem.inputs)


def run(problem: Any, plan: Plan, folder: Path) -> None:
    """Solve for the problem's queries until the tolerance or the time, and write the scores."""
    problem = problem.to(plan.dtype)
    began = time.process_time()
    product, flat = GaussNewton(problem, plan), Flat(problem, plan.dtype)
    right = gradients(problem, flat, problem.query_inputs, problem.query_labels).T.contiguous()
    state = Krylov.start(right)
    if (folder / "krylov.pt").exists():
        left = torch.load(folder / "krylov.pt", weights_only=True)
        if left.pop("damping") == problem.damping:
            state = Krylov(**left)
    inverse = guess(problem, right.shape[1]) if plan.minutes else None
    while inverse and state.residual() > plan.tolerance:
        if time.process_time() - began > 60 * plan.minutes:
            break
        state.step(product, inverse)
        spent = time.process_time() - began
        print(
            f"product {len(state.images)}: residual {state.residual():.2e}, {spent:.0f} s",
            flush=True,
        )
        _save(state, problem.damping, folder)
    np.save(folder / "truth.npy", scores(problem, flat, state.solved).double().numpy())
    gap = right - product(state.solved)  # by one more product: rounding is in it
    about = {
        "queries": len(problem.query_inputs),
        "residual": float(f"{float((gap.norm(dim=0) / right.norm(dim=0)).max()):.2g}"),
        "products": len(state.images),
        "damping": problem.damping,
        "dtype": str(plan.dtype).removeprefix("torch."),
    }
    (folder / "truth.json").write_text(json.dumps(about))


def _save(state: Krylov, damping: float, folder: Path) -> None:
    torch.save({**vars(state), "damping": damping}, folder / "krylov.tmp")
    (folder / "krylov.tmp").replace(folder / "krylov.pt")


def main() -> None:
    """Go on with the reference of a task."""
    parser = argparse.ArgumentParser(description="Go on with the reference scores of a task.")
    parser.add_argument("task")
    parser.add_argument("--minutes", type=float, default=20.0)
    given = parser.parse_args()
    task = importlib.import_module(f"benchmarks.{given.task}")
    task.prepare(scratch(given.task))
    task.RECIPE.refine(scratch(given.task), given.minutes)


if __name__ == "__main__":
    main()
