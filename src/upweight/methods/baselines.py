"""Rows that predict no effect: similarities and rankings that influence is to be compared with."""

from upweight.bm25 import bm25
from upweight.methods.method import Baseline
from upweight.neighbours import (
    cosine,
    embedding,
    gradient_norm,
    negative_distance,
    negative_margin,
    random,
    training_loss,
)

__all__ = ["ROWS"]

_GRADIENTS, _INPUTS = "one pass with gradients", "none: the inputs alone"
_FORWARD = "one forward pass"

ROWS = (
    Baseline(
        "cosine",
        "cosine of gradients",
        "gradient_similarity",
        "cosine",
        cosine,
        assumes="what moves the parameters alike belongs together",
        when="the baseline to beat for any network: what curvature and lengths add",
        cost=_GRADIENTS,
    ),
    Baseline(
        "embedding",
        "cosine of the last layer's inputs",
        "embedding_similarity",
        "cosine",
        embedding,
        assumes="the model ends in a linear layer, whose inputs hold what it learned",
        when="the baseline of retrieval: does influence find more than neighbours?",
        cost=_GRADIENTS,
    ),
    Baseline(
        "euclidean",
        "minus the distance between inputs",
        "euclidean_similarity",
        "minus input distance",
        negative_distance,
        assumes="inputs are numbers of one scale",
        when="the baseline that knows nothing of the model: nearest neighbours",
        cost=_INPUTS,
    ),
    Baseline(
        "bm25",
        "shared tokens, rare ones first",
        "bm25_similarity",
        "BM25",
        bm25,
        assumes="inputs are token ids, and words that are shared matter",
        when="the baseline for text: does influence find more than shared words?",
        cost=_INPUTS,
    ),
    Baseline(
        "loss",
        "training loss, alike for all queries",
        "training_loss",
        "loss",
        training_loss,
        assumes="what is fitted badly matters or is wrong",
        when="the baseline of an audit: does self-influence find more wrong labels?",
        cost=_FORWARD,
    ),
    Baseline(
        "gradient_norm",
        "length of training gradients, alike for all queries",
        "training_gradient_norm",
        "loss per parameter",
        gradient_norm,
        assumes="what pulls hard at the parameters matters",
        when="beside loss, for audits and for pruning",
        cost=_GRADIENTS,
    ),
    Baseline(
        "margin",
        "minus the training margin, alike for all queries",
        "minus_training_margin",
        "logits",
        negative_margin,
        assumes="a classifier; what is near its border matters or is wrong",
        when="beside loss, for audits",
        cost=_FORWARD,
    ),
    Baseline(
        "random",
        "random numbers, seeded",
        "random_number",
        "0 to 1",
        random,
        assumes="nothing",
        when="the level of chance in any comparison",
        cost="none",
    ),
)
