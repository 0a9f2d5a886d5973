"""Other averages of other terms: what a training loss may be where it is not the objective.

A loss over a batch is a reduction of terms. Every hypothesis here is a pair of the two, in words
and as a function, so that "shifted labels, summed" needs no line of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.data import Batch
from upweight.losses import BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError
from upweight.sources import leaves

__all__ = ["Case", "Hypothesis", "Terms", "other_terms", "plain_terms"]

MOST_LABELS = 64


@final
@dataclass(frozen=True)
class Case:
    """One batch, with both losses.

    Attributes:
        loss: per-example loss of the objective.
        batch: the rows.
        outputs: of the model, differentiable.
        losses: of the examples ``[n]``, differentiable.
        weights: w_i ``[n]``, of examples in the mean.
        sample: part ``[n]`` of w_i that was stated for the examples themselves.
        theirs: the training loss.
        slope: its gradient ``[p]``.
    """

    loss: Loss
    batch: Batch
    outputs: Any
    losses: Tensor
    weights: Tensor
    sample: Tensor
    theirs: float
    slope: Tensor

    def ours(self) -> Tensor:
        """Σ w_i ℓ_i / Σ w_i, differentiable."""
        return (self.losses * self.weights).sum() / self.weights.sum()


@final
@dataclass(frozen=True)
class Hypothesis:
    """What a training loss may be.

    Attributes:
        words: what it then is, and what to do.
        value: the loss of a batch, differentiable.
        loose: factor on the tolerance, for numbers that were themselves solved for.
    """

    words: str
    value: Callable[[Case], Tensor]
    loose: float = 1.0


@final
@dataclass(frozen=True)
class Terms:
    """Losses of all positions of a batch before any average.

    Attributes:
        each: loss ``[n, *s]`` of every position.
        known: 1 where it has one, ``[n, *s]``.
        counted: 1 where it counts, ``[n, *s]``.
        classes: class weight ``[n, *s]``.
        sample: weight of its example ``[n, *1]``.
        labels: target ``[n, *s]``, where that is a label.
    """

    each: Tensor
    known: Tensor
    counted: Tensor
    classes: Tensor
    sample: Tensor
    labels: Tensor | None = None


Variant = Callable[[Case], Terms | None]
Reduction = Callable[[Terms], Tensor]


def _sample(case: Case, like: Tensor) -> Tensor:
    return case.sample.to(like).view(-1, *[1] * (like.dim() - 1))


def _plain(each: Tensor, sample: Tensor) -> Terms:
    ones = torch.ones_like(each).detach()
    return Terms(each, ones, ones, ones, sample)


def _labelled(case: Case, log_p: Tensor, labels: Tensor) -> Terms | None:
    """Terms of a softmax cross-entropy with labels ``[n, *s]``."""
    loss = case.loss
    if not isinstance(loss, CrossEntropy):
        return None
    valid = (labels >= 0) & (labels < log_p.shape[-1])
    safe = torch.where(valid, labels, 0)
    nll = -log_p.gather(-1, safe[..., None])[..., 0]
    if loss.label_smoothing:
        nll = (1 - loss.label_smoothing) * nll - loss.label_smoothing * log_p.mean(-1)
    known = valid.to(nll.dtype)
    counted = known * (labels != loss.ignore_index)
    classes = torch.ones_like(known) if loss.weight is None else loss.weight.to(nll)[safe]
    return Terms(nll * known, known, counted, classes, _sample(case, nll), labels)


def _labels(case: Case) -> tuple[Tensor, Tensor] | None:
    """Logits ``[n, *s, c]`` and labels ``[n, *s]``, where the loss compares these."""
    loss, y = case.loss, case.batch.targets
    if not isinstance(loss, CrossEntropy) or y.is_floating_point():
        return None
    return loss._class_last(case.outputs, y), y


def _shift(case: Case, z: Tensor, y: Tensor) -> Terms | None:
    if y.dim() != 2 or y.shape[1] < 2:
        return None
    return _labelled(case, F.log_softmax(z[:, :-1], -1), y[:, 1:])


def _input_tokens(case: Case) -> Tensor | None:
    """The integer input that has the labels' shape: a language model's tokens."""
    y = case.batch.targets
    for leaf in leaves(case.batch.inputs):
        alike = leaf.shape == y.shape and y.dim() == 2 and not leaf.is_floating_point()
        # A mask of ones and zeros is no text.
        if alike and int(leaf.max()) > 1:
            return leaf.long()
    return None


def _cross_entropies() -> Iterator[tuple[str, Callable[[Case, Tensor, Tensor], Terms | None]]]:
    yield "", lambda case, z, y: _labelled(case, F.log_softmax(z, -1), y)
    yield (
        "compares each output with the next label (labels shifted inside the model, as in Hugging "
        "Face causal language models), where the objective compares it with the label at its own "
        "place. Shift the labels of the data once: y[:, :-1] = y[:, 1:], and ignore the last; if "
        "they already are, the training shifted them twice",
        _shift,
    )
    yield (
        "compares each output with the token at its own place, where the labels of the data are "
        "another place's. It learned to repeat its input: train with shifted labels",
        lambda case, z, y: (
            None
            if (tokens := _input_tokens(case)) is None
            else _labelled(case, F.log_softmax(z, -1), tokens)
        ),
    )
    yield (
        "compares each output with the next input token, whatever the labels of the data are. Give "
        "the data the labels it trained with (tokens shifted by one, the last ignored)",
        lambda case, z, y: (
            None if (tokens := _input_tokens(case)) is None else _shift(case, z, tokens)
        ),
    )
    yield (
        "is a cross-entropy of outputs that went through softmax already (softmax twice). It "
        "trained another objective than a likelihood: explain it with the same loss per example, "
        "loss=lambda z, y: F.cross_entropy(z.softmax(-1), y, reduction='none'), or retrain",
        lambda case, z, y: _labelled(case, F.log_softmax(z.softmax(-1), -1), y),
    )
    yield (
        "takes the logarithm of the outputs, which are probabilities, and the objective put a "
        "softmax on top of them. Explain the model without its last softmax, or pass a callable "
        "loss returning [n]",
        lambda case, z, y: _labelled(case, z.log(), y) if bool((z > 0).all()) else None,
    )
    yield (
        "is minus the output at the label (NLLLoss of outputs that are no log-probabilities). Put "
        "log_softmax before NLLLoss and retrain",
        _labelled,
    )


def _over_labels(function: Callable[[Case, Tensor, Tensor], Terms | None]) -> Variant:
    def variant(case: Case) -> Terms | None:
        pair = _labels(case)
        return None if pair is None else function(case, *pair)

    return variant


def _pair(case: Case, kind: type[Loss]) -> tuple[Tensor, Tensor] | None:
    """Outputs and targets of an elementwise loss, in one shape."""
    if type(case.loss) is not kind:
        return None
    return case.outputs, case.batch.targets.reshape(case.outputs.shape).to(case.outputs.dtype)


def _squared(function: Callable[[Tensor, Tensor], Tensor]) -> Variant:
    def variant(case: Case) -> Terms | None:
        pair = _pair(case, MeanSquaredError)
        return None if pair is None else _plain(each := function(*pair), _sample(case, each))

    return variant


def _crossed(case: Case) -> Terms | None:
    """Every output against every target: [n, 1] - [n]."""
    pair = _pair(case, MeanSquaredError)
    if pair is None or pair[0].numel() != len(case.losses):
        return None
    each = (pair[0].reshape(-1, 1) - pair[1].reshape(1, -1)) ** 2
    return _plain(each, torch.ones_like(each[:, :1]).detach())


def _binary(squash: Callable[[Tensor], Tensor]) -> Variant:
    """Binary cross-entropy of logits made of the outputs."""

    def variant(case: Case) -> Terms | None:
        pair = _pair(case, BinaryCrossEntropy)
        if pair is None or not isinstance(case.loss, BinaryCrossEntropy):
            return None
        z, y = squash(pair[0]), pair[1]
        each = case.loss._positive(y) * F.softplus(-z) + (1 - y) * F.softplus(z)
        return _plain(each, _sample(case, each))

    return variant


def _examples(case: Case) -> Terms | None:
    """The examples' own losses, for a loss that cannot be looked into."""
    terms = _plain(case.losses, case.sample.to(case.losses))
    return None if _labels(case) else terms


