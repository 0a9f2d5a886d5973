"""Sign, scale and unit of every number the library reports, fixed here and nowhere else.

score[q, i] is the predicted change of query q's measure when training example i is removed and
the model refitted:

    score[q, i] = + share_i · ∇m(q) H⁻¹ ∇ℓ̃(z_i),    share_i = w_i / Σ w  (1/n without weights)

ℓ̃ is the loss with its L2 part when removal is "mean", and without when it is "sum". For a loss,
positive means helpful (removal raises the loss) and negative harmful. Koh & Liang's (2017)
I_up,loss(z_i, q) is −score / share_i, that is −n · score.
"""

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from upweight.objective import Measure, Objective

__all__ = ["Meaning", "from_removal", "meaning_of", "removal_gradient_row", "removal_score"]


@final
@dataclass(frozen=True)
class Meaning:
    """What a score says.

    Attributes:
        measure: what is asked of the query.
        unit: of the measure.
        helpful: +1 when a positive score means helpful, −1 when it means harmful, 0 when a
            user's own measure does not say.
        change: whether it is a change on removal; what a baseline says is not.
        per: what scores are divided by, in words or as a formula; they rank then, and have no size.
    """

    measure: str
    unit: str
    helpful: int
    change: bool = True
    per: str = ""

    @property
    def score_unit(self) -> str:
        """Of the scores: the measure's own, or that over what they are divided by."""
        return f"{self.unit} per {self.per}" if self.per else self.unit

    @property
    def column(self) -> str:
        """Name of the score's column in a table."""
        return f"{self.measure}_change_if_removed" if self.change else self.measure

    def sentence(self) -> str:
        """One sentence for a person."""
        if not self.change:
            words = self.measure.replace("_", " ").capitalize()
            return f"{words} ({self.unit}): larger comes first. A baseline, no effect of removal."
        says = {
            1: "positive = helpful, negative = harmful",
            -1: "positive = harmful, negative = helpful",
            0: "positive = removing the example raises it",
        }[self.helpful]
        return (
            f"Predicted change of the query's {self.measure.replace('_', ' ')} ({self.score_unit}) "
            f"if the training example is removed; {says}."
        )


def meaning_of(objective: Objective, measure: Measure) -> Meaning:
    """The meaning of scores of a measure."""
    if callable(measure):
        return Meaning(getattr(measure, "__name__", "measure"), "own unit", 0)
    if measure == "loss":
        return Meaning("loss", objective.loss.unit, 1)
    return Meaning(measure, "nats" if measure == "log_probability" else "logits", -1)


def removal_score(products: Tensor, share: Tensor) -> Tensor:
    """Products s_q·∇ℓ̃_i ``[q, n]`` and shares ``[n]`` to scores: change on removal."""
    return products * share


def from_removal(scores: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Scores to the paper's I_up,loss = −score / share; NaN for examples without weight."""
    derivative: np.ndarray = np.full_like(scores, np.nan)
    np.divide(-scores, shares, out=derivative, where=np.broadcast_to(shares > 0, scores.shape))
    return derivative


def removal_gradient_row(objective: Objective) -> Tensor:
    """What L2 adds to every example's gradient: Λθ when removal is "mean", 0 when it is "sum"."""
    row = objective.space.row()
    return objective.l2 * row if objective.removal == "mean" else torch.zeros_like(row)
