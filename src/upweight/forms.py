"""What a model computes with: its modules, their settings, parameters and buffers."""

import dis
import types
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

__all__ = ["form_of", "objects_of", "settings_of", "values_of"]

_ONE = (bool, int, float, complex, str, type(None))


def values_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and stored buffers by name; other buffers are settings.

    Example:
        >>> [name for name, _ in values_of(nn.Linear(2, 1))]
        ['weight', 'bias']
    """
    for prefix, module in model.named_modules():
        passing = module._non_persistent_buffers_set
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if isinstance(value, Tensor) and name not in passing:
                yield f"{prefix}.{name}" if prefix else name, value


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Plain attributes and tensors of the modules beside parameters and stored buffers.

    Left out is what begins with an underscore, and what the forward pass itself sets (counters,
    kept activations): that follows from the inputs and says nothing of what will be computed.

    Example:
        >>> settings_of(nn.LeakyReLU(0.2))
        {'negative_slope': 0.2, 'inplace': False}
    """
    found: dict[str, Any] = {}
    for name, module, value in _held(model):
        if _plain(value) or _kept(module, value):
            found[name] = value
    for prefix, module in model.named_modules():
        kind: Any = type(module)
        if _reads_mode(kind):
            found[f"{prefix}.training" if prefix else "training"] = module.training
    return found


def objects_of(model: nn.Module) -> dict[str, Any]:
    """Other attributes of the modules: functions, tables, configurations.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.table = {"a": 1}
        >>> objects_of(layer)
        {'table': {'a': 1}}
    """
    return {
        name: value
        for name, _, value in _held(model)
        if not (_plain(value) or isinstance(value, Tensor))
    }


def _held(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Public attributes and passing buffers that no forward pass sets: name, module, value."""
    kinds: set[Any] = set(map(type, model.modules()))
    left = _hooked(model).union({"training", "forward"}, *map(_set_by, kinds))
    for prefix, module in model.named_modules():
        passing = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
        for name, value in (*vars(module).items(), *passing.items()):
            if name[0] != "_" and name not in left:
                yield f"{prefix}.{name}" if prefix else name, module, value


def form_of(model: nn.Module) -> list[Any]:
    """What makes models compute alike, were their parameters and buffers the same.

    Names, classes, settings, and forward passes that single modules have of their own. One module
    at two places is another form than two.
    """
    numbers: dict[int, int] = {}
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        number = numbers.setdefault(id(module), len(numbers))
        found.append((name, number, f"{type(module).__module__}.{type(module).__qualname__}"))
    own = [vars(m)["forward"] for m in model.modules() if "forward" in vars(m)]
    kinds = list(dict.fromkeys(type(module) for module in model.modules()))
    return [found, kinds, own, settings_of(model)]


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, _ONE) for item in value)
    return isinstance(value, _ONE)


def _kept(module: nn.Module, value: Any) -> bool:
    """A tensor, but not one that hooks may compute anew from parameters before each pass."""
    return isinstance(value, Tensor) and not module._forward_pre_hooks


def _hooked(model: nn.Module) -> frozenset[str]:
    """Attributes that hooks of the model set."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    codes = [hook.__code__ for hook in hooks if isinstance(hook, types.FunctionType)]
    return frozenset(name for code in codes for name in _stored(code))


@lru_cache(1024)
def _passes(kind: Any) -> tuple[types.CodeType, ...]:
    """The code of forward and of what it names in its class."""
    found: dict[str, types.CodeType] = {}
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        member = getattr(kind, name, None)
        member = member.fget if isinstance(member, property) else member
        plain = isinstance(member, types.FunctionType) and not hasattr(nn.Module, name)
        if (
            name not in found
            and isinstance(member, types.FunctionType)
            and (plain or name == "forward")
        ):
            found[name] = member.__code__
            waiting += member.__code__.co_names
    return tuple(found.values())


@lru_cache(1024)
def _set_by(kind: Any) -> frozenset[str]:
    """Attributes that the forward pass of a class sets."""
    return frozenset(name for code in _passes(kind) for name in _stored(code))


@lru_cache(1024)
def _reads_mode(kind: Any) -> bool:
    """Whether the forward pass of a class depends on train or eval mode."""
    return any("training" in code.co_names for code in _passes(kind))


def _stored(code: types.CodeType) -> Iterator[str]:
    """Attributes that code sets, or may set where it registers buffers."""
    for step in dis.get_instructions(code):
        if step.opname == "STORE_ATTR":
            yield step.argval
    if "register_buffer" in code.co_names or "setattr" in code.co_names:
        yield from (text for text in code.co_consts if isinstance(text, str))
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _stored(inner)
