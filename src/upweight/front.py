"""The front: one object that explains, audits, predicts what-ifs and proves itself."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, final

import numpy as np
from torch import nn

from upweight import audits, changes, derivatives, explanation, validation
from upweight.answers import (
    GroupEffects,
    L2Derivative,
    ParameterChange,
    Perturbation,
    Sweep,
    Validation,
    WhatIf,
)
from upweight.damping import Damping
from upweight.data import Data
from upweight.engine import located
from upweight.errors import InputError
from upweight.explanation import Question
from upweight.groups import Groups, effects
from upweight.l2 import derivative
from upweight.linalg import Inverse
from upweight.methods import Baseline, Method
from upweight.objective import Measure, Objective
from upweight.plan import Plan, make_plan
from upweight.prepared import Prepared, answering
from upweight.risk import Risk
from upweight.scores import Extremes, Scores
from upweight.tables import Table
from upweight.trainers import Comparison, compare

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
        damping: added to the curvature beside l2: a number, "auto", or what a FiniteTraining says.

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
        damping: Damping = 0.0,
    ) -> None:
        if isinstance(model, Objective):
            if loss is not None or l2 != 0.0:
                raise InputError("The Objective already carries loss and l2. Pass them only there.")
            objective = model
        else:
            if loss is None:
                raise InputError("Say what was minimised: loss='cross_entropy', for example.")
            objective = Objective(model, loss, l2=l2)
        self._made = Prepared(objective, Data.of(train), method, damping)

    def __repr__(self) -> str:
        objective = self._made.whole
        return (
            f"Influence of {len(self.data):,} training examples on "
            f"{type(objective.model).__name__} ({objective.loss.name}, {objective.space.size:,} "
            f"parameters, {objective.space.coverage:.1%} of all; method {self.method.name}, "
            f"damping {self.damping})"
        )

    @property
    def objective(self) -> Objective:
        """What was minimised, as a function of the parameters that the method looks at."""
        return self._made.objective

    @property
    def data(self) -> Data:
        """The training data."""
        return self._made.data

    @property
    def damping(self) -> Damping:
        """What is added to the curvature, as asked."""
        return self._made.damping

    @property
    def risk(self) -> Risk:
        """The objective bound to the training data, checked."""
        return self._made.risk

    @property
    def method(self) -> Method | Baseline:
        """The row of the method table."""
        return self._made.method

    @property
    @answering
    def inverse(self) -> Inverse:
        """(H + damping)⁻¹, prepared once."""
        return self._made.inverse

    @property
    def identity(self) -> str:
        """Hash of model, data and settings (one pass over the data)."""
        return self._made.identity

    def keep(
        self,
        *,
        factors: str | PathLike[str] | None = None,
        gradients: str | PathLike[str] | None = None,
    ) -> "Influence":
        """Keep fitted factors and training gradients in directories, and take them from there.

        They are reused for the same model, data, loss and fit alone, whatever the damping and the
        queries. Gradients take what ``plan`` says of disk.

        Args:
            factors: for Kronecker-factored methods.
            gradients: for networks.

        Raises:
            InputError: something was computed already.
        """
        self._made.keep(factors, gradients)
        return self

    @answering
    def check_loss(self, training_loss: Any) -> Comparison:
        """Whether this objective is the loss the model was trained with, or how it differs.

        Args:
            training_loss: a criterion that reduces, a function (model, batch) -> scalar, a Trainer
                of Hugging Face, or a LightningModule.

        Raises:
            InputError: it is none of these, or fails.
        """
        return compare(self.risk, training_loss)

    @answering
    def plan(self, queries: Any) -> Plan:
        """Passes, seconds and memory per stage, from a timed probe, before anything runs.

        Raises:
            InputError: whatever would stop the run itself.
        """
        data = Data.of(queries)
        self.objective.probe(data, role="queries")
        return make_plan(self._made, len(data))

    @answering
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
        asked = Question(self._made, Data.of(queries), measure, accept=accept)
        return explanation.explain(asked)

    @answering
    def explain_into(
        self, path: str | PathLike[str], queries: Any, *, replace: bool = False
    ) -> Scores:
        """The scores of ``explain`` in a run directory, written batch by batch.

        A killed run goes on where it was; the values are memory-mapped.

        Args:
            path: a new directory, or one of the same run.
            queries: like ``train``; inputs with targets.
            replace: write over a directory of another run.

        Raises:
            StoreError: the place belongs to another run or cannot be written.
            NotConvergedError, IndefiniteError: a solve failed.
        """
        asked = Question(self._made, Data.of(queries), None)
        return explanation.explain_into(asked, path, replace=replace)

    @answering
    def extremes(self, queries: Any, k: int = 10, *, measure: Measure | None = None) -> Extremes:
        """The k most helpful and most harmful examples of every query, kept while scores stream by.

        Memory is q·k and not q·N.

        Raises:
            NotConvergedError, IndefiniteError: a solve failed.
        """
        return explanation.extremes(Question(self._made, Data.of(queries), measure), k)

    @answering
    def sweep(
        self,
        queries: Any,
        dampings: Sequence[float] | None = None,
        *,
        measure: Measure | None = None,
    ) -> Sweep:
        """Scores at several dampings from one fit and one pass: what depends on the damping.

        Args:
            queries: like ``train``; inputs with targets.
            dampings: ascending; by default around the curvature's mean eigenvalue.
            measure: what is asked of a query; the objective's own by default.

        Raises:
            InputError: the method has no curvature to add a damping to.
        """
        return explanation.sweep(Question(self._made, Data.of(queries), measure), dampings)

    @answering
    def self_influence(self) -> np.ndarray:
        """Predicted rise of each example's own loss if it is removed, ``[N]``, in the loss's unit.

        share_i ∇ℓ_i H⁻¹ ∇ℓ̃_i, without the N x N matrix. Large: memorised, unusual or mislabelled.
        """
        self._made.refuse_ablation()
        return explanation.self_influence(self._made)

    def audit(self) -> Table:
        """Suspicious labels, worst first, from this one model, in cleanlab's column names."""
        return audits.audit(self.risk, self.self_influence())

    @answering
    def params(self, ids: Sequence[Any], *, accept: bool = False) -> ParameterChange:
        """Predicted change of the parameters if each of the examples is removed.

        Raises:
            DataError: an id is unknown.
        """
        return derivatives.parameter_change(self._made, ids, accept=accept)

    @answering
    def perturbation(
        self, queries: Any, ids: Sequence[Any], *, accept: bool = False
    ) -> Perturbation:
        """Predicted change of each query's measure per unit change of training inputs.

        Raises:
            DataError: an id is unknown.
            InputError: the inputs are integers.
        """
        return derivatives.perturbation(self._made, Data.of(queries), ids, accept=accept)

    @answering
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
        self._made.refuse_ablation()
        change = changes.Change.of(remove, relabel, reweight, replace)
        data = Data.of(on)
        rows, caveats = self._made.rows(data, self.objective.measure)
        return changes.predict(self.risk, change, data, rows, caveats)

    @answering
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
        self._made.refuse_ablation()
        method, data = self._made.fitted.require_fit(), Data.of(on)
        with located(self.risk):
            return effects(
                self.risk,
                Groups.of(self.data, groups),
                data,
                measure=self.objective.measure if measure is None else measure,
                inverse=self._made.inverse,
                newton=lambda rest, growth: method.invert(
                    method.fit(rest), self._made.shift * growth
                ),
            )

    @answering
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
        self._made.refuse_ablation()
        asked = self.objective.measure if measure is None else measure
        with located(self.risk):
            return derivative(self.objective, self._made.inverse, Data.of(queries), measure=asked)

    @answering
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
        elif scores.provenance.identity != self._made.identity_of(data, self.objective.measure):
            raise InputError(
                "The scores belong to other queries, another measure, model or method. Pass those "
                "of explain(queries), or leave them out."
            )
        asked = validation.removals(scores, top, random, seed)
        if retrain is None:
            return validation.by_refit(self.risk, data, scores, asked)
        return validation.by_retraining(self.objective, data, scores, (asked, retrain))
