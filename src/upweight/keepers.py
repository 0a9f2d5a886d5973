"""Where training gradients stay between passes: in memory while they fit, or in a directory."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from upweight.budget import budget
from upweight.errors import InputError, StoreError
from upweight.linalg import BlockGradients, Outer
from upweight.linalg.values import Gradients
from upweight.store import claim

__all__ = ["DirectoryKeeper", "Keeper", "MemoryKeeper"]


class Keeper(ABC):
    """Keeps the gradients of rows start to stop."""

    @abstractmethod
    def get(self, start: int, stop: int) -> Gradients | None:
        """What was kept of these rows, if anything."""

    @abstractmethod
    def put(self, start: int, stop: int, gradients: Gradients) -> None:
        """Keep gradients, or let them go."""


@final
class MemoryKeeper(Keeper):
    """Keeps all of them if all fit into a quarter of the memory budget, and otherwise none.

    Args:
        count: N, of all examples.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: dict[tuple[int, int], Gradients] = {}
        self._fits: bool | None = None

    def get(self, start: int, stop: int) -> Gradients | None:
        """What was kept of these rows, if anything."""
        return self._kept.get((start, stop))

    def put(self, start: int, stop: int, gradients: Gradients) -> None:
        """Keep gradients that are factors already; others are cheap to make or large."""
        if not isinstance(gradients, BlockGradients):
            return
        if self._fits is None:
            row = gradients.bytes() / (stop - start)
            self._fits = row * self.count <= budget() // 4
        if self._fits:
            self._kept[start, stop] = gradients


@final
class DirectoryKeeper(Keeper):
    """Keeps factors in safetensors files, one for each batch, complete or absent.

    A pass that was killed leaves the batches it finished, and the next one goes on from there.

    Args:
        directory: of one model, data and loss; made if it is absent.
        identity: hash of these; a directory of another is refused.
        like: gradients of any batch, for the blocks of parameters.

    Raises:
        StoreError: the directory belongs to something else, or cannot be written.
        InputError: the gradients are not in factors, as those of linear models in closed form.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: str, like: Gradients) -> None:
        if not isinstance(like, BlockGradients):
            raise InputError(
                f"Only factored gradients are kept on disk, and these are {type(like).__name__}: "
                "a model in closed form needs no file, and one without rules has no factors."
            )
        self.directory = claim(directory, identity, kind="gradients")
        self.like = like

    def _path(self, start: int, stop: int) -> Path:
        return self.directory / f"{start:09d}-{stop:09d}.safetensors"

    def get(self, start: int, stop: int) -> Gradients | None:
        """What was kept of these rows, if anything.

        Raises:
            StoreError: the file is damaged.
        """
        path = self._path(start, stop)
        if not path.exists():
            return None
        try:
            tensors = load_file(path, device=str(self.like.like.device))
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path} is damaged ({error}). Delete it and run again.") from error
        terms = [_terms(tensors, place) for place in range(len(self.like.blocks))]
        return BlockGradients(self.like.blocks, terms, stop - start, self.like.like)

    def put(self, start: int, stop: int, gradients: Gradients) -> None:
        """Write a file beside its place and rename it.

        Raises:
            StoreError: it cannot be written.
        """
        assert isinstance(gradients, BlockGradients)
        tensors = {}
        for place, terms in enumerate(gradients.terms):
            for number, term in enumerate(terms):
                name = f"{place}.{number}.{'ones' if term.ones else 'plain'}"
                tensors[f"{name}.left"] = term.left.detach().clone(
                    memory_format=torch.contiguous_format
                )
                tensors[f"{name}.right"] = term.right.detach().clone(
                    memory_format=torch.contiguous_format
                )
        path = self._path(start, stop)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            save_file(tensors, part)
            part.replace(path)
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"Cannot write {path}: {error}. Free some space, or keep the gradients elsewhere."
            ) from error
        finally:
            part.unlink(missing_ok=True)


def _terms(tensors: Mapping[str, Tensor], place: int) -> list[Outer]:
    """The outer products of one block, in order."""
    found = sorted(name for name in tensors if name.startswith(f"{place}.") and "left" in name)
    return [
        Outer(tensors[name], tensors[name.replace("left", "right")], ones=".ones." in name)
        for name in found
    ]
