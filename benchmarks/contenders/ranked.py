"""Rows that are judged by retraining alone: the method table of this library, and dampings.

The rows of ``CONTENDERS`` are judged by retraining too; these would only make its tables of costs
longer.
"""

from typing import Any

from benchmarks.contenders.contender import Contender

__all__ = ["RANKED"]

_PACKAGES = ("upweight", "torch", "numpy")

# Damped by the score's λ, as the rows of CONTENDERS are.
_CURVED = (
    ("kfac", "K-FAC"),
    ("eshampoo", "eigenvalue-corrected Shampoo"),
    ("diagonal", "diagonal of the Gauss-Newton matrix"),
    ("empirical_ekfac", "EK-FAC of the empirical Fisher matrix"),
    ("last_layer", "Gauss-Newton of the last layer alone"),
    ("relatif", "EK-FAC, per parameter change of each example"),
    ("l_relatif", "EK-FAC, per root of each example's self-influence"),
)
_PLAIN = (
    ("no_hessian", "inner products of gradients"),
    ("cosine", "cosines of gradients"),
    ("loss", "training loss, alike for all queries"),
    ("gradient_norm", "length of training gradients, alike for all queries"),
    ("margin", "minus the training margin, alike for all queries"),
    ("random", "random numbers"),
)
_SIMILAR = (
    ("embedding", "cosine of the last layer's inputs"),
    ("euclidean", "minus the distance between inputs"),
)


def _row(method: str, note: str, suffix: str = "", **settings: Any) -> Contender:
    name = f"upweight {method.replace('_', ' ')}{suffix}"
    given = {"method": method, **settings}
    return Contender(name, "upweight_method", given, note, packages=_PACKAGES)


def _table(damping: float, without: tuple[str, ...] = ()) -> tuple[Contender, ...]:
    """The rows of the method table that a task can be asked for."""
    return (
        *(_row(name, note, damping=damping) for name, note in _CURVED if name not in without),
        *(_row(name, note) for name, note in (*_PLAIN, *_SIMILAR) if name not in without),
    )


def _dampings(*values: float) -> tuple[Contender, ...]:
    return tuple(_row("ekfac", f"EK-FAC, λ = {x:g}", f" {x:g}", damping=x) for x in values)


def _solved(*values: float, rtol: float) -> tuple[Contender, ...]:
    said = f"Gauss-Newton, conjugate gradients to a residual of {rtol:g}"
    return tuple(
        _row("ggn_cg", f"{said}, λ = {x:g}", f" {x:g}", damping=x, rtol=rtol) for x in values
    )


RANKED: dict[str, tuple[Contender, ...]] = {
    "mlp": (
        *_dampings(0.003, 0.01, 0.03, 0.1),
        *_solved(0.003, 0.01, 0.03, rtol=0.01),
        *_table(0.001),
    ),
    "cnn": (
        *_dampings(0.001, 0.03, 0.1, 0.3),
        *_solved(0.03, 0.1, rtol=0.01),
        *_table(0.01),
    ),
    "transformer": (
        *_dampings(0.0001, 0.001, 0.1),
        *_table(0.01, without=("eshampoo", "euclidean")),
        _row("bm25", "shared characters, rare ones first"),
    ),
    "resnet9": (
        *_dampings(0.001, 0.03, 0.1),
        *_table(0.01, without=("eshampoo",)),
    ),
}
