"""Fits to parts of the data joined into one."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from upweight.curvature.moments import eigen
from upweight.errors import InputError
from upweight.linalg import Eigenblock, KroneckerEigen, Spectra

__all__ = ["merged"]


def merged(parts: Sequence[KroneckerEigen]) -> KroneckerEigen:
    """One curvature from fits to disjoint parts of the data, by the weight of their examples.

    Moments are sums over examples, so the merged basis is that of one fit to all. Λ is exact where
    the parts share one basis: fit each with ``EKFAC(basis=...)`` for that. Elsewhere it is the
    diagonal, in the merged basis, of the mean of the parts,

        Λ_jk = Σ_p w_p Σ_ab (Q_Lᵀ Q_L^p)²_ja Λ^p_ab (Q_R^pᵀ Q_R)²_bk,

    and the result says so.

    Args:
        parts: of the same objective.

    Raises:
        InputError: no parts, or of different parameters.

    Example:
        >>> from torch import nn
        >>> from upweight import Data, Objective, Risk
        >>> from upweight.curvature import EKFAC
        >>> objective = Objective(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), "mean_squared_error")
        >>> halves = [Data.of((torch.randn(4, 3), torch.randn(4, 2))) for _ in range(2)]
        >>> first = merged([EKFAC()(Risk(objective, data)) for data in halves])
        >>> exact = merged([EKFAC(basis=first)(Risk(objective, data)) for data in halves])
        >>> first.notes[-1], exact.notes
        ('eigenvalues merged from 2 fits in bases of their own', ())
    """
    if not parts:
        raise InputError("There is nothing to merge. Pass at least one fitted curvature.")
    shapes = [[(part.block, part.flat) for part in operator.blocks] for operator in parts]
    if any(other != shapes[0] for other in shapes):
        raise InputError(
            "The curvatures are of different parameters, or fitted with different settings. Merge "
            "fits of one objective by one method."
        )
    mass = sum(part.mass for part in parts)
    weights = [part.mass / mass for part in parts]
    rows = zip(*(part.blocks for part in parts), strict=True)
    joined = [_joined(blocks, weights) for blocks in rows]
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    if not all(shared for _, shared in joined):
        notes.append(f"eigenvalues merged from {len(parts)} fits in bases of their own")
    blocks = [block for block, _ in joined]
    return KroneckerEigen(blocks, parts[0].size, tuple(notes), mass=mass)


def _joined(blocks: Sequence[Eigenblock], weights: Sequence[float]) -> tuple[Eigenblock, bool]:
    """One block, and whether its parts share their basis."""
    first, spectra = blocks[0], _mean_spectra(blocks, weights)
    if all(_equal(first.left, b.left) and _equal(first.right, b.right) for b in blocks):
        values = _mean([block.values for block in blocks], weights)
        return replace(first, values=values, spectra=spectra), True
    if spectra is None:
        raise InputError("Curvatures in different bases merge by their moments, which these lack.")
    left, on_left = _basis([b.left for b in blocks], [_known(b).left for b in blocks], weights)
    right, on_right = _basis([b.right for b in blocks], [_known(b).right for b in blocks], weights)
    values = _mean([_turned(block, left, right) for block in blocks], weights)
    spectra = Spectra(on_left, on_right, spectra.mass)
    return replace(first, left=left, right=right, values=values, spectra=spectra), False


def _turned(block: Eigenblock, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The diagonal of a block in another basis, where it has one."""
    values = block.values
    if block.left is not None:
        values = _squared(left, block.left) @ values
    if block.right is not None:
        values = values @ _squared(right, block.right).mT
    return values


def _squared(basis: Tensor | None, other: Tensor) -> Tensor:
    """(Qᵀ Q^p)², how much of each direction of a part is in each of the merged basis."""
    assert basis is not None
    squared: Tensor = (basis.mT @ other).square()
    return squared


def _basis(
    bases: Sequence[Tensor | None], spectra: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor | None, Tensor]:
    """Eigenvectors and eigenvalues of the mean moment of one side."""
    known = [basis for basis in bases if basis is not None]
    if not known:
        return None, _mean(spectra, weights)
    moments = [
        (basis.to(values) * values[:, None]) @ basis.to(values).mT
        for basis, values in zip(known, spectra, strict=True)
    ]
    values, vectors = eigen(_mean(moments, weights))
    return vectors.to(known[0]), values


def _known(block: Eigenblock) -> Spectra:
    assert block.spectra is not None
    return block.spectra


def _mean_spectra(blocks: Sequence[Eigenblock], weights: Sequence[float]) -> Spectra | None:
    if any(block.spectra is None for block in blocks):
        return None
    known = [_known(block) for block in blocks]
    mass = sum(w * part.mass for w, part in zip(weights, known, strict=True))
    left, right = [part.left for part in known], [part.right for part in known]
    return Spectra(_mean(left, weights), _mean(right, weights), mass)


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + weight * tensor
    return total


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)
