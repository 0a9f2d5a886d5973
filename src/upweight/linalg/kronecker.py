"""Curvature that is diagonal in a Kronecker-factored basis, block by block, and its inverse."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

import torch
from torch import Tensor

from upweight.errors import IndefiniteError, InputError
from upweight.linalg.block import Block
from upweight.linalg.blocks import (
    BlockGradients,
    BlockRows,
    Outer,
    Pair,
    form,
    pieces,
    times,
)
from upweight.linalg.cost import Cost, Load
from upweight.linalg.operator import Operator, unshifted
from upweight.linalg.separable import Separable, separate
from upweight.linalg.solution import FLAT, Solution, Status, Value, indefinite
from upweight.linalg.solver import Inverse, Solver
from upweight.linalg.values import Gradients, RowValues

__all__ = ["Eigenblock", "KroneckerEigen", "KroneckerInverse", "Spectra", "Spectral"]

Squares = tuple[Tensor, Tensor]


@final
@dataclass(frozen=True)
class Spectra:
    """Eigenvalues of the two moments that made a block's basis.

    Attributes:
        left: ``[g, o]``.
        right: ``[g, i]``.
        mass: of the positions that were counted.
    """

    left: Tensor
    right: Tensor
    mass: float


@final
@dataclass(frozen=True)
class Eigenblock:
    """(Q_L ⊗ Q_R) diag(Λ) (Q_L ⊗ Q_R)ᵀ on the matrices of one block.

    Attributes:
        block: where they stand.
        left: Q_L, ``[g, o, o]``; None for the identity.
        right: Q_R, ``[g, i, i]``; None for the identity.
        values: Λ, ``[g, o, i]``.
        spectra: of the moments behind the basis, where they are known.
        flat: whether the block is one vector: Q_R is ``[1, oi, oi]`` then, and Λ ``[1, 1, oi]``.
    """

    block: Block
    left: Tensor | None
    right: Tensor | None
    values: Tensor
    spectra: Spectra | None = None
    flat: bool = False

    def turn(self, matrices: Tensor) -> Tensor:
        """Q_Lᵀ M Q_R of matrices ``[m, g, o, i]``."""
        matrices = matrices.flatten(1)[:, None, None] if self.flat else matrices
        turned = matrices if self.right is None else matrices @ _shared(self.right)
        return turned if self.left is None else self.left.mT @ turned

    def back(self, matrices: Tensor) -> Tensor:
        """Q_L M Q_Rᵀ of matrices ``[m, g, o, i]``, stored by columns."""
        # So that a bias, the last column, can be cut off without a copy of the others.
        turned = matrices if self.left is None else self.left @ matrices
        turned = turned if self.right is None else (self.right @ turned.mT).mT
        return turned.reshape(-1, *self.block.shape) if self.flat else turned

    def coordinates(self, start: int) -> Block:
        """Where turned matrices stand in a row, from a place on."""
        g, o, i = self.values.shape
        return Block(self.block.name, g, o, i, start)

    def turned_factors(self, term: Outer) -> tuple[Tensor, Tensor]:
        """Factors in the basis, ``[g, n, s, o]`` and ``[g, n, s, i]``."""
        if self.flat:
            whole = self.turn(form([term], self.block.outputs)).transpose(0, 1)
            return whole.new_ones(1, whole.shape[1], 1, 1), whole
        return self.turned_left(term), self.turned_right(term)

    def turned_left(self, term: Outer) -> Tensor:
        """Left factors in the basis, ``[g, n, s, o]``."""
        if term.indexed:
            o = self.block.outputs
            eye = torch.eye(o, dtype=term.right.dtype, device=term.right.device)
            basis = eye if self.left is None else self.left[0]
            return basis[term.left][None]
        return term.left if self.left is None else times(term.left, self.left, ones=False)

    def turned_right(self, term: Outer) -> Tensor:
        """Right factors in the basis, ``[g, n, s, i]``."""
        if self.right is not None:
            return times(term.right, self.right, ones=term.ones)
        if not term.ones:
            return term.right
        return torch.cat([term.right, term.right.new_ones(*term.right.shape[:3], 1)], dim=3)


@final
class KroneckerEigen(Operator):
    """A block-diagonal matrix, each block diagonal in a Kronecker product of two bases.

    Args:
        blocks: all of them together hold every parameter once.
        size: p.
        notes: what a reader of results must know.
        mass: total weight of the examples it was fitted on.

    Attributes:
        coordinates: where a row's coordinates in the basis stand, block after block.

    Example:
        >>> block = Eigenblock(Block("w", 1, 1, 2, 0), None, None, torch.tensor([[[2.0, 4.0]]]))
        >>> KroneckerEigen([block], 2) @ torch.ones(2)
        tensor([2., 4.])
    """

    def __init__(
        self,
        blocks: Sequence[Eigenblock],
        size: int,
        notes: tuple[str, ...] = (),
        *,
        mass: float = 1.0,
    ) -> None:
        self.blocks, self.size, self.notes, self.mass = tuple(blocks), size, notes, mass
        self.dtype, self.device = self.blocks[0].values.dtype, self.blocks[0].values.device
        starts = accumulate((part.values.numel() for part in self.blocks), initial=0)
        places = zip(self.blocks, starts, strict=False)
        self.coordinates = tuple(part.coordinates(start) for part, start in places)

    def trace(self) -> float:
        """The sum of all Λ."""
        return sum(float(part.values.sum()) for part in self.blocks)

    def turn(self, rows: Tensor) -> Tensor:
        """Coordinates ``[m, p]`` of rows in the basis, where ``coordinates`` says."""
        out = torch.empty_like(rows)
        for part, place in zip(self.blocks, self.coordinates, strict=True):
            place.write(out, part.turn(part.block.read(rows)))
        return out

    def back(self, rows: Tensor) -> Tensor:
        """The rows ``[m, p]`` with such coordinates."""
        out = torch.empty_like(rows)
        for part, place in zip(self.blocks, self.coordinates, strict=True):
            part.block.write(out, part.back(place.read(rows)))
        return out

    def apply(self, rows: Tensor) -> Tensor:
        """Turn, scale, turn back."""
        return self.scaled(rows, [part.values for part in self.blocks])

    def scaled(self, rows: Tensor, values: Iterable[Tensor]) -> Tensor:
        """The same with other values in place of Λ, block by block."""
        rows = rows.to(self.dtype)
        out = torch.empty_like(rows)
        for part, scales in zip(self.blocks, values, strict=True):
            part.block.write(out, part.back(part.turn(part.block.read(rows)) * scales))
        return out


@final
@dataclass(frozen=True)
class Spectral(Solver):
    """Inverts a curvature that is already diagonal in a known basis; another damping is free.

    Queries of one position per example are preconditioned as a few outer products each, by a
    separable expansion of 1/(Λ + λ); the error this makes is bounded and reported.

    Args:
        tolerance: largest root-mean-square error, relative to their scores, that the separable
            expansion may make over the queries; 0 for no expansion.

    Raises:
        InputError: the operator has no such basis.
        IndefiniteError: an eigenvalue with its damping is not positive.
    """

    tolerance: float = 0.05

    def cost(self, load: Load) -> Cost:
        """No products: what it takes shows on a curvature of a few examples."""
        del load
        return Cost()

    def init(self, operator: Operator) -> "KroneckerInverse":
        """Take eigenvalues and damping apart."""
        base, shift = unshifted(operator)
        if not isinstance(base, KroneckerEigen):
            raise InputError(
                f"{type(base).__name__} is not diagonal in a known basis. Use Cholesky or CG, or a "
                "Kronecker-factored curvature such as 'ekfac'."
            )
        return KroneckerInverse(base, shift, self.tolerance)


@final
class KroneckerInverse(Inverse):
    """(A + λ)⁻¹ of a KroneckerEigen.

    Args:
        operator: A.
        shift: λ.
        tolerance: see Spectral.

    Raises:
        IndefiniteError: an eigenvalue with its damping is not positive.
    """

    def __init__(self, operator: KroneckerEigen, shift: float, tolerance: float) -> None:
        self.operator, self.shift, self.tolerance = operator, shift, tolerance
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.notes = operator.notes
        ends = torch.stack([torch.stack(part.values.aminmax()) for part in operator.blocks])
        least, most = float(ends[:, 0].min()) + shift, float(ends[:, 1].max()) + shift
        # In this basis every direction has its own rounding, whatever the largest eigenvalue.
        if not least > min(torch.finfo(self.dtype).eps, FLAT) * most:
            raise IndefiniteError(indefinite(torch.tensor([least, most])))
        self.inverses = [1 / (part.values + shift) for part in operator.blocks]

    @property
    def scales(self) -> Tensor:
        """1/(Λ + λ) in the coordinates of the operator, ``[p]``."""
        return torch.cat([inverse.flatten() for inverse in self.inverses])

    def _pairs(self) -> list[tuple[Tensor, Eigenblock]]:
        return list(zip(self.inverses, self.operator.blocks, strict=True))

    def damped(self, shift: float) -> "KroneckerInverse":
        """The same with another damping."""
        return KroneckerInverse(self.operator, shift, self.tolerance)

    def solve(self, rows: Tensor) -> Solution[Tensor]:
        """Turn, divide, turn back: exact for this curvature."""
        value = self.operator.scaled(rows, self.inverses)
        return _solved(value, value.new_zeros(len(rows)))

    def quadratic(self, rows: Tensor) -> Tensor:
        """Σ (Q b)² / (Λ + λ) of every row."""
        total = rows.new_zeros(len(rows))
        for inverse, part in self._pairs():
            total += part.turn(part.block.read(rows)).square().flatten(1) @ inverse.flatten()
        return total

    def self_products(self, gradients: Gradients) -> Tensor:
        """The same from outer products, formed only where an example has many."""
        if not isinstance(gradients, BlockGradients):
            return self.quadratic(gradients.dense())
        total = gradients.like.new_zeros(gradients.count)
        for (inverse, part), terms in zip(self._pairs(), gradients.terms, strict=True):
            if len(terms) == 1 and terms[0].positions == 1:
                left, right = (f[:, :, 0].square() for f in part.turned_factors(terms[0]))
                total += ((left @ inverse) * right).sum((0, 2))
            elif terms:
                size = part.block.size * total.element_size()
                for piece in pieces(gradients.count, size):
                    formed = form([term.part(piece) for term in terms], part.block.outputs)
                    total[piece] += part.turn(formed).square().flatten(1) @ inverse.flatten()
        return total

    def precondition(self, gradients: Gradients) -> Solution[Tensor] | Solution[RowValues]:
        """Rows g (A + λ)⁻¹: outer products where a few of them are cheaper than matrices.

        The residual is the root-mean-square error of a query's scores over training gradients
        whose second moments are A, relative to those scores.
        """
        rows: list[Tensor | BlockRows] = []
        residuals = []
        for piece in gradients.pieces():
            found, residual = self._preconditioned(piece)
            rows.append(found)
            residuals.append(residual)
        residual, factored = torch.cat(residuals), [r for r in rows if isinstance(r, BlockRows)]
        if len(factored) == len(rows):
            rows.clear()
            return _solved(BlockRows.joined(factored), residual)
        dense = [each.dense() if isinstance(each, BlockRows) else each for each in rows]
        return _solved(torch.cat(dense), residual)

    def _preconditioned(self, gradients: Gradients) -> tuple[Tensor | BlockRows, Tensor]:
        """The rows of gradients that are there at once, and their residuals ``[q]``."""
        if not isinstance(gradients, BlockGradients):
            solved = self.solve(gradients.dense())
            return solved.value, solved.residual
        squares = [_squares(part, terms) for (_, part), terms in self._with(gradients)]
        sizes = [
            _size(inverse, part, square) if square else None
            for (inverse, part), square in zip(self._pairs(), squares, strict=True)
        ]
        known = [size for size in sizes if size is not None]
        whole = torch.stack(known).sum(0) if known else gradients.like.new_zeros(gradients.count)
        expansions = self._expansions(squares, whole)
        parts: list[Tensor | Pair] = []
        missing = torch.zeros_like(whole)
        for place, ((inverse, part), terms) in enumerate(self._with(gradients)):
            found, square = expansions.get(place), squares[place]
            if found is not None and square is not None:
                parts.append(_expanded(part, terms[0], found))
                missing += _size(found.gap[None], part, square)
            else:
                turned = part.turn(gradients.matrices(place)) * inverse
                parts.append(part.back(turned))
                if square is None:
                    whole += (turned.square() * part.values.clamp_min(0)).flatten(1).sum(1)
        rows = BlockRows(gradients.blocks, parts, self.size)
        return rows, (missing / torch.where(whole > 0, whole, 1.0)).sqrt()

    def _expansions(self, squares: Sequence[Squares | None], whole: Tensor) -> dict[int, Separable]:
        """Expansions of 1/(Λ + λ) whose errors together stay within the tolerance.

        Small blocks come first, on a small part of what is allowed: the largest, where a rank
        costs most, gets all that they left.
        """
        places = [place for place, square in enumerate(squares) if square is not None]
        places.sort(key=lambda place: sum(self.operator.blocks[place].block.shape))
        left, found = self.tolerance**2, {}
        for number, place in enumerate(places if self.tolerance else ()):
            waiting = len(places) - number - 1
            part, square = self.operator.blocks[place], squares[place]
            assert square is not None
            allowed = (left / (4 * waiting) if waiting else left) ** 0.5
            weights = _importance(part, square, whole)
            expansion = separate(self.inverses[place][0], weights, allowed)
            if expansion is not None and _pays(expansion, part.block):
                found[place] = expansion
                left -= expansion.error**2
        return found

    def _with(self, gradients: BlockGradients) -> Any:
        return zip(self._pairs(), gradients.terms, strict=True)


def _shared(basis: Tensor) -> Tensor:
    """One group's basis as a plain matrix: products with it are one product over all rows."""
    return basis[0] if len(basis) == 1 else basis


