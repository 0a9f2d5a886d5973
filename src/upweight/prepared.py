"""What answers rest on: data, a method, its damping, and an inverse that is made once."""

from collections.abc import Callable
from functools import cached_property, wraps
from os import PathLike
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar, final

import numpy as np
from torch import Tensor

from upweight.curvature import kronecker_fit
from upweight.damping import Damping, check_damping, resolved
from upweight.data import Data
from upweight.engine import located, query_gradients
from upweight.errors import DataError, InputError
from upweight.factors import load_factors, save_factors
from upweight.fingerprints import fingerprint
from upweight.gradients import Compression, TrainingGradients, per_example
from upweight.guard import Guard
from upweight.keepers import DirectoryKeeper
from upweight.linalg import Inverse, Operator, RowValues
from upweight.losses import CustomLoss
from upweight.methods import Baseline, Method, resolve_method
from upweight.objective import Measure, Objective
from upweight.risk import Risk
from upweight.scores import Provenance
from upweight.store import MANIFEST, require_place

__all__ = ["Holder", "Prepared", "answering", "require_targets"]


Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")
Self = TypeVar("Self", bound="Holder")


class Holder(Protocol):
    """Something that answers from what was prepared."""

    _made: "Prepared"


def answering(
    question: Callable[Concatenate[Self, Asked], Answer],
) -> Callable[Concatenate[Self, Asked], Answer]:
    """A question that is refused when the model is another by now."""

    @wraps(question)
    def guarded(self: Self, /, *args: Asked.args, **kwargs: Asked.kwargs) -> Answer:
        with self._made.guard.answering():
            return question(self, *args, **kwargs)

    return guarded


def require_targets(objective: Objective, data: Data, *, role: str) -> None:
    """Refuse inputs alone where a loss of the library compares with targets.

    Raises:
        DataError: the data have no targets.
    """
    if not isinstance(objective.loss, CustomLoss) and data.rows(0, 1).targets is None:
        raise DataError(
            f"The {role} have no targets, and {objective.loss.name.replace('_', ' ')} compares "
            "outputs with them. Pass (inputs, targets)."
        )


