"""Questions about the method itself: which one, and with which damping, retraining confirms."""

from abc import ABC
from collections.abc import Sequence
from typing import Any

from upweight.data import Data
from upweight.explanation import Question
from upweight.front.asked import Asked
from upweight.methods import Method, resolve_method
from upweight.outcomes import Outcomes
from upweight.prepared import Prepared, answering
from upweight.retraining import Truth
from upweight.tuning import Tuning, tuned
from upweight.whatifs import asked_of

__all__ = ["Choosing"]


class Choosing(Asked, ABC):
    """Method and damping by evidence."""

    @answering
    def tune(
        self,
        queries: Any,
        truth: Truth,
        *,
        methods: Sequence[object] | None = None,
        dampings: Sequence[float] | None = None,
        seed: int = 0,
    ) -> Tuning:
        """Choose method and damping by half of what retraining found, and judge by the other half.

        Every method is fitted once, and all dampings share that fit and one pass. Compared is the
        linear datamodeling score (Park et al., 2023). ``tuned`` makes an Influence of the result.

        Args:
            queries: those that the truth measured, or some of them.
            truth: of this model, from ``retrain``; at least 16 removals, best of random halves.
            methods: as for ``method=``; this one's alone by default, which is tried in any case.
            dampings: to try beside this one's own; by default from a thousandth of the curvature's
                mean eigenvalue to ten times it.
            seed: of the halves.

        Raises:
            InputError: the truth is of other data, queries, measure or model, or has too few
                changes; or a method predicts no change.
        """
        data, mine = Data.of(queries), self._untuned()
        outcomes = Outcomes.of(truth, asked_of(mine, data))
        others = [self._with(method) for method in methods or () if method != mine.asked]
        return tuned(
            [mine, *others],
            lambda made: Question(made, data, None),
            outcomes,
            dampings=dampings,
            seed=seed,
        )

    def _untuned(self) -> Prepared:
        """What answers now, with a damping to start from where retraining is to choose one."""
        made = self._made
        if made.damping != "validated":
            return made
        return Prepared(made.whole, made.data, made.asked, "auto")

    def _with(self, asked: object) -> Prepared:
        """The same model and data with another method."""
        made, row = self._untuned(), resolve_method(asked)
        has_damping = isinstance(row, Method) and row.fits
        return Prepared(made.whole, made.data, asked, made.damping if has_damping else 0.0)
