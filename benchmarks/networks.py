"""What the network tasks share: the problem a contender is given, training, and the stored truth.

Needs torch and numpy alone, so that a peer's environment can load it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import reference
from benchmarks.datasets import Arrays

__all__ = ["Problem", "Recipe"]

Watch = Callable[[nn.Module], None]
NAMES = ("inputs", "labels", "query_inputs", "query_labels")


@final
@dataclass(frozen=True)
class Problem:
    """What every contender is given.

    Attributes:
        inputs: of the training examples ``[n, ...]``.
        labels: classes ``[n]``, or ``[n, s]`` one per position.
        query_inputs: ``[q, ...]``.
        query_labels: ``[q]`` or ``[q, s]``.
        weights: the trained state.
        build: makes the untrained network.
        l2: λ of ½λ‖θ‖², over all parameters.
        damping: what the score adds to the Gauss-Newton matrix, L2 included.
        dtype: of the model and of inputs that are not integers.
        again: the weights that another run of the recipe has, of (seed, epochs or None).
    """

    inputs: Tensor
    labels: Tensor
    query_inputs: Tensor
    query_labels: Tensor
    weights: Mapping[str, Tensor]
    build: Callable[[], nn.Module]
    l2: float
    damping: float
    dtype: torch.dtype = torch.float32
    again: Callable[[int, int | None], Mapping[str, Tensor]] | None = None

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The trained network, in evaluation mode."""
        model = self.build()
        model.load_state_dict(dict(self.weights))
        return model.to(dtype or self.dtype).eval()

    @staticmethod
    def losses(outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each example ``[n]``, the mean over its positions if it has any."""
        rows = F.cross_entropy(outputs.flatten(0, -2), labels.flatten(), reduction="none")
        return rows.view(len(labels), -1).mean(1)

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same in another dtype."""
        pair = [x.to(dtype) if x.is_floating_point() else x for x in self._inputs()]
        return replace(self, inputs=pair[0], query_inputs=pair[1], dtype=dtype)

    def first(self, queries: int) -> "Problem":
        """The same with the first queries only."""
        asked = (self.query_inputs[:queries], self.query_labels[:queries])
        return replace(self, query_inputs=asked[0], query_labels=asked[1])

    def at(self, epoch: int) -> "Problem":
        """The same with the weights of a checkpoint of the run."""
        assert self.again is not None, "only a problem from scratch has checkpoints"
        return replace(self, weights=self.again(0, epoch))

    def only(self, rows: Tensor) -> "Problem":
        """The same with some of the training examples only."""
        return replace(self, inputs=self.inputs[rows], labels=self.labels[rows])

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """The training examples in order."""
        return list(zip(self.inputs.split(size), self.labels.split(size), strict=True))

    def query_batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """The queries in order."""
        return list(zip(self.query_inputs.split(size), self.query_labels.split(size), strict=True))

    def _inputs(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.query_inputs


@final
@dataclass(frozen=True)
class Recipe:
    """How a task's data and weights come about, and its truth.

    Attributes:
        data: reads the four arrays.
        build: makes the untrained network.
        optimiser: of the given parameters.
        l2: λ of ½λ‖θ‖², inside the loss.
        epochs: passes over the examples.
        batch: examples per step.
        queries: how many have an exact reference.
        exact: how the reference is computed.
        damping: what the score adds to the Gauss-Newton matrix, L2 included; the L2 by default.
    """

    data: Callable[[], Arrays]
    build: Callable[[], nn.Module]
    optimiser: Callable[[Any], torch.optim.Optimizer]
    l2: float
    epochs: int
    batch: int
    queries: int
    exact: reference.Plan
    damping: float | None = None

    def prepare(self, scratch: Path) -> None:
        """Write data, weights and reference scores to scratch, each once."""
        self.supply(scratch)
        if not self._judged(scratch):
            print(f"reference scores, at most {self.exact.minutes:.0f} minutes")
            self.refine(scratch)

    def supply(self, scratch: Path) -> None:
        """Write data and weights to scratch, each once: all that needs no reference."""
        scratch.mkdir(parents=True, exist_ok=True)
        if not all((scratch / f"{name}.npy").exists() for name in NAMES):
            for name, values in self.data().items():
                np.save(scratch / f"{name}.npy", values)
        if not (scratch / "weights.pt").exists():
            print("training")
            torch.save(self.train(scratch), scratch / "weights.pt")

    def _judged(self, scratch: Path) -> bool:
        """Whether there is a reference, and of this damping."""
        if not (scratch / "truth.npy").exists():
            return False
        return self.convergence(scratch).get("damping") == self.untrained(scratch).damping

    def refine(self, scratch: Path, minutes: float | None = None) -> None:
        """Go on with the reference from where it was left."""
        problem = self.load(scratch).first(self.queries)
        plan = self.exact if minutes is None else replace(self.exact, minutes=minutes)
        reference.run(problem, plan, scratch)

    def load(self, scratch: Path) -> Problem:
        """The whole problem from scratch, without computing anything."""
        weights = torch.load(scratch / "weights.pt", weights_only=True)
        problem = self.untrained(scratch)

        def again(seed: int, epochs: int | None) -> dict[str, Tensor]:
            recipe = self if epochs is None else replace(self, epochs=epochs)
            return recipe.fitted(problem, seed=seed).state_dict()

        return replace(problem, weights=weights, again=again)

    def truth(self, scratch: Path) -> np.ndarray:
        """Reference scores of the first queries ``[few, n]``, float64."""
        scores: np.ndarray = np.load(scratch / "truth.npy")
        return scores

    def convergence(self, scratch: Path) -> dict[str, Any]:
        """How far the reference has converged; empty where there is none."""
        path = scratch / "truth.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def train(self, scratch: Path) -> dict[str, Tensor]:
        """The state after a seeded run of the recipe, with its accuracy printed."""
        problem = self.untrained(scratch)
        model = self.fitted(problem, seed=0, told=True)
        with torch.no_grad():
            outputs = model(problem.query_inputs)
        right = (outputs.argmax(-1) == problem.query_labels).double().mean()
        loss = problem.losses(outputs, problem.query_labels).mean()
        print(f"queries: loss {float(loss):.4f}, accuracy {float(right):.4f}")
        return {name: value.detach().clone() for name, value in model.state_dict().items()}

    def fitted(
        self, problem: Problem, *, seed: int, told: bool = False, watch: Watch | None = None
    ) -> nn.Module:
        """A network trained on a problem's examples, in evaluation mode.

        Args:
            problem: the examples; its weights are not looked at.
            seed: of the first weights and of the order of the examples.
            told: whether each epoch's loss is printed.
            watch: is shown the network after every step of the last epoch, in evaluation mode.
        """
        torch.manual_seed(seed)
        model = self.build().train()
        optimiser = self.optimiser(model.parameters())
        for epoch in range(self.epochs):
            total = 0.0
            for rows in torch.randperm(len(problem.inputs)).split(self.batch):
                optimiser.zero_grad()
                mean = problem.losses(model(problem.inputs[rows]), problem.labels[rows]).mean()
                size = sum(p.square().sum() for p in model.parameters())
                (mean + 0.5 * self.l2 * size).backward()
                optimiser.step()
                total += float(mean.detach()) * len(rows)
                if watch is not None and epoch + 1 == self.epochs:
                    watch(model.eval())
                    model.train()
            if told:
                print(f"epoch {epoch + 1}: loss {total / len(problem.inputs):.4f}", flush=True)
        return model.eval()

    def untrained(self, scratch: Path) -> Problem:
        """The problem without weights."""
        arrays = [torch.from_numpy(np.load(scratch / f"{name}.npy")) for name in NAMES]
        damping = self.l2 if self.damping is None else self.damping
        return Problem(*arrays, weights={}, build=self.build, l2=self.l2, damping=damping)
