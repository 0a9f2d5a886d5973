"""Reference scores of a network: block conjugate gradients on its Gauss-Newton matrix.

    python -m benchmarks.reference TASK [--minutes 20]      # go on where it was left

Uses torch alone: neither upweight nor a peer. The state is kept in scratch, so that a run that was
stopped goes on, and the residual that was reached is kept beside the scores.
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

__all__ = ["Block", "Flat", "GaussNewton", "Plan", "gradients", "run", "scores"]

SAVE_EVERY_S = 60.0


@final
@dataclass(frozen=True)
class Plan:
    """How a reference is computed.

    Attributes:
        dtype: of the network and the vectors.
        batch: examples at once.
        together: vectors at once in a product; 1 where batching them is slow (convolutions).
        tolerance: residual over right side, in norms; the largest over the queries.
        minutes: of one run.
    """

    dtype: torch.dtype = torch.float64
    batch: int = 500
    together: int = 10
    tolerance: float = 1e-3
    minutes: float = 20.0


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

    H_i is the curvature of an example's mean cross-entropy in its outputs.
    """

    def __init__(self, problem: Any, plan: Plan) -> None:
        self._problem = problem.to(plan.dtype)
        self._flat = Flat(self._problem, plan.dtype)
        self._plan = plan

    def __call__(self, columns: Tensor) -> Tensor:
        """One pass over the examples for all columns."""
        total = self._problem.l2 * columns
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


@final
@dataclass
class Block:
    """Block conjugate gradients with orthonormal residuals (Dubrulle 2001, "BCGrQ").

    All right sides share one Krylov space, which takes far fewer products than one space each.

    Attributes:
        solved: X ``[p, k]``.
        basis: orthonormal Q of the residuals Q C.
        search: the directions.
        small: C ``[k, k]``; its column norms are the residuals'.
        norms: of the right sides.
        products: so far.
    """

    solved: Tensor
    basis: Tensor
    search: Tensor
    small: Tensor
    norms: Tensor
    products: int = 0

    @classmethod
    def start(cls, right: Tensor) -> "Block":
        """X = 0."""
        basis, small = torch.linalg.qr(right)
        return cls(torch.zeros_like(right), basis, basis, small, right.norm(dim=0))

    def step(self, product: Callable[[Tensor], Tensor]) -> None:
        """One product, one step."""
        image = product(self.search)
        weight = torch.linalg.inv(self.search.T @ image)
        self.solved = self.solved + self.search @ (weight @ self.small)
        self.basis, turn = torch.linalg.qr(self.basis - image @ weight)
        self.small = turn @ self.small
        self.search = self.basis + self.search @ turn.T
        self.products += 1

    def residual(self) -> float:
        """The largest relative one, by the recurrence."""
        return float((self.small.norm(dim=0) / self.norms).max())


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
    product, flat = GaussNewton(problem, plan), Flat(problem, plan.dtype)
    right = gradients(problem, flat, problem.query_inputs, problem.query_labels).T.contiguous()
    if (folder / "cg.pt").exists():
        state = Block(**torch.load(folder / "cg.pt", weights_only=True))
    else:
        state = Block.start(right)
    began = saved = time.monotonic()
    while state.residual() > plan.tolerance and time.monotonic() - began < 60 * plan.minutes:
        state.step(product)
        print(f"product {state.products}: residual {state.residual():.2e}", flush=True)
        if time.monotonic() - saved > SAVE_EVERY_S:
            _save(state, folder)
            saved = time.monotonic()
    _save(state, folder)
    np.save(folder / "truth.npy", scores(problem, flat, state.solved).double().numpy())
    about = {
        "queries": len(problem.query_inputs),
        "residual": float(f"{_true_residual(state, product, right):.2g}"),
        "products": state.products,
        "dtype": str(plan.dtype).removeprefix("torch."),
    }
    (folder / "truth.json").write_text(json.dumps(about))


def _true_residual(state: Block, product: Callable[[Tensor], Tensor], right: Tensor) -> float:
    """The largest relative one, by one more product: rounding is in it."""
    gap = right - product(state.solved)
    return float((gap.norm(dim=0) / right.norm(dim=0)).max())


def _save(state: Block, folder: Path) -> None:
    torch.save(vars(state), folder / "cg.tmp")
    (folder / "cg.tmp").replace(folder / "cg.pt")


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
