"""What every part of the front rests on: a model, its data and a method, prepared once."""

from abc import ABC, abstractmethod

from upweight.damping import Damping
from upweight.data import Data
from upweight.linalg import Inverse
from upweight.methods import Baseline, Method
from upweight.objective import Objective
from upweight.prepared import Prepared, answering
from upweight.risk import Risk

__all__ = ["Asked"]


class Asked(ABC):
    """A model with its training data and a method, of which questions are asked.

    Args:
        made: what answers rest on.
    """

    def __init__(self, made: Prepared) -> None:
        self._made = made

    @abstractmethod
    def __repr__(self) -> str:
        """One line of what is asked."""

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
