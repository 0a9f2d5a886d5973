"""The front, one file per kind of question."""

from upweight.front.influence import Influence

__all__ = ["Influence"]
