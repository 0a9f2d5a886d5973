"""One look for all figures: few colours, no boxes, units on every axis."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "RED", "against", "panels"]

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#d9822b", "#2e8b57", "#b03a48", "#8a8f98"


def panels(
    columns: int, rows: int = 1, *, size: tuple[float, float] = (4.0, 3.9), share_y: bool = False
) -> tuple[Figure, Any]:
    """A figure and its axes ``[rows, columns]`` (squeezed), without a display."""
    drawing = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = drawing.subplots(rows, columns, sharey=share_y)
    for axis in np.atleast_1d(axes).ravel():
        axis.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def against(
    axis: Any,
    groups: Sequence[tuple[str, np.ndarray, np.ndarray]],
    *,
    unit: str,
    reach: float | None = None,
) -> None:
    """Scatter of actual over predicted with the diagonal.

    Args:
        axis: matplotlib's.
        groups: label, predicted and actual values of each colour.
        unit: of both axes.
        reach: half width of both axes; by default what the values need.
    """
    if reach is None:
        reach = 1.1 * max(float(np.abs(part).max()) for _, *both in groups for part in both)
    axis.plot([-reach, reach], [-reach, reach], color="0.6", linewidth=0.8, zorder=0)
    colours = (BLUE, ORANGE, GREEN, RED)
    for (label, predicted, actual), colour in zip(groups, colours, strict=False):
        axis.scatter(predicted, actual, s=9, color=colour, alpha=0.7, linewidth=0, label=label)
    axis.set(
        xlabel=f"predicted change ({unit})", ylabel=f"actual change ({unit})",
        xlim=(-reach, reach), ylim=(-reach, reach),
    )  # fmt: skip
    axis.legend(frameon=False, fontsize=8)
