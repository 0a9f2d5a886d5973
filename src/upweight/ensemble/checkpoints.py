"""TracIn: gradient dot products summed over the checkpoints of a training."""

from collections.abc import Sequence
from typing import final

from upweight.ensemble.combined import Combined
from upweight.ensemble.members import Member, members_at
from upweight.errors import InputError
from upweight.front import Influence
from upweight.methods import Method
from upweight.states import State

__all__ = ["TracIn", "tracin"]


@final
class TracIn(Combined):
    """Σ_k η_k share_i ∇m(q)·∇ℓ̃(z_i) over checkpoints k: TracInCP of Pruthi et al. (2020).

    Every checkpoint stands for one step of gradient descent of rate η_k on R. Without example i
    the step is one on R − share_i ℓ̃(z_i), and ends η_k share_i ∇ℓ̃(z_i) away; the score adds up what
    that does to m(q) to first order, as if no step changed the next. So it is a change on removal
    in the measure's unit, in the library's sign: for a loss, positive = helpful, which is TracIn's
    proponent. A checkpoint that stands for more steps has the sum of their rates.

    TracIn's own number Σ_k η_k ∇ℓ(q)·∇ℓ(z_i) is −``scores.upweight``, for an objective without L2
    or with removal="sum", whose removal leaves L2 alone.

    Args:
        members: Influence objects with method="no_hessian", or functions that make one.
        learning_rates: η_k.

    Raises:
        InputError: there is no member, or learning rates are not one for each, finite, not
            negative and somewhere positive.
    """

    def __init__(self, members: Sequence[Member], learning_rates: Sequence[float]) -> None:
        super().__init__(members, learning_rates, called="learning rates")

    def _refuse(self, member: Influence) -> None:
        row = member.method
        if not isinstance(row, Method) or row.solver is not None or row.rescale is not None:
            raise InputError(
                f"TracIn is made of gradient dot products, and this one's method is {row.name!r}. "
                "Use Influence(..., method='no_hessian'), or an Ensemble for other methods."
            )

    def _name(self, methods: str) -> str:
        return f"tracin over {len(self)}: {methods}"

    def _caveats(self, spread: float) -> tuple[str, ...]:
        del spread
        return (
            f"sum over {len(self)} checkpoints, each one step of gradient descent of its learning "
            f"rate ({self.coefficients.sum():g} in all), as if no step changed the next",
        )


def tracin(
    influence: Influence, states: Sequence[State], learning_rates: Sequence[float]
) -> TracIn:
    """TracIn over the states of one architecture, read and asked one after the other.

    Args:
        influence: with method="no_hessian"; says everything but the state. Its own model is left
            alone, and counts only if its state is among them.
        states: of the checkpoints: state dicts, or paths of files of safetensors or
            ``torch.save``.
        learning_rates: η_k of each; the sum of the rates of the steps that it stands for.

    Raises:
        InputError: the method is another, there is no state, or learning rates are not one for
            each, finite, not negative and somewhere positive.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> data = torch.randn(20, 3), torch.arange(20) % 2
        >>> states = [nn.Linear(3, 2).state_dict() for _ in range(3)]
        >>> one = Influence(nn.Linear(3, 2), data, loss="cross_entropy", method="no_hessian")
        >>> scores = tracin(one, states, [0.1, 0.1, 0.01]).explain(data)
        >>> scores.meaning.unit, scores.provenance.method
        ('nats', 'tracin over 3: no_hessian')
    """
    found = TracIn(members_at(influence, states), learning_rates)
    found._refuse(influence)
    return found
