"""Recipes: a model, its data and its loss, defined by name in a Python file of the user's."""

import difflib
import importlib.util
import itertools
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from os import PathLike
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from upweight.damping import Damping
from upweight.data import Data
from upweight.errors import RecipeError
from upweight.front import Influence
from upweight.objective import Measure, Objective, Removal
from upweight.parameters import Select
from upweight.report import picture
from upweight.retraining import How, Own, Training
from upweight.sources import leaves

__all__ = ["Recipe", "load"]

_numbers = itertools.count()


@final
@dataclass(frozen=True)
class Recipe:
    """What a run needs to know; a recipe file defines the same names at its top level.

    Attributes:
        model: the trained module, in the mode it is to be explained in.
        train: what it was trained on, as in Influence.
        queries: what to explain, like ``train``.
        loss: what was minimised per example: a name, a torch criterion or a callable.
        l2: λ of ½λ‖θ‖², or a mapping of name patterns to λ.
        removal: "mean" or "sum", what happens to L2 when an example goes.
        parameters: which parameters to differentiate; None for all.
        measure: what is asked of a query.
        ids: one per training example; by default the index of pandas frames, else positions.
        label_names: name of each class, for the report.
        image_shape: shape in which an example's input is a picture, for the report.
        title: of the report.
        training: how the model was trained, for ``upweight validate``.
        retrain: in its place a function (kept positions, seed) -> model, or an Own.

    Raises:
        RecipeError: a value is of the wrong kind.

    Example:
        >>> rows = (torch.randn(8, 3), torch.arange(8) % 2)
        >>> recipe = Recipe(nn.Linear(3, 2), rows, rows, "cross_entropy", l2=0.1)
        >>> recipe.influence("exact").objective.space.size
        8
    """

    model: nn.Module
    train: Any
    queries: Any
    loss: object
    l2: float | Mapping[str, float] = 0.0
    removal: Removal = "mean"
    parameters: Select = None
    measure: Measure = "loss"
    ids: Sequence[Any] | None = None
    label_names: Sequence[str] | None = None
    image_shape: Sequence[int] | None = None
    title: str = "Influence report"
    training: Training | None = None
    retrain: Own | Callable[..., nn.Module] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise _wrong("model", "a torch.nn.Module", self.model)
        if not isinstance(self.title, str):
            raise _wrong("title", "a text", self.title)
        if not _all_of(self.label_names, str):
            raise _wrong("label_names", "a list of texts, one per class", self.label_names)
        if not _all_of(self.image_shape, int):
            raise _wrong("image_shape", "a tuple of whole numbers like (28, 28)", self.image_shape)
        if not isinstance(self.training, (Training, type(None))):
            raise _wrong("training", "a Training of upweight", self.training)
        if not (self.retrain is None or isinstance(self.retrain, Own) or callable(self.retrain)):
            raise _wrong("retrain", "a function (positions, seed) -> model", self.retrain)
        if self.training is not None and self.retrain is not None:
            raise RecipeError(
                "A recipe defines training, or a function retrain, and not both. Remove one."
            )

    @property
    def stated(self) -> tuple[str, ...]:
        """Names that the recipe gives a value of its own."""
        given = [name for name in OPTIONAL if getattr(self, name) is not _DEFAULTS[name]]
        return (*REQUIRED, *given)

    @property
    def how(self) -> How | None:
        """How models are trained again; None where the recipe does not say."""
        return self.training if self.retrain is None else self.retrain

    def objective(self) -> Objective:
        """The objective with everything the recipe says of it."""
        return Objective(
            self.model,
            self.loss,
            l2=self.l2,
            removal=self.removal,
            parameters=self.parameters,
            measure=self.measure,
        )

    def influence(self, method: object, damping: Damping = 0.0) -> Influence:
        """The front over this recipe's objective and training data."""
        data = Data.of(self.train, ids=self.ids)
        return Influence(self.objective(), data, method=method, damping=damping)

    def name(self, label: Any) -> str:
        """A label for a person: its name, or its number; empty where it is not one number.

        Example:
            >>> rows = (torch.randn(4, 3), torch.arange(4) % 2)
            >>> named = Recipe(nn.Linear(3, 2), rows, rows, "hinge", label_names=["no", "yes"])
            >>> named.name(1), named.name(torch.tensor([0])), named.name(0.25), named.name(None)
            ('yes', 'no', '0.25', '')
        """
        if isinstance(label, Tensor):
            label = label.item() if label.numel() == 1 else None
        if not isinstance(label, (int, float)):
            return ""
        if self.label_names and label in range(len(self.label_names)):
            return self.label_names[int(label)]
        return f"{label:.4g}" if isinstance(label, float) else str(label)

    def look(self, data: Data, place: int) -> dict[str, Any]:
        """Id, label and picture (None without ``image_shape``) of the example at a place.

        Raises:
            RecipeError: the input does not fill ``image_shape``.
        """
        batch = data.at(torch.tensor([place]))
        shown = None
        if self.image_shape is not None:
            pixels = next(leaves(batch.inputs))
            if pixels.numel() != math.prod(self.image_shape):
                raise RecipeError(
                    f"image_shape {tuple(self.image_shape)} does not hold the {pixels.numel()} "
                    "values of an example's input. Correct it, or leave it out to show no pictures."
                )
            shown = picture(pixels.reshape(tuple(self.image_shape)).cpu().numpy())
        label = self.name(batch.targets)
        return {"id": data.ids[place].item(), "picture": shown, "label": label}


