"""Gradients of every watched operation against a plain loop of autograd, layer by layer."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import upweight as uw
from upweight.data import Batch
from upweight.gradients.capture import layout_of, observe
from upweight.gradients.rules.convolution import patches
from upweight.objective import Objective

TOLERANCE = 1e-9
SEEDS = st.integers(0, 2**16)
COUNTS = st.integers(1, 6)


def few(examples: int):
    return settings(max_examples=examples, deadline=None, derandomize=True)


def wave(outputs: Tensor, targets: Any = None) -> Tensor:
    """A loss of any output, with a different slope everywhere."""
    flat = outputs.flatten(1)
    return (flat.pow(2) + torch.sin(flat)).sum(1)


def filled(model: nn.Module) -> nn.Module:
    model = model.double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def batch_of(*inputs: Tensor) -> Batch:
    n = len(inputs[0])
    return Batch(inputs, torch.zeros(n, dtype=torch.float64), torch.arange(n))


def looped(objective: Objective, batch: Batch) -> Tensor:
    """Gradients ``[n, p]``, one example and one backward pass at a time."""
    chosen = list(objective.space.parameters().values())
    rows = []
    for i in range(len(batch)):
        one = batch.part(slice(i, i + 1))
        with torch.enable_grad():
            loss = objective.loss(objective.call(one), one.targets).sum()
        slopes = torch.autograd.grad(loss, chosen, allow_unused=True)
        parts = [
            torch.zeros_like(p) if s is None else s for p, s in zip(chosen, slopes, strict=True)
        ]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))


def agrees(
    model: nn.Module, batch: Batch, parameters: Any = None, *, loss: Any = wave
) -> frozenset[str]:
    """Compare everything with the loop; returns the parameters on the general path."""
    objective = Objective(model, loss, parameters=parameters)
    wanted = looped(objective, batch)
    assert float(wanted.norm()) > 0
    gradients = observe(objective, batch).gradients()
    assert gradients.size == wanted.shape[1]
    assert gap(gradients.dense(), wanted) < TOLERANCE
    rows = torch.randn(3, wanted.shape[1], dtype=wanted.dtype)
    assert gap(gradients.dot(rows), rows @ wanted.T) < TOLERANCE
    weights = torch.randn(2, len(batch), dtype=wanted.dtype)
    assert gap(gradients.combine(weights), weights @ wanted) < TOLERANCE
    return layout_of(objective, batch).general


def ruled(model: nn.Module, batch: Batch, parameters: Any = None) -> None:
    """The values agree and a rule, not the general path, gave all of them."""
    assert agrees(model, batch, parameters) == frozenset()


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def tokens(*shape: int, size: int = 5) -> Tensor:
    return torch.randint(size, shape)


# Linear maps


@few(25)
@given(COUNTS, st.lists(st.integers(1, 3), max_size=2), st.integers(1, 4), st.booleans(), SEEDS)
def test_linear(n, between, width, bias, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 3, bias=bias), nn.Tanh(), nn.Linear(3, 2))
    ruled(filled(model), batch_of(rows(n, *between, width)))


@pytest.mark.parametrize("chosen", [["weight"], ["bias"], ["weight", "bias"]])
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3), (4, 2, 2, 3)])
def test_chosen_parts_of_a_linear_map(chosen, shape):
    ruled(filled(nn.Linear(3, 2)), batch_of(rows(*shape)), chosen)


# Convolutions


@st.composite
def convolutions(draw, transposed: bool):
    space = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    several = st.one_of(st.integers(1, 2), st.tuples(*[st.integers(1, 2)] * space))
    wide = st.one_of(st.integers(0, 2), st.tuples(*[st.integers(0, 2)] * space))
    asked: dict[str, Any] = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": draw(st.tuples(*[st.integers(1, 3)] * space)),
        "stride": draw(several),
        "padding": draw(wide),
        "dilation": draw(several),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        strides, dilations = (
            (v,) * space if isinstance(v, int) else v for v in (asked["stride"], asked["dilation"])
        )
        room = [max(s, d) - 1 for s, d in zip(strides, dilations, strict=True)]
        asked["output_padding"] = tuple(draw(st.integers(0, r)) for r in room)
    else:
        mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "same", "valid"]))
        if mode in ("same", "valid"):
            asked["padding"] = mode
            asked["stride"] = 1 if mode == "same" else asked["stride"]
        else:
            asked["padding_mode"] = mode
    size = tuple(draw(st.integers(3, 6)) for _ in range(space))
    return space, asked, size


def convolved(kind: str, drawn: Any, n: int, seed: int) -> None:
    space, asked, size = drawn
    torch.manual_seed(seed)
    model = filled(getattr(nn, f"{kind}{space}d")(**asked))
    x = rows(n, asked["in_channels"], *size)
    try:
        model(x)
    except RuntimeError:
        assume(False)
    ruled(model, batch_of(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@few(60)
@given(convolutions(transposed=False), COUNTS, SEEDS)
def test_convolution(drawn, n, seed):
    convolved("Conv", drawn, n, seed)


@few(50)
@given(convolutions(transposed=True), COUNTS, SEEDS)
def test_transposed_convolution(drawn, n, seed):
    convolved("ConvTranspose", drawn, n, seed)


@pytest.mark.parametrize("chosen", [["weight"], ["bias"]])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_chosen_parts_of_a_convolution(kind, chosen):
    ruled(filled(kind(2, 4, 3, padding=1, groups=2)), batch_of(rows(4, 2, 5, 4)), chosen)


def test_a_depthwise_separable_network():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding="same", groups=3), nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    ruled(filled(model), batch_of(rows(5, 3, 7, 5)))


# Everything with one shape of input


class Through(nn.Module):
    """A function of modules and parameters."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def tied(bias: bool) -> nn.Module:
    model = Through(
        lambda m, t: m.out(torch.tanh(m.inner(m.embed(t)))),
        embed=nn.Embedding(5, 3), inner=nn.Linear(3, 3), out=nn.Linear(3, 5, bias=bias),
    )  # fmt: skip
    model.out.weight = model.embed.weight
    return model


