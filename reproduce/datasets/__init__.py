"""The real data of the experiments."""

from reproduce.datasets.digits import Digits, mnist, ones_and_sevens

__all__ = ["Digits", "mnist", "ones_and_sevens"]