REQUIRED = tuple(f.name for f in fields(Recipe) if f.default is MISSING)
_DEFAULTS = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}
OPTIONAL = tuple(_DEFAULTS)
# Values a name takes: what is of another kind is a variable of the recipe's own.
_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "l2": lambda value: isinstance(value, (int, float, Mapping)),
    "removal": lambda value: isinstance(value, str),
    "parameters": lambda value: isinstance(value, (str, FunctionType)) or _all_of(value, str),
    "measure": lambda value: isinstance(value, (str, FunctionType)),
    "ids": lambda value: isinstance(value, (Sequence, np.ndarray)),
    "label_names": lambda value: _all_of(value, str),
    "image_shape": lambda value: _all_of(value, int),
    "title": lambda value: isinstance(value, str),
    "training": lambda value: isinstance(value, Training),
    "retrain": lambda value: isinstance(value, (FunctionType, Own)),
}
ALIKE, LONG = 0.8, 5
_ELSEWHERE = {
    "method": "Give it on the command line, as --method",
    "damping": "Give it on the command line, as --damping",
    "weight_decay": "State it as l2, in the objective mean loss + l2/2 · squares (0 for none)",
}


def load(path: str | PathLike[str]) -> Recipe:
    """Run a recipe file and take the documented names out of it.

    Modules beside the file can be imported from it. ``sys.path`` and ``sys.modules`` are as before
    afterwards, but for what the recipe imported from elsewhere.

    Raises:
        RecipeError: the file cannot be read or raises, or a name is missing or of a wrong kind.
    """
    path = Path(path).absolute()
    namespace = vars(_execute(path))
    missing = [name for name in REQUIRED if name not in namespace]
    if missing:
        there = [
            name
            for name, value in namespace.items()
            if not name.startswith("_") and not isinstance(value, ModuleType)
        ]
        raise RecipeError(
            f"{path.name} does not define {', '.join(missing)}. A recipe defines "
            f"{', '.join(REQUIRED)} (and may define {', '.join(OPTIONAL)}); this one defines "
            f"{', '.join(there) or 'nothing'}."
        )
    known = {name: namespace[name] for name in REQUIRED + OPTIONAL if name in namespace}
    try:
        _refuse_misspelt(namespace)
        return Recipe(**known)
    except RecipeError as error:
        raise RecipeError(f"{path.name}: {error}") from error


