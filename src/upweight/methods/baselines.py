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

ROWS = (
    Baseline("cosine", "cosine of gradients", "gradient_similarity", "cosine", cosine),
    Baseline(
        "embedding",
        "cosine of the last layer's inputs",
        "embedding_similarity",
        "cosine",
        embedding,
    ),
    Baseline(
        "euclidean",
        "minus the distance between inputs",
        "euclidean_similarity",
        "minus input distance",
        negative_distance,
    ),
    Baseline("bm25", "shared tokens, rare ones first", "bm25_similarity", "BM25", bm25),
    Baseline(
        "loss", "training loss, alike for all queries", "training_loss", "loss", training_loss
    ),
    Baseline(
        "gradient_norm",
        "length of training gradients, alike for all queries",
        "training_gradient_norm",
        "loss per parameter",
        gradient_norm,
    ),
    Baseline(
        "margin",
        "minus the training margin, alike for all queries",
        "minus_training_margin",
        "logits",
        negative_margin,
    ),
    Baseline("random", "random numbers, seeded", "random_number", "0 to 1", random),
)
