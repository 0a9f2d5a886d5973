"""The problems every law is tested on: one line each. A new layer or loss joins here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import upweight as uw
from upweight import reference
from upweight.data import Data
from upweight.objective import Objective
from upweight.risk import Risk

N = 7


class Tied(nn.Module):
    """Embedding, attention, LayerNorm and an output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 5)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        h = self.norm(h + self.attend(h, h, h, need_weights=False)[0])
        return self.out(h)


class Named(nn.Module):
    """Keyword inputs, an output object with logits, one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, first: Tensor, second: Tensor) -> Any:
        h = torch.tanh(self.inner(first)) * torch.tanh(self.inner(second))
        return type("Output", (), {"logits": self.head(h)})()


class Scaled(nn.Module):
    """Scaled dot-product attention as language models call it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(3, 6)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(2, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(attended.mean(1))


class Last(nn.Module):
    """A GRU's last state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(2, 2, batch_first=True)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


@dataclass(frozen=True)
class Case:
    """A model, its data and its objective."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    loss: object
    fisher: bool = True
    weights: Tensor | None = None

    def risk(self, **settings: Any) -> Risk:
        torch.manual_seed(0)
        model = self.model().double().eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.4)
        torch.manual_seed(1)
        data = Data.of(self.data(), weights=self.weights)
        return Risk(Objective(model, self.loss, **{"l2": 0.03, **settings}), data)


def labels(c: int, *shape: int) -> Tensor:
    return torch.randint(c, (N, *shape))


def rows(*shape: int) -> Tensor:
    return torch.randn(N, *shape, dtype=torch.float64)


class Tokens(nn.Module):
    """Lookups, a norm, a convolution over positions and a head: every kind of factor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Conv1d(4, 3, 2, bias=False)
        self.head = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.mix(self.norm(self.embed(tokens)).mT).mean(2)
        return self.head(torch.tanh(mixed))


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def small_rows(n: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator).double()
    return x, torch.randint(2, (n,), generator=generator)


def pixels() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 2, stride=2), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )


WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0], dtype=torch.float64)
CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)

LINEAR_CASES = [
    Case("softmax", lambda: nn.Linear(4, 3), lambda: (rows(4), labels(3)), "cross_entropy"),
    Case(
        "softmax no bias",
        lambda: nn.Linear(4, 3, bias=False),
        lambda: (rows(4), labels(3)),
        nn.functional.cross_entropy,
    ),
    Case(
        "softmax smoothed",
        lambda: nn.Linear(4, 3),
        lambda: (rows(4), labels(3)),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        fisher=False,
    ),
    Case(
        "softmax class weights",
        lambda: nn.Linear(4, 3),
        lambda: (rows(4), labels(3)),
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
    ),
    Case(
        "softmax weighted",
        lambda: nn.Linear(4, 3),
        lambda: (rows(4), labels(3)),
        "cross_entropy",
        weights=WEIGHTS,
    ),
    Case(
        "softmax ignored",
        lambda: nn.Linear(4, 3),
        lambda: (rows(4), torch.tensor([0, -100, 2, 1, -100, 0, 1])),
        "cross_entropy",
    ),
    Case(
        "softmax soft labels",
        lambda: nn.Linear(4, 3),
        lambda: (rows(4), torch.softmax(rows(3), 1)),
        "cross_entropy",
        fisher=False,
    ),
    Case(
        "softmax of images",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)),
        lambda: (rows(2, 2), labels(3)),
        "cross_entropy",
    ),
    Case("logistic", lambda: nn.Linear(4, 1), lambda: (rows(4), labels(2)), "binary_cross_entropy"),
    Case(
        "logistic pos_weight",
        lambda: nn.Linear(4, 2),
        lambda: (rows(4), labels(2, 2)),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 0.5])),
        fisher=False,
    ),
    Case(
        "ridge",
        lambda: nn.Linear(4, 1, bias=False),
        lambda: (rows(4), rows()),
        nn.functional.mse_loss,
    ),
    Case("ridge of two", lambda: nn.Linear(4, 2), lambda: (rows(4), rows(2)), nn.MSELoss()),
    Case(
        "smooth hinge",
        lambda: nn.Linear(4, 1),
        lambda: (rows(4), 2 * labels(2) - 1),
        uw.SmoothHinge(0.5),
        fisher=False,
    ),
]

NETWORK_CASES = [
    Case(
        "mlp",
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)),
        lambda: (rows(4), labels(3)),
        "cross_entropy",
    ),
    Case(
        "mlp with sigmoid",
        lambda: nn.Sequential(nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 1)),
        lambda: (rows(4), labels(2)),
        "binary_cross_entropy",
    ),
    Case(
        "regression net",
        lambda: nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)),
        lambda: (rows(4), rows(2)),
        "mean_squared_error",
    ),
    Case("convolution", pixels, lambda: (rows(1, 4, 4), labels(3)), "cross_entropy"),
    Case(
        "batch norm in eval mode",
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
        lambda: (rows(4), labels(3)),
        "cross_entropy",
    ),
    Case("tied transformer", Tied, lambda: (labels(5, 3), labels(5, 3)), "cross_entropy"),
    Case(
        "padded transformer",
        Tied,
        lambda: (labels(5, 3), labels(5, 3).masked_fill(torch.rand(N, 3) < 0.3, -100)),
        nn.CrossEntropyLoss(),
    ),
    Case("dot product attention", Scaled, lambda: (rows(4, 3), labels(2)), "cross_entropy"),
    Case(
        "encoder layer",
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 3, batch_first=True, dropout=0.1),
            nn.Flatten(),
            nn.Linear(8, 2),
        ),
        lambda: (rows(2, 4), labels(2)),
        "cross_entropy",
    ),
    Case(
        "keyword inputs",
        Named,
        lambda: {"first": rows(3), "second": rows(3), "labels": labels(2)},
        "cross_entropy",
    ),
    Case(
        "own loss",
        lambda: nn.Sequential(nn.Linear(4, 2), nn.Softplus()),
        lambda: (rows(4), rows(2)),
        lambda outputs, targets: (outputs - targets).abs().pow(3).sum(1),
        fisher=False,
    ),
    Case("recurrent", Last, lambda: (rows(3, 2), labels(2)), "cross_entropy"),
]


CASES = LINEAR_CASES + NETWORK_CASES

# Beside them where the shape of a layer matters.
CONVOLUTIONS = [
    Case(
        "grouped convolution",
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2, bias=False), nn.Flatten()
        ),
        lambda: (rows(4, 3, 3), labels(3)),
        "cross_entropy",
    ),
    Case(
        "transposed convolution",
        lambda: nn.Sequential(
            nn.ConvTranspose1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)
        ),
        lambda: (rows(2, 2), rows(2)),
        "mean_squared_error",
    ),
]


def as_reference(risk: Risk) -> tuple[reference.Problem, Tensor]:
    """The same problem for the naive file, and its parameters."""
    objective = risk.objective
    batch, shares = risk.at(torch.arange(len(risk.data)))

    def loss(theta: Tensor, i: int) -> Tensor:
        params = objective.space.unflatten(theta)
        return objective.losses(params, batch.part(slice(i, i + 1)))[0]

    inside = objective.removal == "mean"
    return reference.Problem(loss, shares, objective.l2, inside), objective.space.row()
