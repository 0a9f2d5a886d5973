"""Rows with a Kronecker-factored curvature, inverted in its eigenbasis."""

from upweight.linalg import Spectral
from upweight.methods.method import Method
from upweight.weighing import per_parameter_change, per_self_influence

__all__ = ["ROWS"]

ROWS = (
    Method("ekfac", "Gauss-Newton, eigenvalue-corrected K-FAC", "ekfac", Spectral()),
    Method("kfac", "Gauss-Newton, Kronecker factors", "kfac", Spectral()),
    Method("kfac_reduce", "the same, positions averaged", "kfac_reduce", Spectral()),
    Method("eshampoo", "Gauss-Newton, eigenvalue-corrected Shampoo", "eshampoo", Spectral()),
    Method("diagonal", "Gauss-Newton, its diagonal", "diagonal", Spectral()),
    Method("empirical_ekfac", "empirical Fisher, corrected K-FAC", "empirical_ekfac", Spectral()),
    Method(
        "relatif",
        "ekfac, per parameter change of each example: outliers no longer lead",
        "ekfac",
        Spectral(),
        per_parameter_change,
        "‖H⁻¹∇ℓ‖",
    ),
    Method(
        "l_relatif",
        "ekfac, per root of each example's self-influence",
        "ekfac",
        Spectral(),
        per_self_influence,
        "√(∇ℓH⁻¹∇ℓ)",
    ),
)
