"""Questions about changes: what happens to the model if its data or its L2 change."""

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any

from upweight import changes, derivatives, whatifs
from upweight.answers import GroupEffects, L2Derivative, ParameterChange, Perturbation, WhatIf
from upweight.calibration import Calibration
from upweight.data import Data
from upweight.engine import located
from upweight.front.asked import Asked
from upweight.groups import Groups, effects, refitted
from upweight.l2 import derivative
from upweight.objective import Measure
from upweight.prepared import answering
from upweight.retraining import How, Truth

__all__ = ["Changing"]


class Changing(Asked, ABC):
    """Predicted changes of queries and of parameters."""

    _calibration: Calibration | None = None

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
        retrain: How | None = None,
    ) -> WhatIf:
        """Predicted measures of queries after changing the training data.

        To first order; for removals also to second, where the curvature is factorised; with 90 %
        intervals once ``calibrate`` has held predictions against retrained models.

        Args:
            on: queries.
            remove: ids to drop.
            relabel: id to new target (any size of change: z → z_δ of Koh & Liang, 2017).
            reweight: id to a factor on its weight (0 removes, 2 doubles).
            replace: id to a new example (inputs ..., target).
            retrain: how to really train again, with and without the change, as in ``retrain``; the
                answer then shows both what was predicted and what happened.

        Raises:
            DataError: an id is unknown, or named twice, or nothing is left to train on.
            InputError: the change is of a kind that cannot be retrained.
        """
        self._made.refuse_ablation()
        change, data = changes.Change.of(remove, relabel, reweight, replace), Data.of(on)
        with located(self.risk):
            found = whatifs.whatif(self._made, change, data, self._calibration)
        if retrain is None:
            return found
        return whatifs.really(self._made, change, data, found, retrain)

    @answering
    def calibrate(self, queries: Any, truth: Truth) -> Calibration:
        """Hold predictions against retrained models; from then on what-ifs have intervals.

        They hold 90 % of changes drawn like the truth's, however wrong the predictions are: the
        better they are, the narrower. See ``calibration.py``.

        Args:
            queries: those that the truth measured, or some of them.
            truth: of this model, from ``retrain``; at least 9 different changes of the data, 19 for
                narrower intervals.

        Raises:
            InputError: the truth is of other data, queries, measure or model, or of too few
                changes.
        """
        self._made.refuse_ablation()
        with located(self.risk):
            self._calibration = whatifs.calibrated(self._made, Data.of(queries), truth)
        return self._calibration

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
            cheap = whatifs.factorised(self._made)
            return effects(
                self.risk,
                Groups.of(self.data, groups),
                data,
                measure=self.objective.measure if measure is None else measure,
                inverse=self._made.inverse,
                step=cheap.step
                if cheap is not None
                else refitted(
                    lambda rest, growth: method.invert(method.fit(rest), self._made.shift * growth)
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
