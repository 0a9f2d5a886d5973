"""Rows of this library that are judged by retraining alone: methods, dampings, checkpoints, seeds.

The rows of ``CONTENDERS`` are judged by retraining too; these would only make its tables of costs
longer.
"""

from dataclasses import replace
from typing import Any

from benchmarks.contenders.contender import LONG, Contender

__all__ = ["OURS"]

_PACKAGES = ("upweight", "torch", "numpy")

_ASTRA = "Gauss-Newton, 200 random steps preconditioned by EK-FAC"
# Damped by the score's λ, as the rows of CONTENDERS are.
_CURVED = (
    ("kfac", "K-FAC"),
    ("kfac_reduce", "K-FAC, positions summed first"),
    ("eshampoo", "eigenvalue-corrected Shampoo"),
    ("diagonal", "diagonal of the Gauss-Newton matrix"),
    ("empirical_ekfac", "EK-FAC of the empirical Fisher matrix"),
    ("last_layer", "Gauss-Newton of the last layer alone"),
    ("datainf", "empirical Fisher matrix by layers, the mean of inverses"),
    ("trak", "gradients of margins, projected to 4,096 by sparse signs"),
    ("logra", "empirical Fisher matrix of gradients projected on both sides, 32 x 32 a layer"),
    ("lorif", "the same at 64 x 64, gradients of rank 1, Woodbury of rank 256"),
    ("leading_ekfac", "EK-FAC on the directions of its 1,024 largest eigenvalues"),
    ("nystrom", "Gauss-Newton, randomised sketch of rank 100"),
    ("arnoldi", "Hessian on its 50 largest eigenvectors"),
    ("astra", _ASTRA),
    ("relatif", "EK-FAC, per parameter change of each example"),
    ("l_relatif", "EK-FAC, per root of each example's self-influence"),
)
_PLAIN = (
    ("representer", "last layer, its L2 alone for the curvature"),
    ("no_hessian", "inner products of gradients"),
    ("cosine", "cosines of gradients"),
    ("loss", "training loss, alike for all queries"),
    ("gradient_norm", "length of training gradients, alike for all queries"),
    ("margin", "minus the training margin, alike for all queries"),
    ("random", "random numbers"),
)
_SOLVED = "Gauss-Newton, conjugate gradients to a residual of 0.01"
_SIMILAR = (
    ("embedding", "cosine of the last layer's inputs"),
    ("euclidean", "minus the distance between inputs"),
)


def _row(method: str, note: str, suffix: str = "", **settings: Any) -> Contender:
    name = f"upweight {method.replace('_', ' ')}{suffix}"
    given = {"method": method, **settings}
    return Contender(name, "upweight_method", given, note, packages=_PACKAGES, limit_s=LONG)


def _table(damping: float, without: tuple[str, ...] = ()) -> tuple[Contender, ...]:
    """The rows of the method table that a task can be asked for."""
    return (
        *(_row(name, note, damping=damping) for name, note in _CURVED if name not in without),
        *(_row(name, note) for name, note in (*_PLAIN, *_SIMILAR) if name not in without),
    )


def _at(
    method: str, said: str, *values: float, suffix: str = "", **settings: Any
) -> tuple[Contender, ...]:
    """A method at several dampings."""
    return tuple(
        _row(method, f"{said}, λ = {x:g}", f"{suffix} {x:g}", damping=x, **settings) for x in values
    )


def _some(queries: int, *found: Contender) -> tuple[Contender, ...]:
    """Rows too dear for all queries of the task."""
    return tuple(replace(row, queries=queries) for row in found)


def _hessian(damping: float, series: tuple[int, int, int]) -> tuple[Contender, ...]:
    """Where the Hessian with less damping is not positive at the final weights."""
    said = f"λ = {damping:g}, as the Hessian bends down with less"
    steps = f"Hessian, series of {series[0]} steps"
    return (
        _row("cg", f"Hessian, conjugate gradients to 0.01, {said}", damping=damping, rtol=0.01),
        _row("lissa", f"{steps}, {said}", damping=damping, series=series),
    )


def _tight(damping: float, dtype: str) -> Contender:
    """What the others' agreement is measured against."""
    note = "Gauss-Newton, conjugate gradients to a residual of 0.001, the score's λ"
    row = _row("ggn_cg", note, " tight", damping=damping, rtol=1e-3)
    return replace(row, dtype=dtype)


def _early(method: str, epochs: tuple[int, ...], damping: float, **settings: Any) -> Contender:
    """At checkpoints of the one run that is explained."""
    said = " ".join(map(str, epochs))
    note = f"mean over the checkpoints after epochs {said}" if epochs[1:] else f"after epoch {said}"
    suffix = f" epochs {said}" if epochs[1:] else f" epoch {said}"
    given = {"damping": damping, "epochs": epochs, **settings}
    return _row(method, f"{note}, λ = {damping:g}", suffix, **given)


