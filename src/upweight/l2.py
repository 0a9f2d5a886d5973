"""The derivative of what is asked of queries in the strength of L2, by implicit differentiation.

At a minimum ∇R(θ) = 0. Differentiating it in λ_b, the L2 of parameter block b, gives

    dθ/dλ_b = −H⁻¹ θ_b,   dm(q)/dλ_b = ∇m(q) · dθ/dλ_b        (θ_b: θ in block b, 0 elsewhere)

so that one solve per block serves any number of queries. Averaged over a validation set it is the
gradient for choosing λ (Bengio, 2000, "Gradient-Based Optimization of Hyperparameters").
"""

import torch

from upweight.answers import L2Derivative
from upweight.data import Data
from upweight.engine import query_products
from upweight.linalg import Inverse
from upweight.meaning import meaning_of
from upweight.objective import Measure, Objective

__all__ = ["derivative"]


def derivative(
    objective: Objective, inverse: Inverse, queries: Data, *, measure: Measure
) -> L2Derivative:
    """dm(q)/dλ_b for every query and parameter block.

    Args:
        objective: what was minimised.
        inverse: (H + damping)⁻¹ over the training data.
        queries: whose measures are asked.
        measure: what is asked of them.

    Raises:
        NotConvergedError, IndefiniteError: a solve failed.
    """
    space = objective.space
    sizes = [shape.numel() for shape in space.shapes.values()]
    rows = torch.block_diag(*[part[None] for part in space.row().split(sizes)])
    products = query_products(objective, queries, measure, -inverse.apply(rows))
    return L2Derivative(
        query_ids=queries.ids,
        blocks=tuple(space.shapes),
        patterns=tuple(objective.l2_patterns[name] for name in space.shapes),
        values=products.cpu().double().numpy(),
        meaning=meaning_of(objective, measure),
    )
