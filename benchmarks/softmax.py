"""The task "softmax": MNIST, ten-class logistic regression, 100 queries x 55,000 examples.

Everything here needs torch and numpy alone, so that a peer's environment can load it. The truth is
computed without upweight: a dense float64 Hessian, Cholesky, and iterative refinement.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.datasets import read_idx, source

TITLE = "MNIST softmax regression, scores of 100 queries against 55,000 training examples"
SET_ASIDE, QUERIES, CLASSES, L2 = 5_000, 100, 10, 0.01
ABOUT = {
    "objective": "mean cross-entropy + 0.005 ||W||^2, no bias, pixels / 255",
    "examples": 55_000,
    "parameters": 7_840,
    "queries": QUERIES,
    "score": "(1/n) grad loss(q) . H^-1 . grad loss(i), gradients without the L2 term",
}


@final
@dataclass(frozen=True)
class Problem:
    """What every contender is given.

    Attributes:
        inputs: pixels ``[n, 784]``, float32.
        labels: digits ``[n]``.
        query_inputs: pixels ``[q, 784]``, float32.
        query_labels: digits ``[q]``.
        weight: the optimum ``[10, 784]``, float64.
        l2: λ of ½λ‖W‖².
    """

    inputs: Tensor
    labels: Tensor
    query_inputs: Tensor
    query_labels: Tensor
    weight: Tensor
    l2: float = L2

    @property
    def dtype(self) -> torch.dtype:
        """Of the pixels."""
        return self.inputs.dtype

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The trained model."""
        model = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, dtype=dtype)
        with torch.no_grad():
            model.weight.copy_(self.weight)
        return model

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same with pixels in another dtype."""
        pixels = (self.inputs.to(dtype), self.query_inputs.to(dtype))
        return replace(self, inputs=pixels[0], query_inputs=pixels[1])

    def first(self, queries: int) -> "Problem":
        """The same with the first queries only."""
        asked = (self.query_inputs[:queries], self.query_labels[:queries])
        return replace(self, query_inputs=asked[0], query_labels=asked[1])


def prepare(scratch: Path) -> None:
    """Write data, optimum and exact scores to scratch, each once."""
    scratch.mkdir(parents=True, exist_ok=True)
    if not (scratch / "inputs.npy").exists():
        _write_data(source("mnist"), scratch)
    if not (scratch / "weight.npy").exists():
        print("training to the optimum in float64")
        np.save(scratch / "weight.npy", _train(load_data(scratch)).numpy())
    if not (scratch / "truth.npy").exists():
        print("exact scores in float64, about a minute and 3 GiB")
        np.save(scratch / "truth.npy", exact_scores(load(scratch)).numpy())


def _write_data(folder: Path, scratch: Path) -> None:
    train = read_idx(folder / "train-images-idx3-ubyte.gz", 16).reshape(-1, 784)
    test = read_idx(folder / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, 784)
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz", 8)
    test_labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", 8)
    np.save(scratch / "labels.npy", labels[SET_ASIDE:].astype(np.int64))
    np.save(scratch / "query_labels.npy", test_labels[:QUERIES].astype(np.int64))
    np.save(scratch / "query_inputs.npy", (test[:QUERIES] / 255).astype(np.float32))
    np.save(scratch / "inputs.npy", (train[SET_ASIDE:] / 255).astype(np.float32))


def load_data(scratch: Path) -> Problem:
    """The data with a weight of zeros."""
    names = ("inputs", "labels", "query_inputs", "query_labels")
    arrays = [torch.from_numpy(np.load(scratch / f"{name}.npy")) for name in names]
    return Problem(*arrays, weight=torch.zeros(CLASSES, 784, dtype=torch.float64))


def load(scratch: Path) -> Problem:
    """The whole problem from scratch, without computing anything."""
    weight = torch.from_numpy(np.load(scratch / "weight.npy"))
    return replace(load_data(scratch), weight=weight)


def truth(scratch: Path) -> np.ndarray:
    """The exact scores ``[q, n]``, float64."""
    scores: np.ndarray = np.load(scratch / "truth.npy")
    return scores


def _train(problem: Problem) -> Tensor:
    """The optimum by L-BFGS in float64, then Newton's own gradient test."""
    x, weight = problem.inputs.double(), problem.weight.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [weight],
        max_iter=2000,
        tolerance_grad=1e-10,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        penalty = 0.5 * problem.l2 * weight.square().sum()
        loss = F.cross_entropy(x @ weight.T, problem.labels) + penalty
        loss.backward()
        return loss

    optimiser.step(closure)
    closure()
    size = float(weight.grad.norm())
    if size > 1e-7:
        raise RuntimeError(f"The gradient is {size:.1e} after training.")
    return weight.detach()


def exact_scores(problem: Problem) -> Tensor:
    """Scores by a dense float64 Hessian, Cholesky and two steps of iterative refinement."""
    x, weight = problem.inputs.double(), problem.weight
    p = torch.softmax(x @ weight.T, 1)
    hessian = _dense_hessian(x, p, problem.l2)
    queries = problem.query_inputs.double()
    slope = torch.softmax(queries @ weight.T, 1) - F.one_hot(problem.query_labels, CLASSES)
    rhs = (slope[:, :, None] * queries[:, None, :]).flatten(1).T
    factor = torch.linalg.cholesky(hessian)
    solved = torch.cholesky_solve(rhs, factor)
    for _ in range(2):
        solved += torch.cholesky_solve(rhs - hessian @ solved, factor)
    residual = p - F.one_hot(problem.labels, CLASSES)
    blocks = solved.T.view(-1, CLASSES, x.shape[1])
    scores = torch.zeros(len(blocks), len(x), dtype=torch.float64)
    for k in range(CLASSES):
        scores += (blocks[:, k] @ x.T) * residual[:, k]
    return scores / len(x)


def _dense_hessian(x: Tensor, p: Tensor, l2: float) -> Tensor:
    """H[k, :, l, :] = (1/n) Σ_i p_ik (δ_kl − p_il) x_i x_iᵀ + λ δ, block by block."""
    (n, d), c = x.shape, p.shape[1]
    hessian = torch.zeros(c, d, c, d, dtype=torch.float64)
    for k in range(c):
        for l in range(k, c):
            bend = p[:, k] * (float(k == l) - p[:, l])
            block = (x * bend[:, None]).T @ x / n
            hessian[k, :, l] = block
            hessian[l, :, k] = block.T
    hessian = hessian.view(c * d, c * d)
    hessian.diagonal().add_(l2)
    return hessian
