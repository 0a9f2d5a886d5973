"""What a row of contenders is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

__all__ = ["FLOOR", "LONG", "Contender"]

FLOOR = "floor"
LONG = 7200.0  # seconds that methods of many passes may take on large networks


@final
@dataclass(frozen=True)
class Contender:
    """One library with its settings.

    Attributes:
        name: of the row in the results.
        module: file in this folder.
        settings: what ``run`` is called with.
        note: what a reader should know about the settings.
        dtype: of the data and the model.
        environment: folder in ``.venv-peers`` with its interpreter; "" for the harness's own.
        packages: whose versions are stored.
        repeats: runs, each in a process of its own; the median is reported.
        limit_s: seconds after which a run is stopped.
        queries: only so many of the task's queries; the cost is then scaled up to all of them.
        epoch: of the checkpoint whose weights are looked at, instead of the final ones.
    """

    name: str
    module: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    dtype: str = "float32"
    environment: str = ""
    packages: tuple[str, ...] = ("torch", "numpy")
    repeats: int = 1
    limit_s: float = 1800.0
    queries: int | None = None
    epoch: int | None = None
