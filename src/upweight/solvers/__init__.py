"""Solvers that rows of the table bring with them, one file each; common ones are in linalg."""

from upweight.solvers.lissa import LiSSA

__all__ = ["LiSSA"]
