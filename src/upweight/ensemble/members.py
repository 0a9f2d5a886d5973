"""Members of an ensemble: how they come about, and what they must have in common."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import final

import numpy as np

from upweight.fingerprints import fingerprint
from upweight.front import Influence
from upweight.states import State

__all__ = ["Common", "Member", "members_at"]

Member = Influence | Callable[[], Influence]


def members_at(influence: Influence, states: Sequence[State]) -> list[Member]:
    """Functions that make the members of some states."""
    return [partial(influence.at, state) for state in states]


@final
class Common:
    """What members of an ensemble have in common: data with ids and weights, and the loss.

    The shares of examples follow from these two.

    Args:
        member: any of them.
    """

    def __init__(self, member: Influence) -> None:
        objective = member.objective
        self.data, self.loss, self.removal = member.data, objective.loss, objective.removal

    @cached_property
    def fingerprint(self) -> str:
        """Of the training data."""
        return self.data.fingerprint()

    def difference(self, other: "Common") -> str | None:
        """What another member has different, in words."""
        if not np.array_equal(self.data.ids, other.data.ids):
            return "other ids"
        if self.data is not other.data and self.fingerprint != other.fingerprint:
            return "other training data"
        if self.loss is not other.loss and fingerprint(self.loss) != fingerprint(other.loss):
            return "another loss"
        return None if self.removal == other.removal else "another removal convention"
