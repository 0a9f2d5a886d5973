"""``upweight doctor``: is this machine, this model and this data fit for influence?"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import final

import torch

from upweight.checks import probe
from upweight.cli.show import table
from upweight.data import Data
from upweight.errors import UpweightError
from upweight.front import Influence
from upweight.recipe import Recipe, load
from upweight.study import off_minimum, versions

__all__ = ["doctor"]

OPTIONAL = ("pandas", "polars", "pyarrow", "matplotlib", "scikit-learn")
DENSE_LIMIT = 20_000
GIB = 2**30


@final
@dataclass(frozen=True)
class _Check:
    """One line of the examination; state is "ok", "note" or "FAIL"."""

    state: str
    what: str
    detail: str


def doctor(recipe: Path | None) -> int:
    """Print what was found; 1 if a check fails.

    Raises:
        RecipeError: the recipe cannot be loaded.
    """
    checks = list(_machine())
    if recipe is not None:
        checks += _recipe(load(recipe))
    table("upweight doctor", ("", "what", "found"), [(c.state, c.what, c.detail) for c in checks])
    return int(any(check.state == "FAIL" for check in checks))


def _machine() -> Iterator[_Check]:
    for name, version in versions().items():
        yield _Check("ok", name, version)
    yield _Check("ok", "system", f"{platform.system()} {platform.machine()}")
    yield _Check("ok", "device", _device())
    yield _Check("ok", "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    present, absent = [], []
    for name in OPTIONAL:
        try:
            present.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    missing = f"; not installed: {', '.join(absent)}" if absent else ""
    yield _Check("ok", "optional packages", (", ".join(present) or "none") + missing)


def _device() -> str:
    if torch.cuda.is_available():
        return f"CUDA: {torch.cuda.get_device_name(0)}"
    return "MPS" if torch.backends.mps.is_available() else "CPU only"


def _recipe(recipe: Recipe) -> Iterator[_Check]:
    """Checks of a recipe; the first that stops the others is the last."""
    what = "recipe"
    try:
        influence, queries = recipe.influence("exact"), Data.of(recipe.queries)
        yield _Check("ok", what, _names(recipe))
        for examine in (_data, _objective, _model, _coverage, _minimum, _curvature):
            what = examine.__name__.strip("_")
            yield examine(influence, queries)
    except UpweightError as error:
        yield _Check("FAIL", what, str(error))


def _names(recipe: Recipe) -> str:
    """Which names were read, so that one that was ignored is missed."""
    rest = [f.name for f in fields(recipe) if f.name not in recipe.stated]
    return f"reads {', '.join(recipe.stated)}; as by default: {', '.join(rest)}"


def _data(influence: Influence, queries: Data) -> _Check:
    """Two readings must agree."""
    for name, data in (("training data", influence.data), ("queries", queries)):
        if data.fingerprint() != data.fingerprint():
            return _Check(
                "FAIL", "data", f"Two readings of the {name} differ. Switch augmentation off."
            )
    found = (
        f"{len(influence.data):,} training examples, {len(queries):,} queries; two readings agree"
    )
    return _Check("ok", "data", found)


def _objective(influence: Influence, queries: Data) -> _Check:
    """One finite loss per example that depends on that example alone."""
    objective = influence.objective
    value = influence.risk.value()
    probe(objective, queries, objective.measure)
    return _Check("ok", "objective", f"{value:.6g} with L2; one finite loss per example")


def _model(influence: Influence, queries: Data) -> _Check:
    """Two evaluations must agree to the last bit."""
    first, second = influence.risk.value(), influence.risk.value()
    if first != second:
        detail = f"Two evaluations of the objective differ by {abs(first - second):.1e}"
        return _Check("note", "model", f"{detail}: runs will not repeat bit by bit.")
    return _Check("ok", "model", "two evaluations of the objective agree bit by bit")


def _coverage(influence: Influence, queries: Data) -> _Check:
    space = influence.objective.space
    detail = f"{space.size:,} parameters, {space.coverage:.1%} of the model's, {space.dtype}"
    return _Check("ok" if space.coverage == 1 else "note", "coverage", detail)


def _minimum(influence: Influence, queries: Data) -> _Check:
    """Influence describes a minimum, so the gradient of the full objective should vanish."""
    slope = float(influence.risk.gradient().norm())
    off = off_minimum(slope)
    if off is None:
        return _Check("ok", "minimum", f"gradient norm {slope:.1e}: at a minimum")
    return _Check("note", "minimum", off)


def _curvature(influence: Influence, queries: Data) -> _Check:
    """Which method the size allows."""
    size = influence.objective.space.size
    if size <= DENSE_LIMIT:
        need = f"a dense Hessian takes {8 * size**2 / GIB:.2g} GiB"
        return _Check("ok", "curvature", f"{need}: method 'exact' fits")
    return _Check("note", "curvature", "too many parameters for 'exact': use --method cg")
