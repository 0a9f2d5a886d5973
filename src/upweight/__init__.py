"""upweight: influence functions and training-data attribution you can check.

Which training examples made a model say this, which of them are wrong, what happens if they
change, and how far that answer can be trusted.

    import upweight as uw
    inf = uw.Influence(model, train, loss="cross_entropy", l2=0.01)
    inf.explain(test).top(0)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upweight.answers import (
        GroupEffects,
        L2Derivative,
        ParameterChange,
        Perturbation,
        Sweep,
        Validation,
        WhatIf,
    )
    from upweight.bars import progress
    from upweight.budget import memory
    from upweight.calibration import Calibration
    from upweight.curvature import Sketch
    from upweight.damping import FiniteTraining
    from upweight.data import Data
    from upweight.ensemble import Ensemble, tracin
    from upweight.errors import UpweightError
    from upweight.evidence import Evidence
    from upweight.exports import influence_json
    from upweight.front import Influence
    from upweight.linalg import Cholesky, Eigen, Spectral
    from upweight.losses import (
        BinaryCrossEntropy,
        CrossEntropy,
        Hinge,
        MeanSquaredError,
        SmoothHinge,
    )
    from upweight.methods import METHODS, Baseline, Method
    from upweight.objective import Objective
    from upweight.onecall import influence
    from upweight.parameters import Selection
    from upweight.plan import Plan
    from upweight.projections import (
        GaussianEntries,
        LeadingDirections,
        LeadingEigenvalues,
        LowRankKernel,
        ProjectedKernel,
        Pulled,
        RademacherEntries,
        RandomSides,
        SparseEntries,
    )
    from upweight.retraining import (
        SGD,
        Adam,
        AdamW,
        Own,
        Refit,
        Training,
        Trials,
        Truth,
        fit,
    )
    from upweight.risk import Risk
    from upweight.scores import Extremes, Scores
    from upweight.solvers import CG, Budget, DataInf, Kronecker, Lanczos, LiSSA, Nystrom, Settled
    from upweight.tables import Table
    from upweight.tuning import Tuning

__version__ = "0.1.0"

# Public names and where they live: looked up on first use, so that the command line starts
# without importing torch.
_HOMES = {
    "answers": (
        "GroupEffects",
        "L2Derivative",
        "ParameterChange",
        "Perturbation",
        "Sweep",
        "Validation",
        "WhatIf",
    ),
    "calibration": ("Calibration",),
    "curvature": ("Sketch",),
    "damping": ("FiniteTraining",),
    "data": ("Data",),
    "ensemble": ("Ensemble", "tracin"),
    "errors": ("UpweightError",),
    "evidence": ("Evidence",),
    "exports": ("influence_json",),
    "front": ("Influence",),
    "linalg": ("Cholesky", "Eigen", "Spectral"),
    "losses": ("BinaryCrossEntropy", "CrossEntropy", "Hinge", "MeanSquaredError", "SmoothHinge"),
    "budget": ("memory",),
    "methods": ("METHODS", "Baseline", "Method"),
    "objective": ("Objective",),
    "onecall": ("influence",),
    "parameters": ("Selection",),
    "plan": ("Plan",),
    "projections": (
        "GaussianEntries",
        "LeadingDirections",
        "LeadingEigenvalues",
        "LowRankKernel",
        "ProjectedKernel",
        "Pulled",
        "RademacherEntries",
        "RandomSides",
        "SparseEntries",
    ),
    "bars": ("progress",),
    "retraining": (
        "SGD",
        "Adam",
        "AdamW",
        "Own",
        "Refit",
        "Training",
        "Trials",
        "Truth",
        "fit",
    ),
    "risk": ("Risk",),
    "scores": ("Extremes", "Scores"),
    "solvers": ("CG", "Budget", "DataInf", "Kronecker", "Lanczos", "LiSSA", "Nystrom", "Settled"),
    "tables": ("Table",),
    "tuning": ("Tuning",),
}

__all__ = [
    "CG",
    "METHODS",
    "SGD",
    "Adam",
    "AdamW",
    "Baseline",
    "BinaryCrossEntropy",
    "Budget",
    "Calibration",
    "Cholesky",
    "CrossEntropy",
    "Data",
    "DataInf",
    "Eigen",
    "Ensemble",
    "Evidence",
    "Extremes",
    "FiniteTraining",
    "GaussianEntries",
    "GroupEffects",
    "Hinge",
    "Influence",
    "Kronecker",
    "L2Derivative",
    "Lanczos",
    "LeadingDirections",
    "LeadingEigenvalues",
    "LiSSA",
    "LowRankKernel",
    "MeanSquaredError",
    "Method",
    "Nystrom",
    "Objective",
    "Own",
    "ParameterChange",
    "Perturbation",
    "Plan",
    "ProjectedKernel",
    "Pulled",
    "RademacherEntries",
    "RandomSides",
    "Refit",
    "Risk",
    "Scores",
    "Selection",
    "Settled",
    "Sketch",
    "SmoothHinge",
    "SparseEntries",
    "Spectral",
    "Sweep",
    "Table",
    "Training",
    "Trials",
    "Truth",
    "Tuning",
    "UpweightError",
    "Validation",
    "WhatIf",
    "__version__",
    "fit",
    "influence",
    "influence_json",
    "memory",
    "progress",
    "tracin",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"upweight.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'upweight' has no attribute {name!r}")