VARIANTS: list[tuple[str, Variant]] = [
    *((words, _over_labels(function)) for words, function in _cross_entropies()),
    ("", _squared(lambda z, y: (z - y) ** 2)),
    (
        "has the factor ½ of a squared error, which the objective has not. Its L2 counts twice as "
        "much: state l2=2·λ, or pass loss=lambda z, y: the halved squares, [n]",
        _squared(lambda z, y: (z - y) ** 2 / 2),
    ),
    (
        "is a mean of |z − y|. Pass loss=nn.L1Loss()",
        _squared(lambda z, y: (z - y).abs()),
    ),
    (
        "compares every output with every target of the batch: outputs [n, 1] and targets [n] "
        "broadcast to [n, n]. It learned the mean of the targets: reshape them and retrain",
        _crossed,
    ),
    ("", _binary(lambda z: z)),
    (
        "is a binary cross-entropy of outputs that went through a sigmoid already (sigmoid twice). "
        "Remove one and retrain, or pass a callable loss returning [n]",
        _binary(torch.sigmoid),
    ),
    (
        "takes the outputs as probabilities (BCELoss), and the objective as logits. Explain the "
        "model without its last sigmoid, or pass a callable loss returning [n]",
        _binary(torch.logit),
    ),
    ("", _examples),
]


