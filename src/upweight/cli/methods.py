"""``upweight methods``: the table of methods."""

from upweight.cli.show import table
from upweight.methods import METHODS, Baseline, Method

__all__ = ["methods"]


def methods() -> int:
    """Print every method with its kind and one line of what it is."""
    rows = [(row.name, _kind(row), row.summary) for row in METHODS.values()]
    table("upweight run RECIPE.py --method ...", ("method", "curvature", "what it is"), rows)
    return 0


def _kind(row: Method | Baseline) -> str:
    """The curvature of a row, if it has one."""
    if isinstance(row, Baseline):
        return "baseline"
    return "none" if row.solver is None else str(row.curvature)
