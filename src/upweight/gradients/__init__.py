"""Per-example gradients as values: dense, factored, or never formed."""

from upweight.gradients.autograd import (
    ROW_CHUNK,
    AutogradGradients,
    map_rows,
    math_attention,
    pull_back,
    push_forward,
)
from upweight.gradients.capture import Layout, Observation, layout_of, observe
from upweight.gradients.inputs import mixed_derivative
from upweight.gradients.last import last_layer
from upweight.gradients.linear import LinearForm, last_linear, linear_form, residual
from upweight.gradients.provide import dense_gradients, per_example
from upweight.gradients.stacked import stacked_gradient, stacked_measure
from upweight.gradients.training import (
    Compression,
    Seen,
    TrainingGradients,
    batch_rows,
    risk_layout,
)
from upweight.linalg import DenseGradients, FactoredGradients, Gradients

__all__ = [
    "ROW_CHUNK",
    "AutogradGradients",
    "Compression",
    "DenseGradients",
    "FactoredGradients",
    "Gradients",
    "Layout",
    "LinearForm",
    "Observation",
    "Seen",
    "TrainingGradients",
    "batch_rows",
    "dense_gradients",
    "last_layer",
    "last_linear",
    "layout_of",
    "linear_form",
    "map_rows",
    "math_attention",
    "mixed_derivative",
    "observe",
    "per_example",
    "pull_back",
    "push_forward",
    "residual",
    "risk_layout",
    "stacked_gradient",
    "stacked_measure",
]
