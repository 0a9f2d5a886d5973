"""The leading directions of each layer in the basis of a Kronecker-factored curvature."""

from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from upweight.curvature import EKFAC, KFAC, Labels
from upweight.errors import InputError
from upweight.linalg import Block, Eigenblock, KroneckerEigen
from upweight.projections.operator import Projected
from upweight.projections.sides import Side, TwoSided
from upweight.risk import Risk

__all__ = ["LeadingDirections", "LeadingEigenvalues"]


@final
@dataclass(frozen=True)
class LeadingDirections:
    """The k eigenvectors of each layer with the largest eigenvalues of a Kronecker-factored fit.

    With K-FAC at the given labels, the default, these are pairs of principal directions of a
    layer's slopes and of its inputs. LoGra's PCA keeps a rectangle of them, and this the best k.

    Args:
        width: k of a layer.
        fit: the curvature.

    Raises:
        InputError: fewer than one direction.

    Example:
        >>> from torch import nn
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.eye(8), torch.arange(8) % 2))
        >>> LeadingDirections(5)(Risk(Objective(nn.Linear(8, 2), "cross_entropy"), data)).widths
        (5,)
    """

    width: int = 1024
    fit: KFAC | EKFAC = field(default_factory=lambda: KFAC(slopes=Labels()))

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"A layer keeps at least 1 direction, got {self.width}.")

    def __call__(self, risk: Risk) -> TwoSided:
        """Fit, and drop what is small."""
        return self.kept(risk, self.fit(risk))[0]

    def kept(self, risk: Risk, fitted: KroneckerEigen) -> tuple[TwoSided, Tensor]:
        """The projection of a fit, and the eigenvalues ``[k]`` of its directions."""
        sides, values = [], []
        for part in fitted.blocks:
            flat = part.values.flatten()
            places = flat.topk(min(self.width, len(flat))).indices.sort().values
            sides.append(_side(part, places))
            values.append(flat[places])
        return TwoSided(sides, risk, fitted.notes), torch.cat(values)


@final
@dataclass(frozen=True)
class LeadingEigenvalues:
    """A Kronecker-factored curvature among its k largest eigenvalues in each layer, 0 elsewhere.

    Args:
        width: k of a layer.
        fit: the curvature; EK-FAC, as the method of that name, by default.

    Raises:
        InputError: fewer than one direction.

    Example:
        >>> from torch import nn
        >>> from upweight import Data, Objective
        >>> data = Data.of((torch.eye(8), torch.arange(8) % 2))
        >>> LeadingEigenvalues(5)(Risk(Objective(nn.Linear(8, 2), "cross_entropy"), data)).size
        5
    """

    width: int = 1024
    fit: KFAC | EKFAC = field(default_factory=lambda: EKFAC(rows="auto"))

    def __post_init__(self) -> None:
        LeadingDirections(self.width)

    def __call__(self, risk: Risk) -> Projected:
        """Fit, and drop what is small."""
        return self._among(risk, self.fit(risk))

    def fitted(self, risk: Risk) -> int:
        """How many of the examples it is fitted on."""
        return self.fit.fitted(risk)

    def batch(self, risk: Risk) -> int:
        """How many of them it looks at together."""
        return self.fit.batch(risk)

    def kept(self, risk: Risk) -> int:
        """Bytes of gradients that it keeps for a second pass."""
        return self.fit.kept(risk)

    def trial(self, risk: Risk, rows: int) -> Projected:
        """A fit to a few of the examples, made as the whole one will be: to see what it costs."""
        return self._among(risk, self.fit.trial(risk, rows))

    def _among(self, risk: Risk, fitted: KroneckerEigen) -> Projected:
        projection, values = LeadingDirections(self.width, self.fit).kept(risk, fitted)
        block = Eigenblock(Block("leading", 1, 1, len(values), 0), None, None, values[None, None])
        diagonal = KroneckerEigen([block], len(values), mass=fitted.mass)
        return Projected(projection, [diagonal], projection.compression())


def _side(part: Eigenblock, places: Tensor) -> Side:
    """The columns of both bases that some eigenvalues need, and which pairs of them these are."""
    g, o, i = part.values.shape
    rows, j = (places // i % o).unique(return_inverse=True)
    columns, l = (places % i).unique(return_inverse=True)
    basis = replace(
        part,
        left=_columns(part.left, rows, part.values, o),
        right=_columns(part.right, columns, part.values, i),
        values=part.values.new_ones(g, len(rows), len(columns)),
        spectra=None,
    )
    return Side(basis, (places // (o * i) * len(rows) + j) * len(columns) + l)


def _columns(basis: Tensor | None, chosen: Tensor, like: Tensor, length: int) -> Tensor:
    """Some columns of a basis; of none, those of the identity."""
    if basis is not None:
        return basis[:, :, chosen]
    axes = like.new_zeros(len(like), length, len(chosen))
    axes[:, chosen, torch.arange(len(chosen), device=like.device)] = 1
    return axes
