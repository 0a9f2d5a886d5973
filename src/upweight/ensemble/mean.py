"""Means over models: of other seeds, of other epochs."""

from collections.abc import Sequence
from typing import final

import numpy as np

from upweight.ensemble.combined import Combined
from upweight.ensemble.members import Member, members_at
from upweight.front import Influence
from upweight.states import State

__all__ = ["Ensemble"]


@final
class Ensemble(Combined):
    """Mean of the scores of several models of the same training data: of other seeds, or epochs.

    score[q, i] = Σ_m w_m score_m[q, i] / Σ_m w_m, the change to expect of a model of another seed.
    How far members are apart is said as the standard error of the mean, over all scores.

    Finished scores are averaged, and neither parameters, nor curvatures, nor kernels. TRAK (Park et
    al., 2023) as published averages two factors of a score apart, the products of projected
    gradients and 1 − p_i, and multiplies the means.

    Args:
        members: Influence objects, or functions that make one when it is its turn.
        weights: w_m; alike by default.

    Raises:
        InputError: there is no member, or weights are not one for each, finite, not negative and
            somewhere positive.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> data = torch.randn(20, 3), torch.arange(20) % 2
        >>> models = [nn.Linear(3, 2) for _ in range(3)]
        >>> members = [Influence(m, data, loss="cross_entropy", l2=0.1) for m in models]
        >>> Ensemble(members).explain(data).provenance.method
        'ensemble of 3: exact'
    """

    def __init__(self, members: Sequence[Member], weights: Sequence[float] | None = None) -> None:
        given = [1.0] * len(members) if weights is None else weights
        super().__init__(members, given, called="weights")
        self.coefficients = self.coefficients / self.coefficients.sum()

    @classmethod
    def of(
        cls,
        influence: Influence,
        states: Sequence[State],
        weights: Sequence[float] | None = None,
    ) -> "Ensemble":
        """An ensemble of the states of one architecture, read and asked one after the other.

        Args:
            influence: says everything but the state; its own model is no member, and left alone.
            states: state dicts, or paths of files of safetensors or ``torch.save``.
            weights: of the states; alike by default.

        Raises:
            InputError, ModelError: as for an ensemble; a state that cannot be read or does not fit
                is named when it is its turn.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> data = torch.randn(20, 3), torch.arange(20) % 2
            >>> states = [nn.Linear(3, 2).state_dict() for _ in range(3)]
            >>> one = Influence(nn.Linear(3, 2), data, loss="cross_entropy", l2=0.1)
            >>> len(Ensemble.of(one, states).extremes(data, k=2).top(0))
            2
        """
        return cls(members_at(influence, states), weights)

    def _name(self, methods: str) -> str:
        return f"ensemble of {len(self)}: {methods}"

    def _caveats(self, spread: float) -> tuple[str, ...]:
        alike = len(set(self.coefficients.tolist())) == 1
        weighed = "" if alike else ", weighted"
        about = f"mean of the scores of {len(self)} models{weighed}"
        # Members that count, if all counted alike (Kish, 1965).
        effective = 1 / float(np.square(self.coefficients).sum())
        if not effective > 1:
            return (about,)
        error = (max(spread - 1, 0.0) / (effective - 1)) ** 0.5
        return (f"{about}; its standard error is {error:.0%} of its size, over all scores",)