def positions(place: Callable[[int], Tensor]) -> nn.Module:
    return Through(
        lambda m, t: m.out(torch.tanh(m.embed(t) + m.place(place(t.shape[1])))),
        embed=nn.Embedding(5, 3), place=nn.Embedding(6, 3), out=nn.Linear(3, 2),
    )  # fmt: skip


def attending(function: Callable[..., Tensor], **settings: Any) -> nn.Module:
    return Through(function, attend=nn.MultiheadAttention(4, 2, **settings), head=nn.Linear(4, 2))


def itself(m: Any, x: Tensor, **settings: Any) -> Tensor:
    return m.head(m.attend(x, x, x, **settings)[0])


def causal(s: int) -> Tensor:
    return torch.triu(torch.ones(s, s, dtype=torch.bool), 1)


def tail(x: Tensor) -> Tensor:
    """A padding mask: the last token, where its first number is positive."""
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[:, -1] = x[:, -1, 0] > 0
    return mask


def conv1d(m: Any, x: Tensor) -> Tensor:
    """Conv1D of Hugging Face."""
    out = torch.addmm(m.bias, x.view(-1, x.shape[-1]), m.weight)
    return torch.tanh(out.view(*x.shape[:-1], -1))


def lora(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.base(x) + x @ m.a.T @ m.b.T * 2.0))


def lora_of_modules(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.base(x) + m.b(m.a(x)) * 0.5))


def windows(m: Any, x: Tensor) -> Tensor:
    """Attention-like products within windows of two, as in a Swin transformer."""
    n, s, d = x.shape
    parts = x.view(n * s // 2, 2, d)
    parts = m.norm(parts)
    q, k = m.qk(parts).chunk(2, dim=-1)
    parts = torch.softmax(q @ k.mT + m.table, dim=-1) @ parts
    return m.head(parts.reshape(n, s, d))


def classed(m: Any, x: Tensor) -> Tensor:
    h = torch.cat([m.token.expand(len(x), -1, -1), x], dim=1) + m.place
    return m.head(torch.tanh(h))


def checkpointed(m: Any, x: Tensor) -> Tensor:
    h = checkpoint(m.first, x, use_reentrant=False)
    return m.head(checkpoint(m.second, h, use_reentrant=False))


def decoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerDecoderLayer(4, 2, 5, dropout=0.1, batch_first=batch_first)

    def forward(m: Any, x: Tensor, memory: Tensor) -> Tensor:
        if batch_first:
            return m.head(m.layer(x, memory, tgt_mask=causal(x.shape[1])))
        return m.head(m.layer(x.transpose(0, 1), memory.transpose(0, 1)).transpose(0, 1))

    return Through(forward, layer=layer, head=nn.Linear(4, 2))


def encoder(**settings: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True, **settings)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(4, 2)
    )


