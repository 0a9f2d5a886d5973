"""Rows that solve among the few numbers that a projection leaves of a gradient."""

from upweight.linalg import Cholesky, Spectral
from upweight.methods.method import Method
from upweight.projections import (
    LeadingEigenvalues,
    LowRankKernel,
    ProjectedKernel,
    Pulled,
    RandomSides,
    SparseEntries,
    compression_of,
)
from upweight.solvers import Nystrom

__all__ = ["ROWS"]

_SKETCH = Nystrom(256)

ROWS = (
    Method(
        "trak",
        "gradients of margins, randomly projected; ask for measure='margin'",
        ProjectedKernel(SparseEntries(4096), "margin"),
        Pulled(Cholesky()),
        assumes="margins are linear in the parameters, and every loss bends as much along its "
        "margin: the order is meant, not the size",
        when="classifiers of any size, averaged over several trainings; k below the examples",
        cost="one pass, k² numbers with k = 4,096",
    ),
    Method(
        "logra",
        "empirical Fisher of layers projected from both sides",
        ProjectedKernel(RandomSides(32)),
        Pulled(Cholesky()),
        compression=compression_of,
        assumes="layers act apart, 32 x 32 numbers tell of each, and gradients at the given "
        "labels spread as the loss bends",
        when="many queries over time: projected gradients are kept, and asked at little cost",
        cost="one pass, 1,024² numbers a layer",
    ),
    Method(
        "leading_ekfac",
        "ekfac, the leading 1,024 directions of each layer alone",
        LeadingEigenvalues(1024),
        Pulled(Spectral()),
        compression=compression_of,
        assumes="as ekfac, and the flat directions that are left out do not matter, although "
        "their inverse is the largest",
        when="as ekfac, with 1,024 numbers to keep of a layer's training gradient",
        cost="as ekfac; 1,024 numbers a layer and the columns they need",
    ),
    Method(
        "lorif",
        "logra with low-rank gradients and curvature; needs damping or l2",
        LowRankKernel(RandomSides(64), _SKETCH),
        Pulled(_SKETCH),
        compression=compression_of,
        assumes="as logra, an example's projected gradient of a layer is nearly one outer "
        "product, and 256 directions hold the curvature of all layers",
        when="as logra, where the kept gradients have to be an order of magnitude smaller",
        cost="one pass, 256 x 4,096 numbers a layer",
    ),
)