def _squares(part: Eigenblock, terms: Sequence[Outer]) -> Squares | None:
    """Squares of a query's two factors in the basis, where its gradient is one outer product."""
    if part.flat or len(terms) != 1 or terms[0].positions != 1 or part.block.groups != 1:
        return None
    left, right = (f[0, :, 0].square() for f in part.turned_factors(terms[0]))
    return left, right


def _size(scale: Tensor, part: Eigenblock, squares: Squares) -> Tensor:
    """Mean square ``[q]`` of a block's part in the scores of queries that are scaled so."""
    weight = scale[0].square() * part.values[0].clamp_min(0)
    return ((squares[0] @ weight) * squares[1]).sum(1)


def _importance(part: Eigenblock, squares: Squares, whole: Tensor) -> Tensor:
    """What an error of 1/(Λ + λ) costs: the root of its mean square effect, each query alike."""
    each = squares[0] / (whole[:, None].clamp_min(torch.finfo(whole.dtype).tiny) * len(whole))
    return ((each.T @ squares[1]) * part.values[0].clamp_min(0)).sqrt()


def _pays(found: Separable, block: Block) -> bool:
    """Whether products with the expansion are cheaper than with a matrix."""
    return len(found.rows) * (block.outputs + block.inputs) < block.outputs * block.inputs


def _expanded(part: Eigenblock, term: Outer, found: Separable) -> Pair:
    """Queries' outer products times the expansion, out of the basis again."""
    left, right = (f[0, :, 0] for f in part.turned_factors(term))
    lefts, rights = left[:, None] * found.rows, right[:, None] * found.columns
    lefts = lefts if part.left is None else lefts @ part.left[0].mT
    rights = rights if part.right is None else rights @ part.right[0].mT
    return Pair(lefts[None], rights[None])


def _solved(value: Value, residual: Tensor) -> Solution[Value]:
    return Solution(value, residual, (Status.CONVERGED,) * len(residual))