def _models(
    method: str, models: int, damping: float, epochs: tuple[int, ...] = (), **settings: Any
) -> Contender:
    """Other seeds too."""
    note = f"mean over {models} seeds, {models - 1} more trainings in its cost, λ = {damping:g}"
    suffix = f" x {models}"
    if epochs:
        said = " ".join(map(str, epochs))
        note, suffix = f"{note}, after epoch {said}", f"{suffix} epoch {said}"
    given = {"damping": damping, "models": models, "epochs": epochs, **settings}
    return _row(method, note, suffix, **given)


def _tracin(epochs: tuple[int, ...], rate: float) -> Contender:
    note = f"TracIn over the checkpoints after epochs {' '.join(map(str, epochs))}"
    settings = {"epochs": epochs, "rates": (rate,) * len(epochs)}
    return Contender("upweight tracin", "upweight_tracin", settings, note, packages=_PACKAGES)


OURS: dict[str, tuple[Contender, ...]] = {
    "mlp": (
        _tight(0.001, "float64"),
        *_at("ggn_cg", _SOLVED, 0.003, 0.01, rtol=0.01),
        *_at("ekfac", "EK-FAC", 0.003, 0.01, 0.03, 0.1),
        *_table(0.001),
        *_hessian(0.1, (500, 1, 256)),
        _early("ekfac", (2,), 0.001),
        _early("kfac", (2,), 0.001),
        _early("kfac", (1, 2, 3, 4), 0.001),
        _tracin((2, 4, 6, 8, 10), 2 * 94 * 0.05),
        _early("ggn_cg", (2,), 0.01, rtol=0.03),
        _early("ggn_cg", (1, 2, 3, 4), 0.01, rtol=0.03),
        replace(
            _early("ggn_cg", (1, 2, 3, 4), 0.003, rtol=0.03),
            name="upweight ggn cg 0.003 epochs 1 2 3 4",
        ),
        _models("ekfac", 5, 0.001),
        _models("kfac", 5, 0.001, (2,)),
        _models("ggn_cg", 5, 0.01, (2,), rtol=0.03),
    ),
    "cnn": (
        _tight(0.01, "float32"),
        *_at("ggn_cg", _SOLVED, 0.001, 0.03, rtol=0.01),
        *_at("ekfac", "EK-FAC", 0.001, 0.03, 0.1),
        *_table(0.01),
        *_hessian(0.5, (150, 1, 128)),
        _tracin((2, 4, 6, 8, 10), 2 * 79 * 0.05),
        _early("ekfac", (2,), 0.01),
        _early("ggn_cg", (2,), 0.01, rtol=0.03),
        _models("ekfac", 5, 0.01),
        replace(_models("ekfac", 5, 0.001), name="upweight ekfac 0.001 x 5"),
        _models("ggn_cg", 5, 0.01, rtol=0.03),
    ),
    "transformer": (
        *_at("ekfac", "EK-FAC", 1e-6, 1e-5, 0.0001, 0.001, 0.1),
        *_at("ekfac", "EK-FAC fitted on all examples", 1e-6, 1e-5, suffix=" whole", whole=True),
        *_at("last_layer", "Gauss-Newton of the last layer alone", 0.0001, 0.001),
        *_table(0.01, without=("euclidean", "arnoldi", "astra")),
        _row("arnoldi", "Hessian on its 20 largest eigenvectors", damping=0.01, steps=40),
        *_some(4, _row("astra", _ASTRA, damping=0.01), *_hessian(2.0, (150, 1, 64))),
        _row("bm25", "shared characters, rare ones first"),
        _early("ekfac", (2,), 0.01),
        _models("ekfac", 3, 0.01),
        replace(
            _early("ekfac", (4, 6, 8, 10), 1e-5, whole=True),
            name="upweight ekfac whole 1e-05 epochs 4 6 8 10",
        ),
        _early("last_layer", (4, 6, 8, 10), 1e-3),
        replace(_models("ekfac", 5, 1e-6, whole=True), name="upweight ekfac whole 1e-06 x 5"),
    ),
    "resnet9": (
        *_at("ekfac", "EK-FAC", 1e-5, 0.0001, 0.001, 0.1),
        *_table(0.01),
        *_some(4, *_hessian(10.0, (150, 1, 128))),
        _early("ekfac", (2,), 0.01),
        replace(_models("ekfac", 5, 1e-5), name="upweight ekfac 1e-05 x 5"),
        replace(_early("ekfac", (4, 6, 8, 10), 1e-5), name="upweight ekfac 1e-05 epochs 4 6 8 10"),
    ),
}
