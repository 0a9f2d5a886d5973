"""Hashes that tell one run from another: tensors, models, functions by what they do."""

import argparse
import functools
import hashlib
import os
import re
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from upweight.forms import form_of, objects_of, values_of

__all__ = ["fingerprint"]

_PLAIN = (str, bytes, int, float, complex, bool, type(None), np.generic, torch.dtype, torch.device)
_SHORT = {str, int, float, bool, type(None)}
_SAID = (range, slice, re.Pattern, Decimal, Fraction, date, timedelta)
# What a global of a function is known by its content for, whoever wrote its class.
_CONTENT = (
    *_PLAIN, *_SAID, Tensor, np.ndarray, Mapping, list, tuple, set, frozenset, deque, os.PathLike,
    functools.partial, types.MethodType, types.SimpleNamespace, argparse.Namespace, nn.Module,
    Dataset, DataLoader,
)  # fmt: skip


def fingerprint(value: Any) -> str:
    """Hash a value (16 hex digits), the same in every process.

    Tensors and arrays count by dtype, shape and bytes, mappings and sequences by their items,
    modules by what they compute, other objects by their class and attributes. Functions count by
    name, code, what they close over, and the globals that they name; classes by their functions.
    Of libraries it is the name alone that counts.

    Example:
        >>> fingerprint({"a": torch.zeros(2)}) == fingerprint({"a": torch.ones(2)})
        False
        >>> fingerprint(lambda z: z + 1) == fingerprint(lambda z: z + 2)
        False
    """
    found = _Feeder()
    found.feed(value, frozenset())
    return found.digest.hexdigest()[:16]


@final
class _Feeder:
    """One hash under way.

    Attributes:
        digest: of what was fed.
    """

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        # Functions and classes by their address, with their place: each is read once.
        self._read: dict[int, tuple[int, Any]] = {}

    def say(self, text: str) -> None:
        """Feed words."""
        self.digest.update(text.encode())

    def feed(self, value: Any, above: frozenset[int]) -> None:
        """Feed a value; ``above`` holds the objects it is inside of, so that cycles end."""
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self.say(f"{value.dtype}{value.shape};")
            self.digest.update(value.tobytes())
        elif isinstance(value, (*_PLAIN, *_SAID)):
            self.say(f"{type(value).__name__} {value!r};")
        elif id(value) in above:
            self.say("again;")
        elif id(value) in self._read:
            self.say(f"as {self._read[id(value)][0]};")
        else:
            if isinstance(value, (types.FunctionType, type)):
                self._read[id(value)] = len(self._read), value
            name = getattr(value, "__qualname__", type(value).__qualname__)
            self.say(f"{type(value).__module__}.{type(value).__name__} {name}(")
            for part in _parts(value):
                self.feed(part, above | {id(value)})
            self.say(");")

    def _tensor(self, value: Tensor) -> None:
        value = value.detach()
        self.say(f"{value.dtype}{tuple(value.shape)};")
        if value.layout != torch.strided:
            sparse = value.to_sparse_coo().coalesce()
            self._tensor(sparse.indices())
            value = sparse.values()
        self.digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _parts(value: Any) -> Iterable[Any]:
    """What makes a container, a function or an object what it is; never its address."""
    if isinstance(value, Mapping):
        return _items(value)
    if isinstance(value, (tuple, list, deque)):
        return [repr(value)] if set(map(type, value)) <= _SHORT else list(value)
    if isinstance(value, np.ndarray):
        return [value.shape, value.ravel().tolist()]
    if isinstance(value, (set, frozenset)):
        return sorted(map(fingerprint, value))
    if isinstance(value, os.PathLike):
        return [os.fspath(value)]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.CodeType):
        return [value.co_code, list(value.co_consts), value.co_names]
    if isinstance(value, types.FunctionType):
        return _function(value)
    if isinstance(value, type):
        return _class(value)
    if isinstance(value, nn.Module):
        return [*form_of(value), dict(values_of(value)), objects_of(value)]
    return _object(value)


def _items(value: Mapping[Any, Any]) -> Iterator[Any]:
    """Keys with their values, in an order of their own."""
    kinds = set(map(type, value))
    alike = len(kinds) <= 1 and kinds <= {str, int, float, bool}
    for key in sorted(value, key=None if alike else fingerprint):
        yield key
        yield value[key]


def _object(value: Any) -> list[Any]:
    """Attributes of an object, and its class where that is the user's."""
    kind = type(value)
    inside = kind.__module__.partition(".")[0] in sys.stdlib_module_names
    if inside and not isinstance(value, _CONTENT):
        return []  # locks, files, loggers
    slots = {n: getattr(value, n, None) for n in getattr(value, "__slots__", ())}
    return [*([] if _of_library(kind) else [kind]), {**slots, **getattr(value, "__dict__", {})}]


def _of_library(value: Any) -> bool:
    """Whether a function or class is of Python, an installed package, or upweight."""
    top = (getattr(value, "__module__", None) or "").partition(".")[0]
    if top in sys.stdlib_module_names or top == __name__.partition(".")[0]:
        return True
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _function(value: types.FunctionType) -> list[Any]:
    closed = [_inside(cell) for cell in value.__closure__ or ()]
    return [value.__code__, value.__defaults__, value.__kwdefaults__, closed, _globals(value)]


def _inside(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is there yet
        return None


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """The globals that a function names, here or inside of what it defines."""
    known, names = function.__globals__, set(_names(function.__code__))
    found: dict[str, Any] = {}
    for name in names & known.keys():
        value = known[name]
        if isinstance(value, types.ModuleType):  # of the user's modules, what is named
            inside = {} if _of_library_module(value) else vars(value)
            found |= {f"{name}.{n}": _known(inside[n]) for n in names & inside.keys()}
        else:
            found[name] = _known(value)
    return found


def _of_library_module(module: types.ModuleType) -> bool:
    return _of_library(types.SimpleNamespace(__module__=module.__name__))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _known(value: Any) -> Any:
    """A global as far as it counts: what libraries define, by its name."""
    if isinstance(value, _CONTENT):
        return value
    if isinstance(value, functools._lru_cache_wrapper):
        return _known(value.__wrapped__)
    if hasattr(type(value), "__array__"):  # frames
        return [list(getattr(value, "columns", ())), np.asarray(value)]
    kind = value if isinstance(value, (types.FunctionType, type)) else type(value)
    if isinstance(value, types.ModuleType) or _of_library(kind):
        return f"{kind.__module__}.{getattr(value, '__qualname__', kind.__qualname__)}"
    return value


def _class(value: type) -> list[Any]:
    """Bases and members of a user's class."""
    if _of_library(value):
        return []
    members = {
        name: _member(member)
        for name, member in vars(value).items()
        if isinstance(member, types.FunctionType) or not name.startswith("__")
    }
    return [list(value.__bases__), members]


def _member(member: Any) -> Any:
    if isinstance(member, property):
        return [member.fget, member.fset]
    if isinstance(member, (staticmethod, classmethod)):
        return member.__func__
    if isinstance(member, functools.cached_property):
        return member.func
    return _known(member)
