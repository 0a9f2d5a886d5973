"""Which outer products the gradient of each operation's weight is made of: one function each."""

from upweight.gradients.rules import (
    attention,
    convolution,
    dense,
    elementwise,
    lookup,
    normal,
    recurrent,
)

__all__ = ["attention", "convolution", "dense", "elementwise", "lookup", "normal", "recurrent"]
