"""The contenders of every task: one row each, one small file per library.

A contender's file has one function ``run(problem, **settings)`` that returns the scores ``[q, n]``
in the task's sign and scale (or None where there is nothing to compare).
"""

from dataclasses import replace
from typing import Any

from benchmarks.contenders.contender import FLOOR, LONG, Contender
from benchmarks.contenders.ranked import OURS

__all__ = ["CONTENDERS", "FLOOR", "RANKED", "Contender", "find"]


def _own(name: str, note: str, dtype: str = "float32", **settings: Any) -> Contender:
    packages = ("upweight", "torch", "numpy")
    return Contender(name, "upweight", settings, note, dtype, packages=packages, repeats=3)


def _curvlinops(name: str, note: str, **settings: Any) -> Contender:
    given = {"batch": 1000, "tolerance": 1e-3, "steps": 500, **settings}
    packages = ("curvlinops-for-pytorch", "linear-operator", "torch", "numpy")
    return Contender(name, "curvlinops", given, note, environment="curvlinops", packages=packages)


def _pydvl(name: str, note: str, **settings: Any) -> Contender:
    given = {"batch": 2200, "rtol": 0.03, "steps": 500, "chunk": 1000, **settings}
    packages = ("pyDVL", "torch", "numpy")
    return Contender(name, "pydvl", given, note, environment="pydvl", packages=packages)


def _network_floor(batch: int) -> Contender:
    note = "one forward + backward pass over training data and queries"
    return Contender(FLOOR, "network_floor", {"batch": batch}, note, repeats=3)


def _network(name: str, note: str, repeats: int = 3, **settings: Any) -> Contender:
    """A row of this library on a network."""
    packages = ("upweight", "torch", "numpy")
    return Contender(name, "upweight_ekfac", settings, note, packages=packages, repeats=repeats)


def _ekfac() -> tuple[Contender, ...]:
    """Its rows: with the fit, and another call with the fit at hand."""
    said = "EK-FAC, damped by the score's λ"
    again = f"{said}; the second of two calls, factors already fitted"
    return (
        _network("upweight ekfac", said),
        _network("upweight ekfac fitted", again, calls=2),
    )


def _same_layers(*layers: str) -> Contender:
    """Its EK-FAC of what the peers cover alone."""
    said = f"EK-FAC of the {' and '.join(layers)} layers alone, as the peers' is"
    # A list, as JSON has it.
    return _network("upweight ekfac, their layers", said, layers=list(layers))


def _gauss_newton(queries: int | None = None) -> Contender:
    """Its solve of the exact matrix that the reference is of."""
    said = "Gauss-Newton, conjugate gradients to a residual of 0.03, preconditioned by long rows"
    row = _network("upweight ggn cg", said, repeats=1, rtol=0.03)
    return replace(row, queries=queries, limit_s=LONG)


def _kronfluence(batch: int, covers: str = "") -> tuple[Contender, ...]:
    """Its rows: they differ in the damping of the factors alone."""
    dampings = {
        "kronfluence": (1e-8, "EK-FAC, its default damping"),
        "kronfluence heuristic": (None, "EK-FAC, its heuristic damping"),
        "kronfluence damped": ("score", "EK-FAC, damped by the score's λ"),
    }
    packages = ("kronfluence", "torch", "numpy")
    return tuple(
        Contender(
            name,
            "kronfluence",
            {"batch": batch, "damping": damping},
            note + covers,
            environment="kronfluence",
            packages=packages,
        )
        for name, (damping, note) in dampings.items()
    )


def _curvlinops_ekfac(name: str, note: str, **settings: Any) -> Contender:
    given = {"kind": "ekfac", "batch": 500, "chunk": 250, **settings}
    packages = ("curvlinops-for-pytorch", "torch", "numpy")
    return Contender(
        name, "curvlinops_ekfac", given, note, environment="curvlinops", packages=packages
    )


def _peer(name: str, module: str, package: str, note: str, **settings: Any) -> Contender:
    environment = module.split("_", maxsplit=1)[0]
    packages = (package, "torch", "numpy")
    return Contender(name, module, settings, note, environment=environment, packages=packages)


def _captum(kind: str, note: str, **settings: Any) -> Contender:
    name = "captum last layer" if kind == "last" else "captum"
    return _peer(name, "captum", "captum", f"{note}; no curvature", kind=kind, **settings)


def _trak(batch: int = 500) -> Contender:
    said = "one checkpoint, margins, Gaussian projection"
    return _peer("trak", "trak", "traker", said, batch=batch, dimension=512)


_TYPE_2 = "EK-FAC, exact output curvature, damped by the score's λ; torch.func gradients"
_PYDVL = "EK-FAC, eigenvalues corrected, damped by the score's λ"
_DATTRI = "EK-FAC of the empirical Fisher matrix, damped by the score's λ"
_SAMPLED = "EK-FAC, one sampled label, damped by the score's λ; torch.func gradients"

