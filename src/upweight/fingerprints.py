"""Hashes that tell one run from another: of tensors, settings, and functions by what they do."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["fingerprint"]


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
    _feed(value, digest.update)
    return digest.hexdigest()[:16]


def _feed(value: Any, update: Callable[[Any], None]) -> None:
    if isinstance(value, Tensor):
        update(f"{value.dtype}{tuple(value.shape)}".encode())
        update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        update(f"{value.dtype}{value.shape}".encode())
        update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            update(f"{key!r}:".encode())
            _feed(item, update)
    elif isinstance(value, (tuple, list)):
        update(f"{len(value)}[".encode())
        for item in value:
            _feed(item, update)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        update(repr(value).encode())
    elif hasattr(value, "__code__"):
        _feed_function(value, update)
    else:
        # An object's address would make every process another run.
        update(f"{type(value).__module__}.{type(value).__qualname__}".encode())
        _feed(dict(vars(value)) if hasattr(value, "__dict__") else {}, update)


def _feed_function(function: Any, update: Callable[[Any], None]) -> None:
    update(f"{function.__module__}.{function.__qualname__}".encode())
    code = function.__code__
    update(code.co_code)
    constants = [c for c in code.co_consts if isinstance(c, (str, bytes, int, float, type(None)))]
    _feed([*constants, *code.co_names], update)
    _feed(function.__defaults__ or (), update)
    for cell in function.__closure__ or ():
        _feed(cell.cell_contents, update)
