"""Named parameter blocks of a module, seen as one long row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

import torch
from torch import Tensor, nn

from upweight.errors import InputError, ModelError

__all__ = ["ParameterSpace", "Select", "Selection"]

Names = Sequence[str] | Callable[[str, nn.Parameter], bool] | None
SHOWN = 4


@final
@dataclass(frozen=True)
class Selection:
    """Some parameters of a model, and the least part of it that they may be.

    Parameters that do not require gradients do not count: who froze them said so.

    Attributes:
        names: names or patterns (``"*.weight"``), a predicate of (name, parameter), or None for
            all that require gradients.
        least_coverage: of the numbers that require gradients, the least part to choose.

    Raises:
        InputError: least_coverage is not between 0 and 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(50, 20), nn.Linear(20, 1))
        >>> ParameterSpace(net, Selection(["1.*"], least_coverage=0.01)).size
        21
    """

    names: Names
    least_coverage: float = 0.1

    def __post_init__(self) -> None:
        least = self.least_coverage
        if not (isinstance(least, (int, float)) and 0 <= least <= 1):
            raise InputError(f"least_coverage is a part between 0 and 1, got {least!r}.")

    @staticmethod
    def of(select: "Select") -> "Selection":
        """The selection itself, or one of names with the default threshold."""
        return select if isinstance(select, Selection) else Selection(select)

    def require(
        self, chosen: Mapping[str, nn.Parameter], named: Mapping[str, nn.Parameter]
    ) -> None:
        """Raise InputError when the chosen are too small a part of the named."""
        if self.names is None:
            return
        trained = {name: p.numel() for name, p in named.items() if p.requires_grad}
        covered = sum(trained[name] for name in chosen) / sum(trained.values())
        if covered >= self.least_coverage:
            return
        others = [name for name in trained if name not in chosen]
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise InputError(
            f"`parameters` covers {covered:.2%} of what requires gradients, less than "
            f"{self.least_coverage:.0%}: {', '.join(others[:SHOWN])}{more} would be left out of "
            "every score. Choose more, call .requires_grad_(False) on what was not trained, or "
            "say that it is meant: parameters=Selection(names, least_coverage="
            f"{_below(covered)})."
        )


Select = Names | Selection


def _below(covered: float) -> str:
    """A short number that a coverage passes."""
    digits = 2
    while round(covered, digits) > covered or not round(covered, digits):
        digits += 1
        if digits > 12:
            return "0"
    return f"{round(covered, digits):.{digits}f}"


def _selected(module: nn.Module, select: Select) -> dict[str, nn.Parameter]:
    named = dict(module.named_parameters())
    if isinstance(select, Selection):
        chosen = _selected(module, select.names)
        select.require(chosen, named)
        return chosen
    if select is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        if not chosen:
            raise ModelError(
                "No parameter of the model requires gradients. Call model.requires_grad_(True) "
                "on the parts whose training you want to explain."
            )
        return chosen
    if callable(select):
        chosen = {name: p for name, p in named.items() if select(name, p)}
    else:
        patterns = [select] if isinstance(select, str) else list(select)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise ModelError(
                    f"No parameter is called {pattern!r}. The model has: {', '.join(named)}."
                )
        chosen = {n: p for n, p in named.items() if any(fnmatchcase(n, k) for k in patterns)}
    frozen = [name for name, p in chosen.items() if not p.requires_grad]
    if frozen:
        raise ModelError(
            f"The chosen parameters {', '.join(frozen)} do not require gradients. "
            "Call .requires_grad_(True) on them, or leave them out of `parameters`."
        )
    if not chosen:
        raise ModelError("`parameters` selects nothing. Select at least one parameter.")
    return chosen


@final
class ParameterSpace:
    """The chosen parameters of a module as one row of length p.

    Tied parameters appear once, under their first name. Rows of a matrix ``[m, p]`` are m points
    or directions in parameter space.

    Args:
        module: any module.
        select: names or patterns (``"*.weight"``), a predicate of (name, parameter), None for all
            parameters that require gradients, or a Selection of these with a least coverage.

    Raises:
        ModelError: nothing is selected, or a selected parameter is frozen.
        InputError: less is selected than a Selection asks for.

    Example:
        >>> space = ParameterSpace(nn.Linear(3, 2))
        >>> space.size, list(space.shapes)
        (8, ['weight', 'bias'])
    """

    def __init__(self, module: nn.Module, select: Select = None) -> None:
        self._chosen = _selected(module, select)
        first = next(iter(self._chosen.values()))
        mixed = {(p.dtype, p.device) for p in self._chosen.values()}
        if first.is_complex():
            raise ModelError(
                f"The chosen parameters are complex ({first.dtype}). Keep real and imaginary parts "
                "as a real parameter each (torch.view_as_complex joins them), or leave them out."
            )
        if len(mixed) > 1:
            raise ModelError(
                f"The chosen parameters mix dtypes or devices: {sorted(map(str, mixed))}. "
                "Bring them to one, for example model.float().to(device)."
            )
        self.dtype: torch.dtype = first.dtype
        self.device: torch.device = first.device
        self.shapes: dict[str, torch.Size] = {n: p.shape for n, p in self._chosen.items()}
        self.size: int = sum(p.numel() for p in self._chosen.values())
        total = sum(p.numel() for p in module.parameters())
        self.coverage: float = self.size / total

    def values(self) -> dict[str, Tensor]:
        """The current values, detached (views, not copies)."""
        return {name: p.detach() for name, p in self._chosen.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parameters themselves."""
        return dict(self._chosen)

    def row(self) -> Tensor:
        """The current values as one row ``[p]`` (a copy)."""
        return self.flatten(self.values())

    def flatten(self, tree: Mapping[str, Tensor]) -> Tensor:
        """Named blocks ``[*shape]`` to a row ``[p]``, or ``[m, *shape]`` to rows ``[m, p]``."""
        parts = []
        for name, shape in self.shapes.items():
            lead = tree[name].shape[: tree[name].dim() - len(shape)]
            parts.append(tree[name].reshape(*lead, -1))
        return torch.cat(parts, dim=-1)

    def unflatten(self, rows: Tensor) -> dict[str, Tensor]:
        """A row ``[p]`` or rows ``[m, p]`` to named blocks with the same leading axis."""
        parts = rows.split([shape.numel() for shape in self.shapes.values()], dim=-1)
        named = zip(self.shapes.items(), parts, strict=True)
        return {name: part.reshape((*rows.shape[:-1], *shape)) for (name, shape), part in named}

    def locate(self, position: int) -> str:
        """The name of the block that holds a position of the row."""
        for name, shape in self.shapes.items():
            if position < shape.numel():
                return name
            position -= shape.numel()
        raise IndexError(position)
