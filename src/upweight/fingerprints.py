"""Hashes that tell one run from another: of tensors, settings, and functions by what they do."""

import functools
import hashlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["fingerprint"]

Update = Callable[[Any], None]
_PLAIN = (str, bytes, int, float, complex, bool, type(None), np.generic, torch.dtype, torch.device)


def fingerprint(value: Any) -> str:
    """Hash a value (16 hex digits), the same in every process.

    Tensors and arrays count by dtype, shape and bytes, mappings and sequences by their items, other
    objects by their type and attributes, and functions by name, code and what they close over.

    Example:
        >>> fingerprint({"a": torch.zeros(2)}) == fingerprint({"a": torch.ones(2)})
        False
        >>> fingerprint(lambda z: z + 1) == fingerprint(lambda z: z + 2)
        False
    """
    digest = hashlib.sha256()
    _feed(value, digest.update, frozenset())
    return digest.hexdigest()[:16]


def _feed(value: Any, update: Update, above: frozenset[int]) -> None:
    """Feed a value; ``above`` holds the objects it is inside of, so that cycles end."""
    if isinstance(value, Tensor):
        update(f"{value.dtype}{tuple(value.shape)};".encode())
        update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        update(f"{value.dtype}{value.shape};".encode())
        update(repr(value.tolist()).encode() if value.dtype == object else value.tobytes())
    elif isinstance(value, _PLAIN):
        update(f"{type(value).__name__} {value!r};".encode())
    elif id(value) in above:
        update(b"again;")
    else:
        name = getattr(value, "__qualname__", type(value).__qualname__)
        update(f"{type(value).__module__}.{type(value).__name__} {name}(".encode())
        for part in _parts(value):
            _feed(part, update, above | {id(value)})
        update(b");")


def _parts(value: Any) -> list[Any]:
    """What makes a container, a function or an object what it is; never its address."""
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.CodeType):
        return [value.co_code, list(value.co_consts), value.co_names]
    if isinstance(value, types.FunctionType):
        code, known = value.__code__, value.__globals__
        closed = [cell.cell_contents for cell in value.__closure__ or ()]
        here = [name for name in code.co_names if name in known]
        used = {name: known[name] for name in here if isinstance(known[name], (*_PLAIN, Tensor))}
        return [code, value.__defaults__, value.__kwdefaults__, closed, used]
    if isinstance(value, type) or not (hasattr(value, "__dict__") or hasattr(value, "__slots__")):
        return []
    slots = {n: getattr(value, n, None) for n in getattr(value, "__slots__", ())}
    return [{**slots, **getattr(value, "__dict__", {})}]
