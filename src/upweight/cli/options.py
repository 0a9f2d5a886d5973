"""Options that commands share; nothing here imports more than the parser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, final

from cyclopts import Parameter

__all__ = ["Asked", "Place"]


@final
@Parameter(name="*")
@dataclass(frozen=True)
class Asked:
    """What is computed.

    Attributes:
        method: a row of ``upweight methods``.
        damping: added to the curvature.
        top: examples kept per query.
        removals: examples really removed.
        seed: of the random removals.
    """

    method: Annotated[str, Parameter(help="How influence is computed: see 'upweight methods'.")] = (
        "exact"
    )
    damping: Annotated[
        float | Literal["auto"],
        Parameter(
            help="Added to the curvature beside the recipe's l2. auto: nothing where all "
            "parameters have l2, else a tenth of the curvature's mean eigenvalue."
        ),
    ] = 0.0
    top: Annotated[int, Parameter(help="Helpful and harmful examples kept of each query.")] = 5
    removals: Annotated[
        int | None,
        Parameter(
            help="Influential and random examples, this many of each, that are really removed to "
            "prove the scores. 0: none. By default 20, or what the data allow."
        ),
    ] = None
    seed: Annotated[int, Parameter(help="Draws the random removals.")] = 0


@final
@Parameter(name="*")
@dataclass(frozen=True)
class Place:
    """Where the results go.

    Attributes:
        out: the run directory.
        replace: whether a directory of another run may be replaced.
    """

    out: Annotated[
        Path | None,
        Parameter(
            help="Run directory, complete or absent. By default upweight-NAME of the recipe, of "
            "'validate' upweight-NAME-evidence, of 'demo' upweight-demo."
        ),
    ] = None
    replace: Annotated[
        bool, Parameter(negative="", help="Replace a directory that belongs to another run.")
    ] = False
