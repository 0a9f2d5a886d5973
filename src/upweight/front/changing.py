"""Questions about changes: what happens to the model if its data or its L2 change."""

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any

from upweight import changes, derivatives
from upweight.answers import GroupEffects, L2Derivative, ParameterChange, Perturbation, WhatIf
from upweight.data import Data
from upweight.engine import located
from upweight.front.asked import Asked
from upweight.groups import Groups, effects, refitted
from upweight.l2 import derivative
from upweight.linalg import CholeskyInverse, MeanOperator
from upweight.methods import Method
from upweight.newton import Factorised
from upweight.objective import Measure
from upweight.prepared import Prepared, answering

__all__ = ["Changing"]


def factorised(made: Prepared) -> Factorised | None:
    """The factorised curvature, where a group's part can be taken out of it; None elsewhere."""
    if not isinstance(made.method, Method) or not made.method.fits:
        return None
    inverse = made.inverse
    if not isinstance(inverse, CholeskyInverse) or not isinstance(made.curvature, MeanOperator):
        return None
    return Factorised(made.method.fit, inverse, made.shift)


class Changing(Asked, ABC):
    """Predicted changes of queries and of parameters."""

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
            cheap = factorised(self._made)
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
