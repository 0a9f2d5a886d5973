"""How a model runs: autocast and compiled code, apart from the algebra around it."""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from upweight.errors import InputError

__all__ = ["Precision", "full_precision", "uncompiled"]


@final
@dataclass(frozen=True)
class Precision:
    """Autocast as it is where an objective is made.

    Attributes:
        device: type of device, such as ``"cuda"``.
        dtype: of the operations that autocast chooses.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     str(Precision.ambient(torch.device("cpu")))
        'autocast bfloat16'
    """

    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"autocast {str(self.dtype).removeprefix('torch.')}"

    @staticmethod
    def ambient(device: torch.device) -> "Precision | None":
        """What autocast does on a device now, or None.

        Raises:
            InputError: float16, in which gradients vanish.
        """
        kind = device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return None
        dtype = torch.get_autocast_dtype(kind)
        if dtype == torch.float16:
            raise InputError(
                "Autocast is on in float16, where small gradients become 0 unless losses are "
                "scaled. Use torch.autocast(..., dtype=torch.bfloat16), or leave the autocast "
                "block."
            )
        return Precision(kind, dtype)

    def run(self, function: Callable[[], Any], dtype: torch.dtype) -> Any:
        """A function's outputs under autocast, in a dtype no lower than the given one."""
        # Without the cache of cast weights, which outlives the call in an outer autocast block.
        with torch.autocast(self.device, self.dtype, cache_enabled=False):
            outputs = function()
        return _raised(outputs, dtype)


def _raised(tree: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of lower precision brought to a dtype, in containers of the same kind."""
    if isinstance(tree, Tensor):
        low = tree.is_floating_point() and tree.dtype.itemsize < dtype.itemsize
        return tree.to(dtype) if low else tree
    if isinstance(tree, Mapping):
        # A copy, filled by its own rule: outputs of Hugging Face are also attributes.
        raised: Any = copy.copy(tree)
        for key, value in tree.items():
            raised[key] = _raised(value, dtype)
        return raised
    if isinstance(tree, (tuple, list)):
        values = [_raised(value, dtype) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast is off inside, on a device and on the CPU."""
    kinds = {kind for kind in (device.type, "cpu") if torch.amp.is_autocast_available(kind)}
    with ExitStack() as stack:
        for kind in sorted(kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled code runs as it was written inside: its operations could not be watched else."""
    if "torch._dynamo" not in sys.modules:  # which compiling imports, in seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
