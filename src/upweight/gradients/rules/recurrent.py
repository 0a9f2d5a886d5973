"""Recurrent layers, unrolled: each gate is a linear map of the input and one of the state."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from upweight.gradients.rules.attention import projected
from upweight.gradients.watch import Given, Watch, rule

__all__ = ["recurrent"]

TAKES = dict.fromkeys(
    ("input", "hx", "weights", "bias", "layers", "dropout", "training", "bidirectional", "first")
)
State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, c, o = (x + h).chunk(4, dim=-1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(c)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (rx, zx, nx), (rh, zh, nh) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
    z = torch.sigmoid(zx + zh)
    fresh = torch.tanh(nx + torch.sigmoid(rx + rh) * nh)
    return ((1 - z) * fresh + z * state[0],)


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    del state
    return (torch.tanh(x + h),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    del state
    return (torch.relu(x + h),)


CELLS: dict[Any, Cell] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _tanh,
    torch.rnn_relu: _relu,
}


def _unrolled(
    watch: Watch, cell: Cell, x: Tensor, state: State, weights: Sequence[Tensor]
) -> tuple[Tensor, State]:
    """One layer in one direction over time-first inputs ``[t, n, i]``."""
    wide = projected(watch, x, weights[0], weights[2] if len(weights) > 2 else None)
    outputs = []
    for step in wide:
        bias = weights[3] if len(weights) > 2 else None
        state = cell(step, projected(watch, state[0], weights[1], bias), state)
        outputs.append(state[0])
    return torch.stack(outputs), state


@rule(*CELLS, takes=TAKES)
def recurrent(watch: Watch, given: Given) -> Any:
    """All layers and directions, step by step; packed sequences and projections run fused."""
    per, both = (4 if given.bias else 2), 2 if given.bidirectional else 1
    packed, random = not isinstance(given.bias, bool), given.training and given.dropout
    if packed or random or len(given.weights) != per * both * given.layers:
        return given.run()
    lstm = given.operation is torch.lstm
    x = given.input.transpose(0, 1) if given.first else given.input
    start, ends = (tuple(given.hx) if lstm else (given.hx,)), []
    for layer in range(given.layers):
        sides = []
        for side in range(both):
            at = layer * both + side
            state = tuple(part[at] for part in start)
            weights = given.weights[at * per : (at + 1) * per]
            run = x.flip(0) if side else x
            out, end = _unrolled(watch, CELLS[given.operation], run, state, weights)
            sides.append(out.flip(0) if side else out)
            ends.append(end)
        x = torch.cat(sides, dim=-1)
    out = x.transpose(0, 1) if given.first else x
    return (out, *(torch.stack(parts) for parts in zip(*ends, strict=True)))
