"""Rows that solve with a curvature as it is: directly, by iterations, or by a random series."""

from upweight.curvature import FirstOf, Leading, Sketch
from upweight.gradients import last_layer
from upweight.linalg import Cholesky, Spectral
from upweight.methods.method import Method
from upweight.solvers import CG, DataInf, Kronecker, Lanczos, LiSSA, Nystrom
from upweight.weighing import without_loss

__all__ = ["ROWS"]

_CG = CG(preconditioner=FirstOf((Sketch(), Leading())))
# p parameters, q queries, N examples; a product with the curvature is a pass over the data.
_DENSE = "p products (closed form for linear models and layers), p³/3 operations, 16 p² bytes"
_ITERATED = "about 10 products of all queries, 5 q p numbers and a preconditioner"
_MINIMUM = "the model minimises the stated objective"
# Fewer, larger steps than a series without preconditioner needs.
_ASTRA = LiSSA(depth=200, repeats=1, batch_size=512, preconditioner=Kronecker())

ROWS = (
    Method(
        "exact",
        "Hessian, Cholesky factorisation; small models",
        "hessian",
        Cholesky(),
        assumes=f"{_MINIMUM}, where the Hessian is positive definite",
        when="up to about 10,000 parameters, linear models above all: nothing else is approximated",
        cost=_DENSE,
    ),
    Method(
        "cg",
        "Hessian, conjugate gradients; residual per query",
        "hessian",
        _CG,
        assumes=f"{_MINIMUM}, where the Hessian is positive definite",
        when="more parameters than exact takes, convex models; every query says how well it is "
        "solved",
        cost=_ITERATED,
    ),
    Method(
        "lissa",
        "Hessian, the paper's stochastic series",
        "hessian",
        LiSSA(),
        assumes="as cg, and a series long enough for every direction that matters",
        when="to repeat what the paper computed; cg otherwise, which is as exact as it is asked "
        "to be",
        cost="products of depth · repeats · batch_size examples with each query, 50 q p numbers",
    ),
    Method(
        "ggn",
        "Gauss-Newton, Cholesky; positive for any network",
        "ggn",
        Cholesky(),
        assumes="outputs bend little around the parameters; no minimum is needed for a positive "
        "matrix",
        when="small networks, whose Hessian is seldom positive definite",
        cost=_DENSE,
    ),
    Method(
        "ggn_cg",
        "Gauss-Newton, conjugate gradients",
        "ggn",
        _CG,
        assumes="outputs bend little around the parameters",
        when="networks where fidelity matters: the judge of ekfac on a few queries",
        cost=_ITERATED,
    ),
    Method(
        "fisher",
        "true Fisher, Cholesky",
        "fisher",
        Cholesky(),
        assumes="the loss is a likelihood, and labels spread as the model says",
        when="as ggn, which it equals for cross-entropy on logits",
        cost=_DENSE,
    ),
    Method(
        "empirical_fisher",
        "empirical Fisher, Cholesky",
        "empirical_fisher",
        Cholesky(),
        assumes="gradients at the given labels spread as the loss bends, which wrong labels and "
        "good fits break",
        when="to compare with work that uses it; ggn otherwise",
        cost=_DENSE,
    ),
    Method(
        "last_layer",
        "Gauss-Newton of the last layer alone, Cholesky",
        "ggn",
        Cholesky(),
        part=last_layer,
        assumes="removing an example leaves the features as they are",
        when="a quick look at a large network with a small head",
        cost=f"{_DENSE}, p of the last layer",
    ),
    Method(
        "arnoldi",
        "Hessian on its largest eigenvectors, from a Krylov space",
        "hessian",
        Lanczos(),
        assumes="a query lies in the few directions of largest curvature: its residual says how "
        "little",
        when="to repeat Schioppa et al. (2022): one space for any queries and dampings; flat "
        "directions, where much of influence is, are lost",
        cost="100 products of one row, 150 p numbers",
    ),
    Method(
        "nystrom",
        "Gauss-Newton, randomised sketch beside L2 and damping",
        "ggn",
        Nystrom(),
        assumes="what the sketch misses of the curvature is small beside L2 and damping",
        when="many dampings or queries of one network, with damping above its small eigenvalues",
        cost="108 products of one row in one pass, one product of all queries, 200 p numbers",
    ),
    Method(
        "astra",
        "Gauss-Newton, random series preconditioned by EK-FAC",
        "ggn",
        _ASTRA,
        assumes="outputs bend little around the parameters, and a series long enough",
        when="more accuracy than ekfac where the data are too many for whole passes; ggn_cg "
        "otherwise",
        cost="that of ekfac, products of 102,400 examples with each query, 8 q p numbers",
    ),
    Method(
        "datainf",
        "empirical Fisher by layers, mean of inverses for inverse of the mean",
        "empirical_fisher",
        DataInf(),
        assumes="gradients of one layer hardly overlap, or λ is large beside them; layers are "
        "apart",
        when="to compare with work that uses it (Kwon et al., 2024, for LoRA); ekfac otherwise",
        cost="two passes over training gradients, 3 q p numbers",
    ),
    Method(
        "representer",
        "last layer, L2 alone for the Hessian: representer points",
        "l2",
        Spectral(tolerance=0),
        part=last_layer,
        assumes="the last layer is at a stationary point of its L2-regularised risk",
        when="to split a prediction into examples (Yeh et al., 2018); its values predict no "
        "removal where the losses bend",
        cost="one gradient of the risk",
    ),
    Method(
        "no_hessian",
        "gradient dot product: identity for H⁻¹",
        assumes="the loss bends alike in all directions",
        when="a cheap ranking, one checkpoint of TracIn; its values predict no change on removal",
        cost="nothing",
    ),
    Method(
        "no_train_loss",
        "exact, each gradient divided by its misfit (ablation)",
        "hessian",
        Cholesky(),
        without_loss,
        assumes="a cross-entropy, and what exact assumes",
        when="only to see what training losses add (Figure 1 of the paper)",
        cost=f"{_DENSE}, and one forward pass",
    ),
    Method(
        "neither",
        "no Hessian and no train loss (ablation)",
        rescale=without_loss,
        assumes="a cross-entropy, that bends alike in all directions",
        when="only to see what Hessian and training losses add (Figure 1 of the paper)",
        cost="one forward pass",
    ),
)