def _mean(terms: Terms, weight: Tensor) -> Tensor:
    # A weight of one number per example spreads over its positions.
    weight = weight.expand_as(terms.each)
    return (terms.each * weight).sum() / weight.sum()


def _weighed(terms: Terms) -> Tensor:
    return (terms.each * terms.counted * terms.classes * terms.sample).sum()


def _by_example(terms: Terms) -> Tensor:
    weight = (terms.counted * terms.classes).reshape(len(terms.each), -1)
    each = (terms.each.reshape(len(terms.each), -1) * weight).sum(1)
    return (each / torch.where(weight.sum(1) > 0, weight.sum(1), 1.0)).mean()


SUMMED = (
    "is the sum over the batch, and the objective is the mean. Divide the weight decay by the rows "
    "(or tokens) of a training batch: l2 = λ/rows"
)

REDUCTIONS: list[tuple[str, Reduction]] = [
    ("", lambda t: _mean(t, t.counted * t.classes * t.sample)),
    (SUMMED, _weighed),
    (
        "has no class weights, and the objective has. Leave them out of the loss",
        lambda t: _mean(t, t.counted * t.sample),
    ),
    (
        "does not use the weights of the examples. Leave weights= out of the data",
        lambda t: _mean(t, t.counted * t.classes),
    ),
    (
        "has neither the class weights nor the weights of the examples. Leave both out",
        lambda t: _mean(t, t.counted),
    ),
    (
        "multiplies by the weights and divides by the number of rows, not by the sum of the "
        "weights. Its scale follows the weights: multiply l2 by N / Σ w, or divide by Σ w",
        lambda t: _weighed(t) / t.counted.sum(),
    ),
    (
        "averages over the tokens of each sequence and then over sequences, and the objective over "
        "all tokens alike. Pass Data.of(..., weights=1/tokens of the example)",
        _by_example,
    ),
    (
        "divides by all positions, the ignored ones included. Divide by those that count, or "
        "multiply l2 by positions/counted",
        lambda t: _weighed(t) / t.each.numel(),
    ),
    (
        "sums over the positions (or outputs) of an example and averages over examples. Pass a "
        "callable loss that sums them, returning [n]",
        lambda t: _weighed(t) / len(t.each),
    ),
    (
        "counts labels that the objective ignores. State the same ignore_index in both",
        lambda t: _mean(t, t.known * t.classes * t.sample),
    ),
]


def _without(label: int) -> Reduction:
    def reduction(terms: Terms) -> Tensor:
        if terms.labels is None:
            return torch.full((), torch.nan)
        return _mean(terms, terms.known * (terms.labels != label) * terms.classes * terms.sample)

    return reduction


def _ignoring(cases: list[Case]) -> Iterator[tuple[str, Reduction]]:
    pairs = [_labels(case) for case in cases]
    labels = [pair[1].flatten() for pair in pairs if pair is not None]
    if labels:
        for label in torch.cat(labels).unique()[:MOST_LABELS].tolist():
            words = f"ignores the label {label}. State ignore_index={label} in the objective's loss"
            yield words, _without(label)


def plain_terms(case: Case) -> Terms:
    """The terms of the objective itself."""
    found = (variant(case) for words, variant in VARIANTS if not words)
    return next(terms for terms in found if terms is not None)


def _over(variant: Variant, reduction: Reduction) -> Callable[[Case], Tensor]:
    def value(case: Case) -> Tensor:
        terms = variant(case)
        return torch.full((), torch.nan) if terms is None else reduction(terms)

    return value


def other_terms(cases: list[Case]) -> Iterator[Hypothesis]:
    """Every other reduction of every other kind of terms, the simplest first."""
    reductions = [*REDUCTIONS, *_ignoring(cases)]
    for kind, variant in VARIANTS:
        if all(variant(case) is None for case in cases):
            continue
        for how, reduction in reductions:
            if words := ". It also ".join(part for part in (kind, how) if part):
                yield Hypothesis(f"{words}.", _over(variant, reduction))
