"""Rows with a Kronecker-factored curvature, inverted in its eigenbasis."""

from upweight.linalg import Spectral
from upweight.methods.method import Method
from upweight.weighing import per_parameter_change, per_self_influence

__all__ = ["ROWS"]

# Of a layer from i to o numbers, with its bias in i.
_TWICE = "two passes over as many examples as the factors need, o² + i² + 3 o i numbers a layer"
_ONCE = "one pass over as many examples as the factors need, o² + i² + 2 o i numbers a layer"
_GAUSS_NEWTON = "outputs bend little around the parameters, layers act apart"

ROWS = (
    Method(
        "ekfac",
        "Gauss-Newton, eigenvalue-corrected K-FAC",
        "ekfac",
        Spectral(),
        assumes=f"{_GAUSS_NEWTON}, in each layer inputs and slopes set the axes; lengths along "
        "them are measured",
        when="start here with a network of any size; another damping is free",
        cost=_TWICE,
    ),
    Method(
        "kfac",
        "Gauss-Newton, Kronecker factors",
        "kfac",
        Spectral(),
        assumes=f"{_GAUSS_NEWTON}, in each layer inputs and slopes are independent",
        when="to compare with work that uses it; ekfac costs one pass more",
        cost=_ONCE,
    ),
    Method(
        "kfac_reduce",
        "the same, positions averaged",
        "kfac_reduce",
        Spectral(),
        assumes="as kfac, and positions of an example that act as one",
        when="convolutions and tokens whose outputs are averaged before the loss",
        cost=_ONCE,
    ),
    Method(
        "eshampoo",
        "Gauss-Newton, eigenvalue-corrected Shampoo",
        "eshampoo",
        Spectral(),
        assumes=f"{_GAUSS_NEWTON}, in each layer the gradients' two sides set the axes",
        when="beside ekfac where weights see many positions: which is closer depends on the model",
        cost=_TWICE,
    ),
    Method(
        "diagonal",
        "Gauss-Newton, its diagonal",
        "diagonal",
        Spectral(),
        assumes="outputs bend little around the parameters, which act apart",
        when="the plainest curvature, to see what the better ones add",
        cost="two passes, 3 p numbers",
    ),
    Method(
        "empirical_ekfac",
        "empirical Fisher, corrected K-FAC",
        "empirical_ekfac",
        Spectral(),
        assumes="as ekfac, and gradients at the given labels spread as the loss bends, which "
        "wrong labels and good fits break",
        when="losses of which no Gauss-Newton matrix is known",
        cost=_TWICE,
    ),
    Method(
        "relatif",
        "ekfac, per parameter change of each example: outliers no longer lead",
        "ekfac",
        Spectral(),
        per_parameter_change,
        "‖H⁻¹∇ℓ‖",
        assumes="as ekfac; the order is meant, not the size",
        when="the same few outliers lead the list of every query",
        cost=f"{_TWICE}; a product with H⁻¹ for each training example",
    ),
    Method(
        "l_relatif",
        "ekfac, per root of each example's self-influence",
        "ekfac",
        Spectral(),
        per_self_influence,
        "√(∇ℓH⁻¹∇ℓ)",
        assumes="as relatif",
        when="as relatif, with examples compared by the change of their own loss",
        cost=f"{_TWICE}; a product with H⁻¹ for each training example",
    ),
)
