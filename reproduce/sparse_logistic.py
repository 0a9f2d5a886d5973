"""Logistic regression on sparse rows, and every example's leverage through an n x n matrix.

For labels s = ±1, θ minimises mean log(1 + exp(−s θᵀx)) + ½ λ ‖θ‖². With p features and n < p
examples, everything about leaving one example out follows from the kernel K = X Xᵀ, which no
change of labels touches: with d = σ(m) σ(−m), m = s θᵀx and M = λ + √D K √D / n, the leverage
(1/n) d_i x_iᵀ H⁻¹ x_i is 1 − λ (M⁻¹)_ii.
"""

from dataclasses import dataclass

import numpy as np
from scipy import linalg, optimize, sparse
from scipy.special import expit, log_expit

__all__ = ["LeaveOneOut", "leave_one_out", "minimum"]


def minimum(
    x: sparse.csr_array,
    signs: np.ndarray,
    l2: float,
    *,
    start: np.ndarray | None = None,
    tolerance: float = 1e-7,
) -> np.ndarray:
    """The minimiser θ ``[p]``, by L-BFGS.

    Args:
        x: rows ``[n, p]``.
        signs: labels ±1, ``[n]``.
        l2: λ.
        start: zeros by default.
        tolerance: on the largest entry of the gradient.
    """
    turned, n = x.T.tocsr(), len(signs)

    def value(row: np.ndarray) -> tuple[float, np.ndarray]:
        margin = signs * (x @ row)
        slope = turned @ (expit(-margin) * (-signs / n)) + l2 * row
        return float(-log_expit(margin).mean() + 0.5 * l2 * row @ row), slope

    found = optimize.minimize(
        value, np.zeros(x.shape[1]) if start is None else start, jac=True, method="L-BFGS-B",
        options={"gtol": tolerance, "ftol": 0, "maxiter": 5000, "maxfun": 20_000, "maxcor": 20},
    )  # fmt: skip
    return found.x


@dataclass(frozen=True)
class LeaveOneOut:
    """What leaving each example out does to its own margin, from one fit.

    Attributes:
        margin: m_i of the fit, ``[n]``; its loss is log(1 + exp(−m)).
        leverage: h_i, ``[n]``.
        inverse: M⁻¹, ``[n, n]``, of which the lower triangle counts.
        root: √(D / n), ``[n]``.
        kernel: K, ``[n, n]``.
        l2: λ.
    """

    margin: np.ndarray
    leverage: np.ndarray
    inverse: np.ndarray
    root: np.ndarray
    kernel: np.ndarray
    l2: float

    @property
    def loss(self) -> np.ndarray:
        """Training losses, ``[n]``."""
        return -log_expit(self.margin)

    @property
    def self_influence(self) -> np.ndarray:
        """(1/n) σ(−m)² xᵀH⁻¹x, which is exp(−m) h."""
        return np.exp(-self.margin) * self.leverage

    @property
    def fall(self) -> np.ndarray:
        """(1/n) σ(−m) xᵀH⁻¹x, which is h / σ(m): what removal takes from the own margin."""
        return self.leverage / expit(self.margin)

    @property
    def outside_margin(self) -> np.ndarray:
        """The margin under the model without the example: one Newton step, exact in its leverage."""
        return self.margin - self.fall / (1 - self.leverage)

    def carried(self, weights: np.ndarray) -> np.ndarray:
        """X H⁻¹ Xᵀ weights, ``[n]``."""
        direct = self.kernel @ weights
        inner = linalg.blas.dsymv(1.0, self.inverse, self.root * direct, lower=1)
        return (direct - self.kernel @ (self.root * inner)) / self.l2


def leave_one_out(kernel: np.ndarray, margin: np.ndarray, l2: float) -> LeaveOneOut:
    """Leverages of all examples by one Cholesky factor of size n.

    Args:
        kernel: K = X Xᵀ, ``[n, n]``.
        margin: of the minimiser, ``[n]``.
        l2: λ.
    """
    root = np.sqrt(expit(margin) * expit(-margin) / len(margin))
    matrix = kernel * root[:, None] * root
    matrix[np.diag_indices_from(matrix)] += l2
    factor = linalg.cholesky(matrix, lower=True, overwrite_a=True, check_finite=False)
    inverse, _ = linalg.lapack.dpotri(factor, lower=1)
    leverage = np.clip(1 - l2 * inverse.diagonal(), 0, None)
    return LeaveOneOut(margin, leverage, inverse, root, kernel, l2)