def recurrent(kind: str, **settings: Any) -> nn.Module:
    cell = getattr(nn, kind)(3, 2, **settings)
    first = settings.get("batch_first", False)

    def forward(m: Any, x: Tensor) -> Tensor:
        out = m.cell(x if first else x.transpose(0, 1))[0]
        return m.head(out if first else out.transpose(0, 1))

    width = 2 * (1 + settings.get("bidirectional", False))
    return Through(forward, cell=cell, head=nn.Linear(width, 2))


def last_state(m: Any, x: Tensor) -> Tensor:
    return m.head(m.cell(x)[1][0][-1])


def block(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), activation, nn.Linear(3, 3))


Made = Callable[[], nn.Module]
Fed = Callable[[int], tuple[Tensor, ...]]


def normal(*shape: int) -> Fed:
    return lambda n: (rows(n, *shape),)


def words(*shape: int) -> Fed:
    return lambda n: (tokens(n, *shape),)


PLAIN: dict[str, tuple[Made, Fed]] = {
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), words(4)),
    "embedding without positions": (lambda: nn.Embedding(5, 3), words()),
    "embedding with padding": (lambda: nn.Embedding(5, 3, padding_idx=1), words(6)),
    "embedding with padding from the end": (lambda: nn.Embedding(5, 3, padding_idx=-1), words(6)),
    "tied": (lambda: tied(bias=False), words(4)),
    "tied with bias": (lambda: tied(bias=True), words(4)),
    "positions [s]": (lambda: positions(torch.arange), words(4)),
    "positions [1, s]": (lambda: positions(lambda s: torch.arange(s)[None]), words(4)),
    "position parameter": (
        lambda: Through(lambda m, x: m.head(torch.tanh(x + m.place)), place=rows(1, 4, 3),
                        head=nn.Linear(3, 2)),
        normal(4, 3),
    ),
    "position parameter without a batch axis": (
        lambda: Through(lambda m, x: m.head(torch.tanh(m.place + x)), place=rows(4, 3),
                        head=nn.Linear(3, 2)),
        normal(4, 3),
    ),
    "class token": (
        lambda: Through(classed, token=rows(1, 1, 3), place=rows(1, 5, 3), head=nn.Linear(3, 2)),
        normal(4, 3),
    ),
    "layer norm": (lambda: nn.LayerNorm(3), normal(4, 3)),
    "layer norm of rows": (lambda: nn.LayerNorm(3), normal(3)),
    "layer norm over several axes": (lambda: nn.LayerNorm((2, 3)), normal(4, 2, 3)),
    "layer norm over all axes": (lambda: nn.LayerNorm((4, 3)), normal(4, 3)),
    "layer norm without bias": (lambda: nn.LayerNorm(3, bias=False), normal(4, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), normal(4, 3, 2)),
    "group norm of rows": (lambda: nn.GroupNorm(2, 4), normal(4)),
    "rms norm": (lambda: nn.RMSNorm(3), normal(4, 3)),
    "rms norm over several axes": (lambda: nn.RMSNorm((4, 3)), normal(2, 4, 3)),
    "batch norm": (lambda: nn.BatchNorm1d(3), normal(3)),
    "batch norm of sequences": (lambda: nn.BatchNorm1d(3), normal(3, 4)),
    "batch norm of pictures": (lambda: nn.BatchNorm2d(3), normal(3, 4, 2)),
    "batch norm of volumes": (lambda: nn.BatchNorm3d(3), normal(3, 2, 2, 2)),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True), normal(3, 4)),
    "instance norm of pictures": (lambda: nn.InstanceNorm2d(3, affine=True), normal(3, 4, 2)),
    "instance norm with statistics": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), normal(3, 4, 2),
    ),
    "attention": (lambda: attending(itself, batch_first=True), normal(3, 4)),
    "attention with weights": (
        lambda: attending(lambda m, x: itself(m, x, need_weights=False), batch_first=True),
        normal(3, 4),
    ),
    "attention without bias": (lambda: attending(itself, batch_first=True, bias=False),
                                normal(3, 4)),
    "sequence first attention": (
        lambda: attending(lambda m, x: itself(m, x.transpose(0, 1)).transpose(0, 1)), normal(3, 4),
    ),
    "causal attention": (
        lambda: attending(
            lambda m, x: itself(m, x, attn_mask=causal(x.shape[1]), is_causal=True,
                                need_weights=False),
            batch_first=True),
        normal(3, 4),
    ),
    "padded attention": (
        lambda: attending(lambda m, x: itself(m, x, key_padding_mask=tail(x)), batch_first=True),
        normal(3, 4),
    ),
    "attention with a floating mask": (
        lambda: attending(lambda m, x: itself(m, x, attn_mask=0.3 * x.new_ones(3, 3).tril()),
                          batch_first=True),
        normal(3, 4),
    ),
    "cross attention": (
        lambda: attending(lambda m, x, y: m.head(m.attend(x, y, y)[0]), batch_first=True),
        lambda n: (rows(n, 2, 4), rows(n, 3, 4)),
    ),
    "sequence first cross attention": (
        lambda: attending(
            lambda m, x, y: m.head(m.attend(x.mT.mT.transpose(0, 1), y.transpose(0, 1),
                                            y.transpose(0, 1))[0]).transpose(0, 1)),
        lambda n: (rows(n, 2, 4), rows(n, 3, 4)),
    ),
    "encoder": (encoder, normal(3, 4)),
    "encoder, norm first": (lambda: encoder(norm_first=True), normal(3, 4)),
    "encoder without bias": (lambda: encoder(bias=False), normal(3, 4)),
    "decoder": (lambda: decoder(True), lambda n: (rows(n, 2, 4), rows(n, 3, 4))),
    "sequence first decoder": (lambda: decoder(False), lambda n: (rows(n, 2, 4), rows(n, 3, 4))),
    "lstm's last state": (
        lambda: Through(last_state, cell=nn.LSTM(3, 2, 2, batch_first=True), head=nn.Linear(2, 2)),
        normal(4, 3),
    ),
    "relu rnn": (lambda: recurrent("RNN", nonlinearity="relu", batch_first=True), normal(3, 3)),
    "prelu": (lambda: nn.Sequential(nn.Linear(3, 3), nn.PReLU()), normal(3)),
    "prelu by channel": (lambda: nn.PReLU(3), normal(3, 2, 2)),
    "prelu by feature": (lambda: nn.PReLU(3), normal(3)),
    "prelu of all": (nn.PReLU, normal(3, 2)),
    "addmm": (lambda: Through(conv1d, weight=rows(3, 2), bias=rows(2)), normal(4, 3)),
    "addmm of rows": (lambda: Through(conv1d, weight=rows(3, 2), bias=rows(2)), normal(3)),
    "product": (lambda: Through(lambda m, x: torch.tanh(x @ m.w), w=rows(3, 2)), normal(4, 3)),
    "product and sum": (
        lambda: Through(lambda m, x: torch.tanh(torch.matmul(x, m.w) + m.b), w=rows(3, 2),
                        b=rows(2)),
        normal(3),
    ),
    "layer scale": (
        lambda: Through(lambda m, x: x + m.inner(x) * m.gamma, inner=nn.Linear(3, 3),
                        gamma=rows(3)),
        normal(4, 3),
    ),
    "a scalar factor": (
        lambda: Through(lambda m, x: m.scale * m.inner(x) - m.shift, inner=nn.Linear(3, 3),
                        scale=rows(1), shift=rows(1)),
        normal(4, 3),
    ),
    "lora of modules": (
        lambda: Through(lora_of_modules, base=nn.Linear(3, 4).requires_grad_(False),
                        a=nn.Linear(3, 2, bias=False), b=nn.Linear(2, 4, bias=False),
                        head=nn.Linear(4, 2)),
        normal(4, 3),
    ),
    "lora": (
        lambda: Through(lora, base=nn.Linear(3, 4).requires_grad_(False), a=rows(2, 3),
                        b=rows(4, 2), head=nn.Linear(4, 2)),
        normal(4, 3),
    ),
    "a weight transposed twice": (
        lambda: Through(lambda m, x: torch.tanh(F.linear(x, m.w.t()) @ m.w.mT.transpose(0, 1)),
                        w=rows(3, 3)),
        normal(3),
    ),
    "sliced positions": (
        lambda: Through(lambda m, x: m.head(torch.tanh(x + m.place[:, : x.shape[1]])),
                        place=rows(1, 6, 3), head=nn.Linear(3, 2)),
        normal(4, 3),
    ),
    "sliced positions without a batch axis": (
        lambda: Through(lambda m, x: m.head(torch.tanh(x + m.place[: x.shape[1]].unsqueeze(0))),
                        place=rows(6, 3), head=nn.Linear(3, 2)),
        normal(4, 3),
    ),
    "a scale reshaped": (
        lambda: Through(lambda m, x: x * m.scale.view(1, -1, 1, 1) + m.shift[:, None, None],
                        scale=rows(3), shift=rows(3)),
        normal(3, 2, 2),
    ),
    "pictures folded with the batch": (
        lambda: Through(lambda m, x: m.norm(m.inner(x.flatten(0, 1)) * m.scale).view(*x.shape),
                        inner=nn.Conv2d(2, 2, 3, padding=1), norm=nn.BatchNorm2d(2),
                        scale=rows(2, 1, 1)),
        normal(3, 2, 4, 3),
    ),
    "in place in a checkpoint of attention": (
        lambda: Through(
            lambda m, t: m.head(checkpoint(m.second, m.embed(t), use_reentrant=False)),
            embed=nn.Embedding(5, 4), head=nn.Linear(4, 2),
            second=nn.TransformerEncoderLayer(4, 2, 5, batch_first=True,
                                              activation=nn.ReLU(inplace=True))),
        words(3),
    ),
    "a recurrent layer in a checkpoint": (
        lambda: Through(
            lambda m, x: m.head(checkpoint(m.cell, x, use_reentrant=False)[0]),
            cell=nn.GRU(3, 4, batch_first=True), head=nn.Linear(4, 2)),
        normal(3, 3),
    ),
    "called twice": (
        lambda: Through(lambda m, x, y: m.inner(x) * m.inner(y), inner=nn.Linear(3, 2)),
        lambda n: (rows(n, 3), rows(n, 3)),
    ),
    "called three times": (
        lambda: Through(lambda m, x: m.inner(torch.tanh(m.inner(torch.tanh(m.inner(x))))),
                        inner=nn.Linear(3, 3)),
        normal(3, 3),
    ),
    "called with other shapes": (
        lambda: Through(lambda m, x, y: m.inner(x).sum((1, 2)) * m.inner(y), inner=nn.Linear(3, 2)),
        lambda n: (rows(n, 2, 2, 3), rows(n, 3)),
    ),
    "convolution called twice": (
        lambda: Through(lambda m, x: m.inner(torch.tanh(m.inner(x))), inner=nn.Conv2d(2, 2, 2)),
        normal(2, 5, 4),
    ),
    "sequence first": (
        lambda: Through(
            lambda m, x: m.head(m.norm(torch.tanh(m.inner(x.transpose(0, 1)) + m.shift)) * m.scale)
            .transpose(0, 1),
            inner=nn.Linear(3, 4), norm=nn.LayerNorm(4), shift=rows(4), scale=rows(4),
            head=nn.Linear(4, 2)),
        normal(3, 3),
    ),
    "sequence first embedding": (
        lambda: Through(lambda m, t: m.head(torch.tanh(m.embed(t.T))).transpose(0, 1),
                        embed=nn.Embedding(5, 3), head=nn.Linear(3, 2)),
        words(4),
    ),
    "windows": (
        lambda: Through(windows, norm=nn.LayerNorm(4), qk=nn.Linear(4, 6), table=rows(2, 2),
                        head=nn.Linear(4, 2)),
        normal(6, 4),
    ),
    "in place": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4),
                              nn.LayerNorm(4), nn.SiLU(inplace=True), nn.Linear(4, 2)),
        normal(3),
    ),
    "checkpoints": (
        lambda: Through(checkpointed, first=block(nn.Tanh()), second=block(nn.ReLU(inplace=True)),
                        head=nn.Linear(3, 2)),
        normal(4, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_rules(name):
    make, feed = PLAIN[name]
    for n, seed in ((5, 0), (2, 1), (1, 2)):
        torch.manual_seed(seed)
        ruled(filled(make()), batch_of(*feed(n)))


@few(30)
@given(
    st.sampled_from(["LSTM", "GRU", "RNN"]), st.integers(1, 2),
    *[st.booleans()] * 3, COUNTS, st.integers(1, 4), SEEDS,
)  # fmt: skip
def test_recurrent(kind, layers, both, first, bias, n, length, seed):
    torch.manual_seed(seed)
    model = recurrent(kind, num_layers=layers, bidirectional=both, batch_first=first, bias=bias)
    ruled(filled(model), batch_of(rows(n, length, 3)))


@few(12)
@given(st.sampled_from(sorted(PLAIN)), COUNTS, SEEDS)
def test_rules_at_random(name, n, seed):
    torch.manual_seed(seed)
    make, feed = PLAIN[name]
    ruled(filled(make()), batch_of(*feed(n)))


# What has no rule


def routed(m: Any, x: Tensor) -> Tensor:
    """A mixture of two experts, each given the tokens that chose it."""
    flat = x.reshape(-1, 3)
    scores = torch.softmax(m.gate(flat), dim=-1)
    out = torch.zeros_like(flat)
    for k, expert in enumerate((m.first, m.second)):
        chosen = scores.argmax(dim=-1) == k
        out[chosen] = expert(flat[chosen]) * scores[chosen, k, None]
    return out.view(x.shape)


def weight_normed() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(2, 2))


def stacked(m: Any, x: Tensor) -> Tensor:
    """Halves of the batch as two blocks of rows, so that rows are not where they seem."""
    first, second = x[:, :2], x[:, 2:]
    out = m.inner(torch.cat([first, second], dim=0))
    return torch.cat(out.chunk(2), dim=1)


ODD: dict[str, tuple[Made, Fed, set[str]]] = {
    "einsum": (
        lambda: Through(lambda m, x: m.head(torch.einsum("nsi,oi->nso", x, m.w)), w=rows(4, 3),
                        head=nn.Linear(4, 2)),
        normal(4, 3), {"w"},
    ),
    "weight norm": (
        weight_normed, normal(3),
        {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
    ),
    "bilinear": (
        lambda: nn.Bilinear(3, 2, 2), lambda n: (rows(n, 3), rows(n, 2)), {"weight", "bias"},
    ),
    "experts": (
        lambda: Through(routed, gate=nn.Linear(3, 2), first=nn.Linear(3, 3),
                        second=nn.Linear(3, 3)),
        normal(4, 3), {"first.weight", "first.bias", "second.weight", "second.bias"},
    ),
    "rows in another order": (
        lambda: Through(stacked, inner=nn.Linear(3, 2)), normal(4, 3), {"weight", "bias"},
    ),
    "a tied autoencoder": (
        lambda: Through(lambda m, x: F.linear(torch.tanh(F.linear(x, m.w)), m.w.t()), w=rows(2, 3)),
        normal(3), {"w"},
    ),
    "a product of parameters": (
        lambda: Through(lambda m, x: m.head(x @ (m.a @ m.b)), a=rows(3, 2), b=rows(2, 3),
                        head=nn.Linear(3, 2)),
        normal(3), {"a", "b", "head.weight", "head.bias"},
    ),
    "an exponential": (
        lambda: Through(lambda m, x: m.head(x) * m.log.exp(), log=rows(1), head=nn.Linear(3, 2)),
        normal(3), {"log"},
    ),
}  # fmt: skip


TRILINEAR = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@TRILINEAR
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("n", [5, 2, 1])
def test_no_rule(name, n):
    make, feed, general = ODD[name]
    torch.manual_seed(n)
    found = agrees(filled(make()), batch_of(*feed(n)))
    if n > 1:
        assert all(any(f.endswith(g) for g in general) for f in found), found
        assert found


@TRILINEAR
@pytest.mark.parametrize("name", [*ODD, "windows", "addmm", "sliced positions"])
def test_a_layout_made_on_one_row_holds_for_more(name):
    """As when a single query comes first."""
    make, feed = (ODD[name] if name in ODD else PLAIN[name])[:2]
    objective = Objective(filled(make()), wave)
    observe(objective, batch_of(*feed(1)))
    batch = batch_of(*feed(5))
    assert gap(observe(objective, batch).gradients().dense(), looped(objective, batch)) < TOLERANCE


def test_renormalising_embeddings_are_never_silently_wrong():
    """max_norm changes the weights in the forward pass; the gradient is still the loop's."""
    model = filled(nn.Embedding(5, 3, max_norm=0.4))
    batch = batch_of(tokens(4, 3))
    try:
        found = agrees(model, batch)
    except (RuntimeError, uw.errors.UpweightError):
        return
    assert found == {"weight"}


def test_scaled_by_frequency():
    assert agrees(filled(nn.Embedding(5, 3, scale_grad_by_freq=True)), batch_of(tokens(4, 1))) in (
        {"weight"}, frozenset(),
    )  # fmt: skip


# The user's model and data are left alone


def test_inputs_that_require_gradients():
    x = rows(5, 3).requires_grad_()
    ruled(filled(block(nn.Tanh())), batch_of(x))
    assert x.grad is None
    assert x.requires_grad


def state(model: nn.Module) -> Any:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [len(getattr(m, hook)) for m in model.modules() for hook in hooks],
        [p._backward_hooks for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch._C._len_torch_function_stack(),
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def watched(raising: Callable[[], None] = lambda: None) -> tuple[nn.Module, Batch]:
    """A model of many layers, one parameter frozen, one with a gradient already."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(m.attend(x, x, x)[0])
        raising()
        return m.odd(m.head(h), h)

    model = Through(
        forward, attend=nn.MultiheadAttention(4, 2, batch_first=True), norm=nn.LayerNorm(4),
        head=nn.Linear(4, 2), odd=nn.Bilinear(2, 4, 2),
    )  # fmt: skip
    model = filled(model)
    model.norm.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.attend.train()
    return model, batch_of(rows(5, 3, 4))


@TRILINEAR
@pytest.mark.parametrize("name", ["einsum", "windows", "tied with bias", "classic", "bilinear"])
def test_pulled_slopes(name):
    """Of one backward pass from slopes in the outputs, with and without the general path."""
    make, feed = (ODD | {"classic": (lambda: block(nn.ReLU()), normal(2, 3), set())} | {
        key: (*value, set()) for key, value in PLAIN.items()})[name][:2]  # fmt: skip
    model, batch = filled(make()), batch_of(*feed(4))
    slope = torch.randn_like(model(*batch.inputs))
    objective = Objective(model, lambda outputs, targets: (outputs * targets).flatten(1).sum(1))
    found = observe(objective, Batch(batch.inputs, slope, batch.positions)).pulled(slope)
    wanted = looped(objective, Batch(batch.inputs, slope, batch.positions))
    assert gap(found.dense(), wanted) < TOLERANCE


@TRILINEAR
def test_nothing_is_changed():
    model, batch = watched()
    before = state(model)
    objective = Objective(model, wave)
    seen = observe(objective, batch)
    assert same(state(model), before)
    seen.gradients(keep=True)
    seen.pulled(torch.ones(5, 3, 2, dtype=torch.float64), keep=True)
    seen.gradients()
    assert same(state(model), before)
    assert layout_of(objective, batch).general == {"odd.weight", "odd.bias"}


@TRILINEAR
@pytest.mark.parametrize("time", range(8))
@pytest.mark.parametrize("where", ["forward", "loss"])
def test_nothing_is_changed_by_an_error(where, time):
    """Raised at one of its evaluations: of the trial, the proof, or the real one."""
    calls = []

    def fuse() -> None:
        calls.append(1)
        if len(calls) == time + 1:
            raise ZeroDivisionError("the user's own")

    model, batch = watched(fuse if where == "forward" else lambda: None)

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        if where == "loss":
            fuse()
        return wave(outputs)

    before = state(model)
    with contextlib.suppress(ZeroDivisionError):
        observe(Objective(model, loss), batch).gradients()
    assert same(state(model), before)


@TRILINEAR
def test_all_parameters_are_covered():
    model, batch = watched()
    model.requires_grad_(True)
    explained = uw.Influence(
        model, uw.Data.of((batch.inputs[0],)), loss=wave, l2=0.1, method="ekfac"
    )
    assert explained.explain((batch.inputs[0][:2],)).provenance.coverage == 1.0


@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (1, 1)])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), ((2, 1), (0, 2), (1, 2))])
def test_patches_are_those_of_unfold(kernel, stride, padding, dilation):
    x = torch.randn(2, 3, 8, 9)
    each = [value if isinstance(value, tuple) else (value,) * 2 for value in (stride, dilation)]
    found = patches(x, kernel, (each[0], padding, each[1]))
    assert torch.equal(found, F.unfold(x, kernel, dilation, padding, stride))
