"""Fitted Kronecker factors in a run directory: complete or absent, and of one model and data."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from upweight.errors import StoreError
from upweight.linalg import Block, Eigenblock, KroneckerEigen, Spectra
from upweight.store import publish, read_manifest, write_manifest

__all__ = ["load_factors", "save_factors"]

FILE = "factors.safetensors"


def save_factors(
    operator: KroneckerEigen, path: str | os.PathLike[str], identity: str, *, replace: bool = False
) -> Path:
    """Write ``manifest.json`` and ``factors.safetensors``.

    Args:
        operator: what was fitted.
        path: a new directory, or one of the same fit.
        identity: hash of model, data and how it was fitted.
        replace: write over a directory of another fit.

    Raises:
        StoreError: the place belongs to another fit or cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    blocks = []
    for place, part in enumerate(operator.blocks):
        found = {"left": part.left, "right": part.right, "values": part.values}
        if part.spectra is not None:
            found |= {"left_spectrum": part.spectra.left, "right_spectrum": part.spectra.right}
        tensors |= {
            f"{place}.{name}": value.detach().cpu().contiguous()
            for name, value in found.items()
            if value is not None
        }
        mass = None if part.spectra is None else part.spectra.mass
        blocks.append({**asdict(part.block), "flat": part.flat, "mass": mass})
    with publish(path, identity, replace=replace) as part_of:
        try:
            save_file(tensors, part_of / FILE)
        except SafetensorError as error:
            raise StoreError(f"Cannot write {path}: {error}.") from error
        content = {
            "kind": "factors",
            "identity": identity,
            "size": operator.size,
            "mass": operator.mass,
            "notes": list(operator.notes),
            "blocks": blocks,
        }
        write_manifest(part_of, content)
    return Path(path)


def load_factors(
    path: str | os.PathLike[str], identity: str | None = None, *, device: Any = "cpu"
) -> KroneckerEigen:
    """Read fitted factors; nothing is unpickled.

    Args:
        path: of ``save_factors``.
        identity: what they must be of; None for any, as for parts that are to be merged.
        device: where they go.

    Raises:
        StoreError: absent, damaged, or of another model, data or fit.

    Example:
        >>> import tempfile
        >>> block = Eigenblock(Block("w", 1, 1, 2, 0), None, None, torch.tensor([[[2.0, 4.0]]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_factors(KroneckerEigen([block], 2), f"{folder}/run", "a model")
        ...     load_factors(f"{folder}/run", "a model") @ torch.ones(2)
        tensor([2., 4.])
    """
    place, manifest = Path(path), read_manifest(path)
    if identity is not None and manifest.get("identity") != identity:
        raise StoreError(
            f"{place} holds factors of another run (identity {manifest.get('identity')}, this one "
            f"is {identity}: model, data or settings differ). Choose another directory, or delete "
            "it."
        )
    try:
        tensors = load_file(place / FILE, device=str(torch.device(device)))
        blocks = [_block(tensors, k, stated) for k, stated in enumerate(manifest["blocks"])]
        return KroneckerEigen(
            blocks, manifest["size"], tuple(manifest["notes"]), mass=manifest["mass"]
        )
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise StoreError(f"{place} is damaged ({error}). Delete it and run again.") from error


def _block(tensors: dict[str, Tensor], place: int, stated: dict[str, Any]) -> Eigenblock:
    flat, mass = stated["flat"], stated["mass"]
    block = Block(**{key: value for key, value in stated.items() if key not in ("flat", "mass")})
    spectra = None
    if mass is not None:
        on_left, on_right = (tensors[f"{place}.{side}_spectrum"] for side in ("left", "right"))
        spectra = Spectra(on_left, on_right, mass)
    left, right = (tensors.get(f"{place}.{side}") for side in ("left", "right"))
    return Eigenblock(block, left, right, tensors[f"{place}.values"], spectra, flat)