CONTENDERS: dict[str, tuple[Contender, ...]] = {
    "softmax": (
        Contender(FLOOR, "floor", {"batch": 4096}, "one forward + backward pass", repeats=5),
        _own("upweight exact", "closed form, Cholesky", method="exact"),
        _own("upweight exact float64", "the same in float64", "float64", method="exact"),
        _own("upweight cg", "the default: tolerance 1e-6", method="cg"),
        _own("upweight cg loose", "tolerance for error ≤ 1e-3", method="cg", rtol=1e-3),
        _curvlinops("curvlinops cg", "Gauss-Newton, unpreconditioned", kfac=False),
        _curvlinops("curvlinops cg + kfac", "its K-FAC as preconditioner", kfac=True),
        _pydvl("pydvl cg", "Hessian, block conjugate gradients"),
    ),
    "mlp": (
        _network_floor(256),
        *_ekfac(),
        _gauss_newton(),
        *_kronfluence(500),
        _curvlinops_ekfac("curvlinops ekfac", _TYPE_2, fisher="type-2"),
        _curvlinops_ekfac("curvlinops ekfac mc", _SAMPLED, fisher="mc"),
        _peer("pydvl ekfac", "pydvl_ekfac", "pyDVL", _PYDVL, batch=500, chunk=500),
        _peer("dattri ekfac", "dattri", "dattri", _DATTRI, batch=500),
        _captum("hooks", "TracInCP, all layers", batch=500),
        _captum("last", "TracInCPFast, last layer", batch=500),
        _trak(),
    ),
    "cnn": (
        _network_floor(100),
        *_ekfac(),
        _gauss_newton(),
        *_kronfluence(250),
        _curvlinops_ekfac("curvlinops ekfac", _TYPE_2, fisher="type-2", batch=100),
        _curvlinops_ekfac("curvlinops ekfac mc", _SAMPLED, fisher="mc", batch=100),
        _captum("hooks", "TracInCP, all layers", batch=250),
        _captum("last", "TracInCPFast, last layer", batch=500),
        _trak(),
    ),
    "transformer": (
        _network_floor(20),
        *_ekfac(),
        _same_layers("Linear"),
        _gauss_newton(queries=4),
        *_kronfluence(50, "; Linear layers alone, 94 % of the parameters"),
        _curvlinops_ekfac(
            "curvlinops ekfac", "EK-FAC, one sampled label", fisher="mc", batch=20, chunk=50
        ),
        _curvlinops_ekfac(
            "curvlinops kfac",
            "K-FAC (expand) of the Linear layers alone, one sampled label, damped by the score's λ",
            kind="kfac",
            fisher="mc",
            batch=20,
            chunk=50,
        ),
        _captum("loop", "TracInCP, all parameters, one backward pass each", batch=50),
    ),
    "resnet9": (
        _network_floor(50),
        *_ekfac(),
        _same_layers("Linear", "Conv2d"),
        _gauss_newton(),
        *_kronfluence(100, "; all but the 0.5 % of the parameters in norms"),
        _curvlinops_ekfac(
            "curvlinops ekfac mc",
            f"{_SAMPLED}; all but the 0.5 % of the parameters in norms",
            fisher="mc",
            batch=50,
            chunk=100,
        ),
        _captum("loop", "TracInCP, all parameters, one backward pass each", batch=50),
        _captum("last", "TracInCPFast, last layer", batch=250),
    ),
}


# Peers at the checkpoint at which this library's rows are asked too.
_EARLY = {
    "mlp": ("kronfluence heuristic", "kronfluence damped", "curvlinops ekfac", "pydvl ekfac"),
    "cnn": ("kronfluence heuristic", "curvlinops ekfac"),
}


def _early(task: str) -> tuple[Contender, ...]:
    return tuple(
        replace(row, name=f"{row.name} epoch 2", epoch=2, note=f"{row.note}; after epoch 2")
        for row in CONTENDERS[task]
        if row.name in _EARLY.get(task, ())
    )


# Peers without a row in the tables of costs.
_ONLY_RANKED = {"transformer": (_trak(50),), "resnet9": (_trak(100),)}
RANKED = {task: (*ours, *_early(task), *_ONLY_RANKED.get(task, ())) for task, ours in OURS.items()}


def find(task: str, name: str) -> Contender:
    """The row of a contender.

    Raises:
        SystemExit: there is none.
    """
    rows = (*CONTENDERS[task], *RANKED.get(task, ()))
    for contender in rows:
        if contender.name == name:
            return contender
    known = ", ".join(contender.name for contender in rows)
    raise SystemExit(f"The task {task!r} has no contender {name!r}. Known: {known}.")
