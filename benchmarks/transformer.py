"""The task "transformer": next characters of Shakespeare, 100 queries x 2,000 sequences."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.datasets import shakespeare
from benchmarks.networks import Recipe
from benchmarks.reference import Plan

TITLE = "Character transformer, scores of 100 query sequences against 2,000 training sequences"
ABOUT = {
    "objective": "mean cross-entropy of the 2,000 x 128 next characters + 0.00005 ||theta||^2",
    "network": "2 pre-norm blocks, width 128, 4 heads, 512 hidden units, GELU, context 128, head "
    "of its own; Adam 0.001, batches of 32, 10 epochs",
    "examples": 2_000,
    "parameters": 429_824,
    "queries": 100,
    "damping": "0.01 with the L2, as Koh & Liang (2017, 4.2) for a network not at a minimum",
    "score": "(1/n) grad loss(q) . (G + 0.01 I)^-1 . grad loss(i), G the Gauss-Newton matrix, "
    "losses the mean over 128 positions",
}
LETTERS, CONTEXT, WIDTH, HEADS = 65, 128, 128, 4


class Layer(nn.Module):
    """Causal attention, then two dense layers, each behind a norm and around it a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, s, d]`` to the same."""
        b, s, d = x.shape
        parts = self.qkv(self.norm1(x)).view(b, s, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, s, d))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class Transformer(nn.Module):
    """Scores of the next character at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(LETTERS, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, LETTERS, bias=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Characters ``[b, s]`` to ``[b, s, 65]``."""
        places = self.places(torch.arange(codes.shape[1], device=codes.device))
        outputs: Tensor = self.head(self.norm(self.layers(self.letters(codes) + places)))
        return outputs


RECIPE = Recipe(
    data=partial(shakespeare, 2_000, CONTEXT),
    build=Transformer,
    optimiser=partial(torch.optim.Adam, lr=1e-3),
    l2=1e-4,
    damping=1e-2,
    epochs=10,
    batch=32,
    queries=4,
    exact=Plan(dtype=torch.float32, batch=50, together=4),
)
prepare, load = RECIPE.prepare, RECIPE.load
truth, convergence = RECIPE.truth, RECIPE.convergence
