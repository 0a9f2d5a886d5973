"""The front: one object that explains, audits, predicts what-ifs and proves itself."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from upweight import audits, baselines, changes, validation
from upweight.answers import (
    GroupEffects,
    L2Derivative,
    ParameterChange,
    Perturbation,
    Validation,
    WhatIf,
)
from upweight.data import Data
from upweight.engine import MatrixSink, located, query_gradients, score, self_influence
from upweight.errors import InputError
from upweight.fingerprints import fingerprint
from upweight.gradients import dense_gradients, mixed_derivative
from upweight.groups import Groups, effects
from upweight.guard import Guard
from upweight.l2 import derivative
from upweight.linalg import BlockRows, Inverse
from upweight.meaning import meaning_of, removal_gradient_row
from upweight.methods import Baseline, Method, resolve_method
from upweight.objective import Measure, Objective
from upweight.plan import Plan, make_plan
from upweight.risk import Risk
from upweight.scores import Provenance, Scores
from upweight.tables import Table

__all__ = ["Influence"]


@final
class Influence:
    """Influence of training examples on a trained model.

    Nothing is computed until something is asked. The model is only read: it is bit-identical
    afterwards, also after an error.

    Args:
        model: a trained module, or an Objective (which then carries loss and l2).
        train: what it was trained on: Dataset, DataLoader, tensors or arrays, or a Data with ids.
        loss: a name, a torch criterion, or a callable (outputs, targets) -> ``[n]``.
        l2: λ of ½λ‖θ‖² in the objective, or a mapping of name patterns to λ.
        method: a row of ``METHODS``, a Method, a solver, or an inverse curvature with ``@``.
        damping: added to the curvature beside l2.

    Raises:
        InputError: of the kind that tells which argument is at fault.

    Example:
        >>> import torch, upweight as uw
        >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
        >>> inf = uw.Influence(nn.Linear(3, 2), (x, y), loss="cross_entropy", l2=0.01)
        >>> len(inf.explain((x[:1], y[:1])).top(0, k=3))
        3
    """

    def __init__(
        self,
        model: nn.Module | Objective,
        train: Any,
        *,
        loss: object = None,
        l2: float | Mapping[str, float] = 0.0,
        method: object = "exact",
        damping: float = 0.0,
    ) -> None:
        if isinstance(model, Objective):
            if loss is not None or l2 != 0.0:
                raise InputError("The Objective already carries loss and l2. Pass them only there.")
            self.objective = model
        else:
            if loss is None:
                raise InputError("Say what was minimised: loss='cross_entropy', for example.")
            self.objective = Objective(model, loss, l2=l2)
        if not isinstance(damping, (int, float)) or not 0 <= damping < float("inf"):
            raise InputError(f"damping must be a finite number ≥ 0, got {damping!r}.")
        self.data = Data.of(train)
        self.damping = damping
        self._asked = method
        self._guard = Guard(self.objective.model)

    def __repr__(self) -> str:
        objective, name = self.objective, getattr(self._asked, "name", self._asked)
        return (
            f"Influence of {len(self.data):,} training examples on "
            f"{type(objective.model).__name__} ({objective.loss.name}, {objective.space.size:,} "
            f"parameters, {objective.space.coverage:.1%} of all; method {name}, "
            f"damping {self.damping:g})"
        )

    @cached_property
    def risk(self) -> Risk:
        """The objective bound to the training data, checked."""
        return Risk(self.objective, self.data)

    @cached_property
    def method(self) -> Method | Baseline:
        """The row of the method table."""
        return resolve_method(self._asked, self.risk)

    def _refuse_ablation(self) -> None:
        """An ablation is a row of scores; what-ifs and self-influence by it mean nothing."""
        if isinstance(self.method, Method) and self.method.rescale is not None:
            raise InputError(
                f"{self.method.name!r} is an ablation for explain() only. Use another method here."
            )

    @cached_property
    def inverse(self) -> Inverse:
        """(H + damping)⁻¹, prepared once."""
        with located(self.risk):
            return self._fitted().invert(self.risk, self.damping)

    def _fitted(self) -> Method:
        """The method, if it is one that inverts a curvature."""
        if isinstance(self.method, Baseline):
            raise InputError(
                f"{self.method.name!r} is a baseline of similarities and inverts no curvature. "
                "Use it with explain(), or choose another method."
            )
        return self.method

    @cached_property
    def identity(self) -> str:
        """Hash of model, data and settings (one pass over the data)."""
        objective = self.objective
        stated = (objective.loss, objective.removal, objective.measure, objective.l2)
        return fingerprint(
            (self._guard.fingerprint, self.data.fingerprint(), stated, self._asked, self.damping)
        )

    def plan(self, queries: Any) -> Plan:
        """Passes, seconds and memory per stage, from a timed probe, before anything runs.

        Raises:
            InputError: whatever would stop the run itself.
        """
        self._guard.check()
        data = Data.of(queries)
        self.objective.probe(data, role="queries")
        return make_plan(self.risk, self.method, len(data))

    def _precondition(
        self, queries: Data, measure: Measure, *, accept: bool
    ) -> tuple[Tensor | BlockRows, Tensor, tuple[str, ...]]:
        """Rows s_q = ∇m(q) H⁻¹, their residuals ``[q]``, and caveats."""
        gradients = query_gradients(self.objective, queries, measure)
        with located(self.risk):
            solution = self.inverse.precondition(gradients)
            if not accept:
                solution.require()
        return solution.value, solution.residual, (*self.inverse.notes, *solution.caveats())

    def _dense_rows(
        self, queries: Data, measure: Measure, *, accept: bool
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Rows s_q ``[q, p]`` as a tensor, and caveats."""
        rows, _, caveats = self._precondition(queries, measure, accept=accept)
        return rows.dense() if isinstance(rows, BlockRows) else rows, caveats

    def explain(
        self, queries: Any, *, measure: Measure | None = None, accept: bool = False
    ) -> Scores:
        """Scores of every training example for every query.

        score[q, i] = + share_i ∇m(q) H⁻¹ ∇ℓ̃(z_i): predicted change of the query's measure if the
        example is removed (Koh & Liang, 2017, up to sign and scale). Positive = helpful for a loss.

        Args:
            queries: like ``train``; inputs with targets.
            measure: what is asked of a query; the objective's own by default.
            accept: keep solves that failed; the scores then say so.

        Raises:
            NotConvergedError, IndefiniteError: a solve failed.
        """
        self._guard.check()
        asked, data = self.objective.measure if measure is None else measure, Data.of(queries)
        if isinstance(self.method, Baseline):
            return self._compare(self.method, data)
        rows, residual, caveats = self._precondition(data, asked, accept=accept)
        sink = MatrixSink(len(data), len(self.data), self.objective.space.dtype)
        with located(self.risk):
            score(self.risk, rows, sink, self.method.rescale)
        return Scores(
            sink.matrix,
            data.ids,
            self.data.ids,
            shares=self._shares(),
            meaning=meaning_of(self.objective, asked),
            provenance=self._provenance(self._identity_of(data, asked), residual, caveats),
        )

    def _compare(self, baseline: Baseline, queries: Data) -> Scores:
        """Similarities of a baseline in the layout of scores."""
        return Scores(
            baselines.compare(baseline, self.risk, queries),
            queries.ids,
            self.data.ids,
            shares=self._shares(),
            meaning=baselines.meaning_of(baseline),
            provenance=self._provenance(
                self._identity_of(queries, baseline.name),
                torch.full((len(queries),), torch.nan),
                ("a similarity, not a change on removal",),
            ),
        )

    def _shares(self) -> np.ndarray:
        return (self.risk.weights / self.risk.total).numpy()

    def _identity_of(self, queries: Data, measure: Measure) -> str:
        """Hash of what was asked, of this model: what a run of scores belongs to."""
        return fingerprint((self.identity, queries.fingerprint(), measure))

    def _provenance(self, identity: str, residual: Tensor, caveats: tuple[str, ...]) -> Provenance:
        return Provenance(
            method=self.method.name,
            damping=self.damping,
            removal=self.objective.removal,
            coverage=self.objective.space.coverage,
            identity=identity,
            residual=residual.cpu().double().numpy(),
            caveats=caveats,
        )

    def self_influence(self) -> np.ndarray:
        """Predicted rise of each example's own loss if it is removed, ``[N]``, in the loss's unit.

        share_i ∇ℓ_i H⁻¹ ∇ℓ̃_i, without the N x N matrix. Large: memorised, unusual or mislabelled.
        """
        self._guard.check()
        self._refuse_ablation()
        with located(self.risk):
            return self_influence(self.risk, self.inverse)

    def audit(self) -> Table:
        """Suspicious labels, worst first, from this one model, in cleanlab's column names."""
        return audits.audit(self.risk, self.self_influence())

    def params(self, ids: Sequence[Any], *, accept: bool = False) -> ParameterChange:
        """Predicted change of the parameters if each of the examples is removed.

        Raises:
            DataError: an id is unknown.
        """
        self._guard.check()
        positions = self.data.positions(ids)
        self._refuse_ablation()
        batch, share = self.risk.at(positions)
        rows = dense_gradients(self.objective, batch) + removal_gradient_row(self.objective)
        solution = self.inverse.solve(rows)
        value = solution.value if accept else solution.require()
        named = self.data.ids[positions.numpy()]
        return ParameterChange(named, -value, share, self.objective.space)

    def perturbation(
        self, queries: Any, ids: Sequence[Any], *, accept: bool = False
    ) -> Perturbation:
        """Predicted change of each query's measure per unit change of training inputs.

        Raises:
            DataError: an id is unknown.
            InputError: the inputs are integers.
        """
        self._guard.check()
        data, positions = Data.of(queries), self.data.positions(ids)
        rows, _ = self._dense_rows(data, self.objective.measure, accept=accept)
        batch, share = self.risk.at(positions)
        mixed = mixed_derivative(self.objective, batch, rows)
        return Perturbation(data.ids, self.data.ids[positions.numpy()], -mixed, share)

    def whatif(
        self,
        *,
        on: Any,
        remove: Sequence[Any] = (),
        relabel: Mapping[Any, Any] | None = None,
        reweight: Mapping[Any, float] | None = None,
        replace: Mapping[Any, Any] | None = None,
    ) -> WhatIf:
        """Predicted measures of queries after changing the training data, to first order.

        Args:
            on: queries.
            remove: ids to drop.
            relabel: id to new target (any size of change: z → z_δ of Koh & Liang, 2017).
            reweight: id to a factor on its weight (0 removes, 2 doubles).
            replace: id to a new example (inputs ..., target).

        Raises:
            DataError: an id is unknown, or named twice.
        """
        self._guard.check()
        self._refuse_ablation()
        ids: Any = remove if isinstance(remove, (str, int)) else tuple(remove)
        change = changes.Change(ids, relabel or {}, reweight or {}, replace or {})
        data = Data.of(on)
        rows, caveats = self._dense_rows(data, self.objective.measure, accept=False)
        return changes.predict(self.risk, change, data, rows, caveats)

    def group_effects(
        self, groups: Any, *, on: Any, measure: Measure | None = None
    ) -> GroupEffects:
        """Predicted change of queries' measures if whole groups are removed, each by itself.

        To first order (the sum of the scores), and by a Newton step on the remaining data, with
        the measure evaluated there: exact for quadratic objectives such as ridge. The step costs
        one curvature of the remaining data per group. See Koh et al. (2019), ``groups.py``.

        Args:
            groups: a list of lists of ids, or a mapping of names to them.
            on: queries.
            measure: what is asked of a query; the objective's own by default.

        Raises:
            DataError: an id is unknown or named twice, a group is empty or is all of the data.
            InputError: the method fits no curvature to data.
            NotConvergedError, IndefiniteError: a solve failed.
        """
        self._guard.check()
        self._refuse_ablation()
        method, data = self._fitted().require_fit(), Data.of(on)
        with located(self.risk):
            return effects(
                self.risk,
                Groups.of(self.data, groups),
                data,
                measure=self.objective.measure if measure is None else measure,
                inverse=self.inverse,
                newton=lambda rest, growth: method.invert(rest, self.damping * growth),
            )

    def l2_derivative(self, queries: Any, *, measure: Measure | None = None) -> L2Derivative:
        """Derivative of each query's measure in l2, by implicit differentiation.

        dm(q)/dλ_b = −∇m(q) (H + damping)⁻¹ θ_b of every parameter block b, in the measure's unit
        per unit of l2. Its mean over a validation set is the gradient for choosing l2.

        Args:
            queries: like ``train``; inputs with targets.
            measure: what is asked of a query; the objective's own by default.

        Raises:
            InputError: the method inverts no curvature.
            NotConvergedError, IndefiniteError: a solve failed.
        """
        self._guard.check()
        self._refuse_ablation()
        asked = self.objective.measure if measure is None else measure
        with located(self.risk):
            return derivative(self.objective, self.inverse, Data.of(queries), measure=asked)

    def validate(
        self,
        queries: Any,
        *,
        top: int = 20,
        random: int = 20,
        seed: int = 0,
        retrain: Callable[[np.ndarray], nn.Module] | None = None,
        scores: Scores | None = None,
    ) -> Validation:
        """Really remove examples one by one, refit, and compare with the predictions.

        Args:
            queries: whose measures are compared.
            top: removals with the largest scores over the queries.
            random: removals drawn at random.
            seed: of the draw.
            retrain: kept positions ``[N − 1]`` -> a model trained on them; by default each refit
                continues from the present minimum in float64 until its gradient vanishes.
            scores: of these queries, if they are there already; made anew by default.

        Raises:
            NotConvergedError: the model is not at a minimum, so a refit has no meaning; pass
                ``retrain``.
        """
        data = Data.of(queries)
        if scores is None:
            scores = self.explain(data)
        elif scores.provenance.identity != self._identity_of(data, self.objective.measure):
            raise InputError(
                "The scores belong to other queries, another measure, model or method. Pass those "
                "of explain(queries), or leave them out."
            )
        asked = validation.removals(scores, top, random, seed)
        if retrain is None:
            return validation.by_refit(self.risk, data, scores, asked)
        return validation.by_retraining(self.objective, data, scores, (asked, retrain))
