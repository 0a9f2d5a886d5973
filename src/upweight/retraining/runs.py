"""One way of retraining: trials in, measures of the queries out, one by one."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from upweight.checks import probe
from upweight.data import Data
from upweight.objective import Objective
from upweight.parameters import ParameterSpace
from upweight.retraining.trials import Trials

__all__ = ["ROWS", "Asked", "Outcome", "Run", "distance"]

ROWS = 512


@final
@dataclass(frozen=True)
class Outcome:
    """What one trial found.

    Attributes:
        number: of the trial.
        measured: the measure of every query, ``[q]``; None where it failed.
        moved: how far the model is from the one at hand, ‖θ − θ̂‖ / ‖θ̂‖; NaN where unknown.
        failure: what went wrong, or None.
    """

    number: int
    measured: np.ndarray | None
    moved: float = float("nan")
    failure: str | None = None


class Run(ABC):
    """Retrains for every trial.

    Attributes:
        words: what is done, for results.
        own: the seed with which the model at hand was made.
    """

    words: str
    own: int

    @abstractmethod
    def identity(self) -> Any:
        """What outcomes rest on beside objective, data and queries, to be hashed."""

    def plan(self, trials: Trials, known: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """How these trials will be run, in JSON values: as a known plan says, if there is one.

        With the same plan and trials, a run that was stopped ends as if it had not been.
        """
        del trials, known
        return {}

    @abstractmethod
    def outcomes(
        self, trials: Trials, wanted: np.ndarray, plan: Mapping[str, Any]
    ) -> Iterator[Outcome]:
        """Outcomes of the wanted trials, each as soon as it is there, in any order.

        Args:
            trials: all, of which some are known already.
            wanted: numbers ``[k]`` of those that are not; the outcome of another one is ignored.
            plan: as ``plan`` made it.
        """

    @property
    def notes(self) -> tuple[str, ...]:
        """What should be known of the outcomes, once they are there."""
        return ()


@final
class Asked:
    """Measures of queries under any model of one form.

    Args:
        objective: what was minimised, and at hand.
        queries: what is asked.

    Raises:
        DataError, LossError, NonFiniteError: the queries cannot be asked of the model.
    """

    def __init__(self, objective: Objective, queries: Data) -> None:
        probe(objective, queries, objective.measure, role="queries")
        self.objective, self.queries = objective, queries

    def without_model(self, queries: Data) -> "Asked":
        """The same of queries in memory, light enough to be sent to another process."""
        twin, space = copy.copy(self), self.objective.space
        like = nn.Linear(1, 1).to(space.device, space.dtype)
        twin.objective = self.objective.on(like).with_l2(torch.zeros(0))
        twin.objective.space, twin.queries = ParameterSpace(like), queries
        return twin

    def of(self, model: nn.Module) -> np.ndarray:
        """The measure of every query under a model, ``[q]``, float64."""
        twin = self.objective.on(model)
        measured = twin.measured(twin.measure)
        with torch.no_grad():
            batches = map(twin.place, self.queries.batches(self.queries.batch_size or ROWS))
            found = [measured({}, batch).double().cpu() for batch in batches]
        return torch.cat(found).numpy()


def distance(params: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> float:
    """‖θ − θ̂‖ / ‖θ̂‖ of parameters by name; NaN where they are not the same ones.

    Example:
        >>> distance({"w": torch.tensor([3.0])}, {"w": torch.tensor([2.0])})
        0.5
    """
    same = {name: p.shape for name, p in params.items()}
    if same != {name: p.shape for name, p in known.items()}:
        return float("nan")
    apart = sum(
        float((params[name].to(p) - p).double().square().sum()) for name, p in known.items()
    )
    size = sum(float(p.double().square().sum()) for p in known.values())
    return float((apart / size) ** 0.5) if size else float("nan")
