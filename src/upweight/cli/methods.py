"""``upweight methods``: the table of methods."""

from upweight.cli.show import table
from upweight.methods import METHODS, Baseline

__all__ = ["methods"]


def methods() -> int:
    """Print every method with its kind and one line of what it is."""
    rows = [
        (row.name, "baseline" if isinstance(row, Baseline) else str(row.curvature), row.summary)
        for row in METHODS.values()
    ]
    table("upweight run RECIPE.py --method ...", ("method", "curvature", "what it is"), rows)
    return 0
