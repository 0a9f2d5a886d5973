"""Lookups: rows of a table, one per token."""

import torch.nn.functional as F
from torch import Tensor

from upweight.gradients.watch import Given, Use, Watch, rule
from upweight.linalg import Outer

__all__ = ["embedding"]


TAKES = {
    "input": None,
    "weight": None,
    "padding_idx": None,
    "max_norm": None,
    "norm_type": 2.0,
    "scale_grad_by_freq": False,
    "sparse": False,
}


@rule(F.embedding, takes=TAKES)
def embedding(watch: Watch, given: Given) -> Tensor:
    """Σ_s e(token_s) ⊗ g_s; the row of padding has no gradient."""
    out: Tensor = given.run()
    name, (rows, width) = watch.name(given.weight), given.weight.shape
    # Renormalised or rescaled gradients are not those of a lookup: left to the general path.
    if name is None or given.max_norm is not None or given.scale_grad_by_freq:
        return out
    count = watch.count
    tokens = watch.rows(given.input, 0) if watch.axes is not None else None
    padding = given.padding_idx

    def factors(slope: Tensor) -> Outer:
        assert tokens is not None
        right = slope.reshape(1, count, -1, width)
        if padding is not None:
            right = right * (tokens != padding % rows)[None, :, :, None]
        return Outer(tokens, right)

    return watch.keep(out, (Use(name, (1, rows, width), factors),))