def _refuse_misspelt(namespace: Mapping[str, Any]) -> None:
    """A name that means to say something and would be ignored must not pass in silence."""
    free = [option for option in OPTIONAL if option not in namespace]
    for name, value in namespace.items():
        imported = isinstance(value, FunctionType) and value.__module__ != namespace["__name__"]
        if name.startswith("_") or name in REQUIRED + OPTIONAL or imported or value is None:
            continue
        meant = _meant(name, value, free)
        remedy = _ELSEWHERE.get(name) if meant is None else f"Write {meant}"
        if remedy is not None and not (name == "weight_decay" and "l2" in namespace):
            raise RecipeError(
                f"{name} is no name that a recipe reads. {remedy}, or call the variable something "
                "else."
            )


def _meant(name: str, value: object, options: Sequence[str]) -> str | None:
    """The optional name that another one looks like, if its value is of that name's kind."""
    plain = name.lower()
    # Of three letters, one that differs is another word.
    fits = [
        option
        for option in options
        if _KINDS[option](value) and (len(option) >= LONG or option == plain)
    ]
    return next(iter(difflib.get_close_matches(plain, fits, 1, ALIKE)), None)


def _wrong(name: str, expected: str, found: object) -> RecipeError:
    return RecipeError(f"{name} must be {expected}, got {type(found).__name__}. Change it there.")


def _all_of(values: object, kind: type) -> bool:
    if values is None:
        return True
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    return listed and all(isinstance(value, kind) for value in values)  # type: ignore[attr-defined]


def _execute(path: Path) -> ModuleType:
    """The module that a file makes, run once."""
    if path.suffix != ".py" or not path.is_file():
        state = "is not a file ending in .py" if path.exists() else "does not exist"
        raise RecipeError(
            f"A recipe is a Python file, and {path} {state}. 'upweight new RECIPE.py' writes one."
        )
    spec = importlib.util.spec_from_file_location(f"_upweight_recipe_{next(_numbers)}", path)
    if spec is None:
        raise RecipeError(f"Python cannot load {path}. Give it a plain .py name.")
    module = importlib.util.module_from_spec(spec)
    with _importable(path, module):
        try:
            # Compiled here and not by the loader, so that no bytecode is written beside the file.
            exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
        except (Exception, SystemExit) as error:
            raise RecipeError(
                f"{path.name}, line {_line(error, path)}: {type(error).__name__}: "
                f"{_first_line(error)} Correct the recipe and run again."
            ) from error
    return module


def _line(error: BaseException, path: Path) -> str:
    """Where in the recipe an error arose: the innermost of its own lines."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return str(error.lineno)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return str(lines[-1]) if lines else "?"


def _first_line(error: BaseException) -> str:
    text = (error.msg if isinstance(error, SyntaxError) else str(error)).strip()
    line = text.splitlines()[0] if text else "(no message)"
    return line if line.endswith((".", "!", "?")) else f"{line}."


@contextmanager
def _importable(path: Path, module: ModuleType) -> Iterator[None]:
    """The module and its neighbours can be imported inside; neither stays behind."""
    folder, before, search = path.parent, set(sys.modules), list(sys.path)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = search
        # A neighbour's name must not shadow that of another recipe's neighbour. What lies deeper
        # (an environment inside the project folder) is nobody's neighbour and stays.
        new = set(sys.modules) - before
        roots = {name.partition(".")[0] for name in new} - before
        roots = {root for root in roots if _lies_in(folder, root)} | {module.__name__}
        for name in new:
            if name.partition(".")[0] in roots:
                del sys.modules[name]


def _lies_in(folder: Path, name: str) -> bool:
    """Whether a loaded top-level module is a file or a package of a folder."""
    source = getattr(sys.modules.get(name), "__file__", None)
    return source in (str(folder / f"{name}.py"), str(folder / name / "__init__.py"))
