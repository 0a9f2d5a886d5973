"""Linear maps from gradients to a few numbers, of which no matrix is kept."""

from abc import ABC, abstractmethod
from typing import final

from torch import Tensor

from upweight.gradients import Compression
from upweight.linalg import Gradients, RowValues

__all__ = ["Projection", "Unprojected"]


class Projection(ABC):
    """A linear map P from gradients in p parameters to k numbers.

    Either P is random with E[PᵀP] = 1, or its rows are orthonormal directions. In both cases the
    ridge that a curvature G has in p dimensions, λ, stands beside P G Pᵀ as λ and not as λ P Pᵀ:
    products of gradients keep their size under P, and with Φ = G^½ it is Φᵀ(Φ Φᵀ + λ)⁻¹Φ, made of
    products alone, that (P Φᵀ)ᵀ(P G Pᵀ + λ)⁻¹(P Φᵀ) is equal to with PᵀP in place of 1.

    Attributes:
        size: p.
        width: k.
        widths: of consecutive parts of the k numbers that a curvature takes to be independent.
        notes: what a reader of results must know.
    """

    size: int
    width: int
    widths: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @abstractmethod
    def project(self, gradients: Gradients) -> Tensor:
        """P g of every gradient, ``[n, k]``."""

    @abstractmethod
    def spread(self, values: Tensor) -> Tensor:
        """Rows ``[m, k]`` times P, ``[m, p]``."""

    @abstractmethod
    def ridge(self, l2: Tensor) -> Tensor:
        """What L2, λ of every parameter ``[p]``, adds to the diagonal in k dimensions, ``[k]``."""

    def compression(self) -> Compression | None:
        """What may be kept of training gradients without a change of any score, if not all."""
        return None

    def rows(self, values: Tensor) -> Tensor | RowValues:
        """The same rows, in whatever form serves products with gradients best."""
        return self.spread(values)


@final
class Unprojected(Projection):
    """The identity, where a projection would not make gradients shorter.

    Args:
        size: p.

    Example:
        >>> import torch
        >>> Unprojected(2).spread(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 4.]])
    """

    def __init__(self, size: int) -> None:
        self.size = self.width = size
        self.widths = (size,)

    def project(self, gradients: Gradients) -> Tensor:
        """The gradients themselves."""
        return gradients.dense()

    def spread(self, values: Tensor) -> Tensor:
        """The rows themselves."""
        return values

    def ridge(self, l2: Tensor) -> Tensor:
        """L2 itself."""
        return l2
