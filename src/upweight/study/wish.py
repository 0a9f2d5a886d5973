"""What is wanted of a study."""

from dataclasses import dataclass
from typing import final

from upweight.damping import Damping
from upweight.errors import InputError

__all__ = ["Wish"]


@final
@dataclass(frozen=True)
class Wish:
    """What is wanted of a study.

    Attributes:
        method: a row of ``METHODS`` or what else Influence takes.
        damping: added to the curvature.
        top: helpful and harmful examples kept of each query.
        removals: how many influential and how many random examples are really removed, one at a
            time; 0 for none, None for up to 20 as the data allow.
        seed: of the random removals.
    """

    method: object = "exact"
    damping: Damping = 0.0
    top: int = 5
    removals: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top < 1:
            raise InputError(f"top must be at least 1, got {self.top}. Ask for 5, for example.")

    def count(self, examples: int) -> int:
        """Removals of each kind, as far as the data allow.

        Raises:
            InputError: more were asked for than there are, or too few to compare.
        """
        if self.removals is None:
            most = min(20, examples // 3)
            return most if most >= 3 else 0
        if self.removals and not 3 <= self.removals <= examples // 2:
            raise InputError(
                f"removals must be 0, or from 3 to half of the {examples} training examples, got "
                f"{self.removals}. As many influential as random examples are removed."
            )
        return self.removals