@final
class Prepared:
    """Everything that is computed once and asked often; nothing is computed before it is asked.

    Args:
        objective: what was minimised.
        data: over which examples.
        asked: a method, as a user names it.
        damping: added to the curvature.
    """

    def __init__(self, objective: Objective, data: Data, asked: object, damping: object) -> None:
        self.whole, self.data, self.asked = objective, data, asked
        self.damping: Damping = check_damping(damping)
        self.method: Method | Baseline = resolve_method(asked)
        self._factors: str | PathLike[str] | None = None
        self._gradients: str | PathLike[str] | None = None
        self.guard = Guard(objective)

    @cached_property
    def objective(self) -> Objective:
        """The objective as a function of the parameters that the method looks at."""
        if isinstance(self.method, Baseline):
            return self.whole
        return self.method.looks_at(self.whole, self.data)

    @cached_property
    def risk(self) -> Risk:
        """The objective bound to the training data, checked."""
        require_targets(self.objective, self.data, role="training data")
        return Risk(self.objective, self.data)

    def keep(
        self, factors: str | PathLike[str] | None, gradients: str | PathLike[str] | None
    ) -> None:
        """Say where fitted factors and training gradients stay; before either is made."""
        if "curvature" in self.__dict__ or "training" in self.__dict__:
            raise InputError("Say what is to be kept before the first question is asked.")
        self._factors, self._gradients = factors, gradients

    @property
    def keeps_gradients(self) -> bool:
        """Whether training gradients are to stay on disk."""
        return self._gradients is not None

    def kept_inside(self, name: str) -> tuple[Path | None, Path | None]:
        """Directories inside those for factors and gradients, where there are any."""
        factors, gradients = (
            None if place is None else Path(place) / name
            for place in (self._factors, self._gradients)
        )
        return factors, gradients

    @cached_property
    def training(self) -> TrainingGradients:
        """Gradients of the training data."""
        compression = self.compression
        if self._gradients is None:
            return TrainingGradients(self.risk, compression=compression)
        first, _ = self.risk.rows(0, min(2, len(self.data)))
        like, identity = per_example(self.objective, first), self.source
        if compression is not None:
            like = compression.compress(like)
            identity = fingerprint((identity, self.fitted.curvature))
        return TrainingGradients(
            self.risk, DirectoryKeeper(self._gradients, identity, like), compression
        )

    @cached_property
    def compression(self) -> Compression | None:
        """What the method keeps of training gradients, if not all."""
        if isinstance(self.method, Baseline) or self.method.compression is None:
            return None
        return self.method.compression(self.curvature)

    @property
    def fitted(self) -> Method:
        """The method, if it is one that inverts a curvature."""
        if isinstance(self.method, Baseline):
            raise InputError(
                f"{self.method.name!r} is a baseline and inverts no curvature. "
                "Use it with explain(), or choose another method."
            )
        return self.method

    def refuse_ablation(self) -> None:
        """Weighed training gradients are a row of scores; what-ifs by them mean nothing."""
        if isinstance(self.method, Method) and self.method.rescale is not None:
            raise InputError(
                f"{self.method.name!r} weighs training gradients (an ablation, or relative "
                "influence), for explain() only. Use another method here."
            )

    @cached_property
    def curvature(self) -> Operator:
        """The curvature without damping, fitted once."""
        method, path = self.fitted, self._factors
        with located(self.risk):
            if path is None:
                return method.fit(self.risk)
            fit = kronecker_fit(method.curvature)
            identity = fingerprint((self.source, self.objective.l2, fit))
            if (Path(path) / MANIFEST).exists():
                return load_factors(path, identity, device=self.objective.space.device)
            require_place(path, identity)
            operator = fit(self.risk)
            save_factors(operator, path, identity)
            return operator

    @cached_property
    def shift(self) -> float:
        """The damping as a number."""
        if not self.fitted.fits:
            return self.damping if isinstance(self.damping, float) else 0.0
        return self.resolved(self.curvature)

    def resolved(self, operator: Operator) -> float:
        """The damping as a number for a curvature, or a sample's."""
        return resolved(self.damping, self.objective, operator)

    @cached_property
    def inverse(self) -> Inverse:
        """(H + damping)⁻¹, prepared once."""
        with located(self.risk):
            return self.fitted.invert(self.curvature, self.shift)

    @cached_property
    def source(self) -> str:
        """Hash of model, data and loss: what gradients belong to (one pass over the data)."""
        objective = self.objective
        names = list(objective.space.shapes)
        return fingerprint((self.guard.fingerprint, self.data.fingerprint(), objective.loss, names))

    @cached_property
    def identity(self) -> str:
        """Hash of model, data and settings."""
        objective = self.objective
        stated = (objective.removal, objective.measure, objective.l2)
        return fingerprint((self.source, stated, self.asked, self.damping))

    def identity_of(self, queries: Data, measure: Measure) -> str:
        """Hash of what was asked, of this model: what a run of scores belongs to."""
        return fingerprint((self.identity, queries.fingerprint(), measure))

    @property
    def shares(self) -> np.ndarray:
        """w_i / Σ w of each training example, ``[N]``."""
        return (self.risk.weights / self.risk.total).numpy()

    def precondition(
        self, queries: Data, measure: Measure, *, accept: bool
    ) -> tuple[Tensor | RowValues, Tensor, tuple[str, ...]]:
        """Rows s_q = ∇m(q) H⁻¹, their residuals ``[q]``, and caveats."""
        risk = self.risk  # what is wrong with the training data is said first
        gradients = query_gradients(self.objective, queries, measure)
        with located(risk):
            solution = self.inverse.precondition(gradients)
            if not accept:
                solution.require()
        precision = self.objective.precision
        notes = self.inverse.notes if precision is None else (*self.inverse.notes, precision)
        return solution.value, solution.residual, (*notes, *solution.caveats())

    def rows(
        self, queries: Data, measure: Measure, *, accept: bool = False
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Rows s_q ``[q, p]`` as a tensor, and caveats."""
        rows, _, caveats = self.precondition(queries, measure, accept=accept)
        return rows if isinstance(rows, Tensor) else rows.dense(), caveats

    def provenance(
        self, identity: str, residual: Tensor, caveats: tuple[str, ...], damping: float
    ) -> Provenance:
        """How scores came about."""
        return Provenance(
            method=self.method.name,
            damping=damping,
            removal=self.objective.removal,
            coverage=self.objective.space.coverage,
            identity=identity,
            residual=residual.cpu().double().numpy(),
            caveats=caveats,
        )
