"""Retraining of convex objectives: minimised anew to machine precision, from the model at hand."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from upweight.bars import track
from upweight.curvature import curvature
from upweight.errors import InputError, LossError
from upweight.evaluation import Edit, Refits, refit
from upweight.forms import values_of
from upweight.linalg import Cholesky
from upweight.retraining.runs import Asked, Outcome, Run
from upweight.retraining.trials import Trials
from upweight.risk import Risk

__all__ = ["ByRefit", "Refit"]


@final
@dataclass(frozen=True)
class Refit:
    """Minimise every changed objective, in float64, from the minimum at hand.

    For convex objectives (linear, logistic and softmax models, kernel machines; a last layer). All
    trials share one factorisation of the Hessian and descend together. Where a model ends does not
    depend on where it began, so that seeds change nothing.

    Attributes:
        rtol: of what is left of the gradient, relative to that of the change.
        at_once: models together.

    Example:
        >>> Refit().rtol
        1e-09
    """

    rtol: float = 1e-9
    at_once: int = 128

    def __post_init__(self) -> None:
        if not (0 < self.rtol < 1 and self.at_once >= 1):
            raise InputError(
                f"rtol is between 0 and 1 and at_once ≥ 1, got {self.rtol!r} and {self.at_once!r}."
            )


@final
class ByRefit(Run):
    """Refits for every trial.

    Args:
        risk: the full objective, at its minimum.
        asked: measures of the queries.
        settings: of the refits.

    Raises:
        IndefiniteError: the objective is not convex there.
    """

    own = 0

    def __init__(self, risk: Risk, asked: Asked, settings: Refit) -> None:
        self._risk = Risk(risk.objective.in_double(), risk.data)
        self._asked, self._settings = asked, settings
        self._inverse = Cholesky().init(curvature("hessian", self._risk))
        self.words = f"refits to {settings.rtol:g} of each change's gradient, float64, warm start"

    def identity(self) -> Any:
        """The settings, and where the refits begin."""
        return self._settings, dict(values_of(self._risk.objective.model))

    def outcomes(
        self, trials: Trials, wanted: np.ndarray, plan: Mapping[str, Any]
    ) -> Iterator[Outcome]:
        """As each group of refits has reached its minima.

        Raises:
            NotConvergedError: more than a fifth of a group did not.
            InputError: a trial both removes and relabels, or a label would change a weight.
        """
        del plan
        changes = trials.take(wanted).changes()
        _, first, same = np.unique(changes, return_index=True, return_inverse=True)
        edits = [self._edit(trials.take(wanted[[row]])) for row in first]
        starts = range(0, len(edits), self._settings.at_once)
        for start in track(starts, "refits", len(starts)):
            some = edits[start : start + self._settings.at_once]
            fits = refit(self._risk, self._inverse, some, rtol=self._settings.rtol)
            yield from self._found(fits, wanted, same - start)

    def _found(self, fits: Refits, numbers: np.ndarray, which: np.ndarray) -> Iterator[Outcome]:
        """Outcomes of the trials ``numbers [k]`` whose refit ``which [k]`` is among these."""
        objective = self._asked.objective
        measured = fits.measure(self._risk, self._asked.queries, objective.measure).cpu().numpy()
        known = objective.space.row().double()
        moved = ((fits.rows - known).norm(dim=1) / known.norm()).tolist()
        for number, row in zip(numbers.tolist(), which.tolist(), strict=True):
            if not 0 <= row < len(measured):
                continue
            if bool(fits.met[row]):
                yield Outcome(number, measured[row], moved[row])
            else:
                slope = float(fits.slope[row])
                yield Outcome(
                    number, None, failure=f"no minimum was reached (gradient {slope:.1e})"
                )

    def _edit(self, trial: Trials) -> Edit:
        """The change of one trial."""
        gone = torch.from_numpy(np.flatnonzero(trial.gone[0]))
        new = trial.relabels
        if new is None:
            return Edit(gone)
        positions = torch.from_numpy(new.position)
        batch = self._risk.data.at(positions)
        targets = new.like(batch.targets)
        found = [self._risk.objective.loss.weights(t) for t in (batch.targets, targets)]
        one, other = (torch.ones(len(positions)) if w is None else w for w in found)
        if len(gone):
            raise InputError("A refit either removes or relabels. Make two kinds of trials.")
        if not torch.equal(one, other):
            raise LossError(
                "A new label weighs another amount than the old one (class weights, ignored "
                "labels), which refits cannot take. Use a Training."
            )
        return Edit(positions, batch.inputs, targets)
