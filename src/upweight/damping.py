"""The damping λ that is added to a curvature: a number, or what gives one.

Where it comes from, in this order of trust: models that were really trained again; the objective's
own L2, which is in the curvature already; the length of the training; the size of the curvature.
"""

from dataclasses import dataclass
from typing import Any, Literal, final

from upweight.errors import InputError
from upweight.linalg import Operator
from upweight.objective import Objective

__all__ = ["Damping", "FiniteTraining", "check_damping", "resolved"]

SHARE = 0.1


@final
@dataclass(frozen=True)
class FiniteTraining:
    """The damping that a finite training implies, λ = (1 − momentum) / (learning rate · steps).

    Gradient descent of T steps of rate η from a fixed start answers a change of the objective along
    an eigenvalue h of H by (1 − (1 − ηh)ᵀ)/h: by 1/h where ηhT is large and by ηT where it is
    small, so much as 1/(h + 1/(ηT)) does. Momentum m makes steps as long as η/(1 − m). The relation
    of early stopping and L2 is Bishop's (1995) and, for gradient flow, Ali, Kolter & Tibshirani's
    (2019). Adam's steps are no gradient descent, and this is only a guide for it.

    Attributes:
        learning_rate: η; the mean over the steps of a schedule.
        steps: T, updates of the parameters.
        momentum: of SGD.

    Raises:
        InputError: not positive, or momentum outside of [0, 1).

    Example:
        >>> FiniteTraining(0.05, 940, momentum=0.9).damping
        0.0021276595744680847
    """

    learning_rate: float
    steps: int
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.learning_rate < float("inf") and self.steps >= 1):
            raise InputError(
                "A training has a positive learning rate and at least one step, got "
                f"{self.learning_rate!r} and {self.steps!r}."
            )
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum is from 0 to below 1, got {self.momentum!r}.")

    @property
    def damping(self) -> float:
        """λ."""
        return (1 - self.momentum) / (self.learning_rate * self.steps)


Damping = float | Literal["auto", "validated"] | FiniteTraining


def check_damping(damping: Any) -> Damping:
    """The damping itself, if it is one.

    Raises:
        InputError: it is not.
    """
    if isinstance(damping, FiniteTraining) or damping in ("auto", "validated"):
        return damping  # type: ignore[no-any-return]
    number = isinstance(damping, (int, float)) and not isinstance(damping, bool)
    if not number or not 0 <= damping < float("inf"):
        raise InputError(
            "damping must be a finite number ≥ 0, 'auto', 'validated', or "
            f"FiniteTraining(learning_rate, steps), got {damping!r}."
        )
    return float(damping)


def resolved(damping: Damping, objective: Objective, curvature: Operator) -> float:
    """The number that a damping stands for.

    "auto" adds nothing where every parameter has L2, which is part of the curvature and what the
    model was trained with; elsewhere a tenth of the mean eigenvalue, so that directions which the
    data do not determine count little. It is a place to start from, not a measurement: ``sweep``
    shows what depends on it, and the training's own length, where known, is better
    (``FiniteTraining``). "validated" stands for what retraining chooses, and for no number until
    it has.

    Args:
        damping: as asked.
        objective: what was minimised.
        curvature: with the objective's L2, without damping.

    Raises:
        InputError: it is "validated", and no truth has chosen a number.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from upweight.linalg import Dense
        >>> plain = Objective(nn.Linear(1, 1), "mean_squared_error")
        >>> resolved("auto", plain, Dense(torch.diag(torch.tensor([3.0, 1.0]))))
        0.2
    """
    if isinstance(damping, FiniteTraining):
        return damping.damping
    if damping == "validated":
        raise InputError(
            "damping='validated' is chosen by retrained models: truth = inf.retrain(queries, "
            "trials, how), best = inf.tune(queries, truth), and then inf.tuned(best) answers. Or "
            "pass a number, or 'auto'."
        )
    if damping != "auto":
        return damping
    if bool((objective.l2 > 0).all()):
        return 0.0
    return SHARE * max(curvature.trace(), 0.0) / curvature.size
