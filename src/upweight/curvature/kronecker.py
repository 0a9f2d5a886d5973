"""Kronecker-factored curvature: K-FAC, EK-FAC, their Shampoo relatives and the diagonal.

For a block with gradient matrices G_n = Σ_s l_ns r_nsᵀ the curvature Σ_n share_n E[vec G vec Gᵀ] is
taken to be diagonal in the basis Q_L ⊗ Q_R of eigenvectors of two moments. K-FAC puts products of
their eigenvalues on the diagonal; the corrected form its true values there,

    Λ_jk = Σ_n share_n E[(Q_Lᵀ G_n Q_R)²_jk]        (George et al., 2018).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

from torch import Tensor

from upweight.curvature.fitting import (
    Fitting,
    Rows,
    fit_batch,
    fitted_rows,
    fittings,
    represented,
)
from upweight.curvature.moments import Draw, Expand, Moments, alike
from upweight.curvature.slopes import Draws, Slopes
from upweight.linalg import Block, Eigenblock, KroneckerEigen, Outer
from upweight.linalg.blocks import form, pieces
from upweight.risk import Risk

__all__ = ["EKFAC", "KFAC"]


@final
@dataclass(frozen=True)
class KFAC:
    """Products of the moments' eigenvalues (Martens & Grosse, 2015).

    Args:
        moments: ``Expand`` or ``Reduce`` for weights that are used at many positions; ``Gradient``
            for Shampoo's.
        slopes: ``Draws(count)`` or ``Columns()`` for the Gauss-Newton matrix, ``Labels()`` for the
            empirical Fisher.
        rows: examples to fit on; all by default, or "auto" for as many as the moments need.
        seed: of the choice of rows.
    """

    moments: type[Moments] = Expand
    slopes: Slopes = field(default_factory=Draws)
    rows: Rows = None
    seed: int = 0

    def fitted(self, risk: Risk) -> int:
        """How many of the examples it is fitted on."""
        return fitted_rows(risk, self.rows)

    def batch(self, risk: Risk) -> int:
        """How many of them it looks at together."""
        return fit_batch(risk, fitted_rows(risk, self.rows))

    def kept(self, risk: Risk) -> int:
        """Bytes of gradients that it keeps for a second pass."""
        return 0

    def trial(self, risk: Risk, rows: int) -> KroneckerEigen:
        """A fit to a few of the examples, made as the whole one will be: to see what it costs."""
        share = rows / self.fitted(risk)
        return self._fit([fit.shortened(share) for fit in self._passes(risk)])

    def __call__(self, risk: Risk) -> KroneckerEigen:
        """Fit over the training data."""
        return self._fit(self._passes(risk))

    def _passes(self, risk: Risk) -> list[Fitting]:
        return fittings(risk, self.slopes, rows=self.rows, seed=self.seed)

    def _fit(self, passes: Sequence[Fitting]) -> KroneckerEigen:
        blocks: dict[int, Eigenblock] = {}
        for fit in passes:
            moments = fit.moments(self.moments)
            blocks |= {place: part.eigenblock() for place, part in moments.items()}
        notes = tuple(note for fit in passes for note in fit.notes())
        risk = passes[-1].risk
        return represented(risk, blocks, notes, risk.total)


@final
@dataclass(frozen=True)
class EKFAC:
    """The curvature's own diagonal in the basis of the moments (George et al., 2018).

    Args:
        moments: that make the basis: ``Expand``, ``Reduce``, ``Gradient``, or ``Axes`` for the
            plain diagonal.
        slopes: ``Draws(count)`` or ``Columns()`` for the Gauss-Newton matrix, ``Labels()`` for the
            empirical Fisher.
        rows: examples to fit on; all by default, or "auto" for as many as the moments need: 16
            positions per side of the largest block, and 128 examples. With fewer than all, the
            standard error of Λ is reported.
        seed: of the choice of rows.
        exact: blocks of at most so many parameters have a matrix of their own, without factors.
        basis: of an earlier fit, such as one to a part of the data; found anew by default.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from upweight import Data, Objective
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
        >>> data = Data.of((torch.eye(3), torch.tensor([0, 1, 1])))
        >>> EKFAC()(Risk(Objective(model, "cross_entropy"), data)).size
        14
    """

    moments: type[Moments] = Expand
    slopes: Slopes = field(default_factory=Draws)
    rows: Rows = None
    seed: int = 0
    exact: int = 0
    basis: KroneckerEigen | None = field(default=None, repr=False)

    def fitted(self, risk: Risk) -> int:
        """How many of the examples it is fitted on."""
        return fitted_rows(risk, self.rows)

    def batch(self, risk: Risk) -> int:
        """How many of them it looks at together."""
        return fit_batch(risk, fitted_rows(risk, self.rows))

    def kept(self, risk: Risk) -> int:
        """Bytes of gradients that it keeps for a second pass."""
        return max(fit.kept() for fit in self._passes(risk))

    def trial(self, risk: Risk, rows: int) -> KroneckerEigen:
        """A fit to a few of the examples, made as the whole one will be: to see what it costs."""
        share = rows / self.fitted(risk)
        return self._fit([fit.shortened(share) for fit in self._passes(risk)])

    def __call__(self, risk: Risk) -> KroneckerEigen:
        """Fit over the training data: moments first, then the diagonal in their basis."""
        return self._fit(self._passes(risk))

    def _passes(self, risk: Risk) -> list[Fitting]:
        return fittings(risk, self.slopes, rows=self.rows, seed=self.seed, exact=self.exact)

    def _fit(self, passes: Sequence[Fitting]) -> KroneckerEigen:
        blocks: dict[int, Eigenblock] = {}
        notes: list[str] = []
        for fit in passes:
            found, error = self._determined(fit)
            blocks |= found
            notes += fit.notes(error)
        risk = passes[-1].risk
        return represented(risk, blocks, tuple(notes), risk.total)

    def _determined(self, fit: Fitting) -> tuple[dict[int, Eigenblock], float]:
        """The blocks of a pass with their diagonal, and its relative error."""
        if self.basis is None:
            moments = fit.moments(self.moments, keep=True)
            blocks = {k: fit.undetermined(part.eigenblock()) for k, part in moments.items()}
        else:
            blocks = fit.based(self.basis)
        masses = [0.0, 0.0]
        for slopes, number in fit.batches("eigenvalues", keep=False):
            masses[number % 2] += sum(float(share.sum()) for _, share in slopes)
            for place, part in blocks.items():
                draws = [(gradients.terms[place], share) for gradients, share in slopes]
                _add_squares(part, draws, part.values[number % 2])
        error = _standard_error([part.values for part in blocks.values()], masses)
        return {k: replace(b, values=b.values.sum(0)) for k, b in blocks.items()}, error


def _standard_error(halves: list[Tensor], masses: list[float]) -> float:
    """Relative error of the sum of two halves ``[2, ...]`` of the data, from their difference."""
    first, second = (mass / max(sum(masses), 1e-300) for mass in masses)
    gap = sum(float((second * half[0] - first * half[1]).square().sum()) for half in halves)
    size = sum(float(half.sum(0).square().sum()) for half in halves)
    return (gap / max(size * first * second, 1e-300)) ** 0.5 if first * second else float("inf")


def _add_squares(part: Eigenblock, draws: Sequence[Draw], total: Tensor) -> None:
    """Add Σ_n share_n (Q_Lᵀ G_n Q_R)² of every draw to ``[g, o, i]``.

    Where G is one outer product it is not formed, and what all draws were given is turned once.
    """
    single = [terms[0] for terms, _ in draws if len(terms) == 1 and terms[0].positions == 1]
    if not part.flat and len(single) == len(draws) and alike(single):
        left = total.new_zeros(())
        for term, (_, share) in zip(single, draws, strict=True):
            left = left + part.turned_left(term)[:, :, 0].square() * share[:, None]
        total += left.mT @ part.turned_right(single[0])[:, :, 0].square()
        return
    for terms, share in draws:
        if terms:
            _add_formed(part, terms, share, total)


def _add_formed(part: Eigenblock, terms: Sequence[Outer], share: Tensor, total: Tensor) -> None:
    """The same of one draw, its matrices formed in the basis."""
    block = part.block
    turned_first = not part.flat and _turning_first(block, terms)
    for piece in pieces(len(share), 2 * block.size * total.element_size()):
        some = [term.part(piece) for term in terms]
        if turned_first:
            factors = [part.turned_factors(term) for term in some]
            formed = sum(left.mT @ right for left, right in factors)
            assert isinstance(formed, Tensor)
            formed = formed.transpose(0, 1)
        else:
            formed = part.turn(form(some, block.outputs))
        total += (share[piece] @ formed.square_().flatten(1)).view_as(total)


def _turning_first(block: Block, terms: Sequence[Outer]) -> bool:
    """Whether turning the factors costs less than turning the formed matrices."""
    _, o, i = block.shape
    if any(term.indexed for term in terms):
        return False
    return sum(term.positions for term in terms) * (o * o + i * i) < o * i * (o + i)
