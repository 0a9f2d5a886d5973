"""pyDVL: conjugate gradients on the Hessian, all queries at once.

Without a preconditioner: in 0.10.0 ``Preconditioner.fit`` gives None back, which CgInfluence then
stores in its place, so that scores with and without one are the same to the last bit.
"""

from typing import Any

import torch
import torch.nn.functional as F
from pydvl.influence import InfluenceMode
from pydvl.influence.torch import CgInfluence
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset


def run(problem: Any, *, batch: int, rtol: float, steps: int, chunk: int) -> Tensor:
    """Fit, factors of the queries, then scores a chunk of training examples at a time.

    Args:
        problem: the task.
        batch: rows per Hessian product; whole batches are fetched at once, without collating.
        rtol: its tolerance; it stops at a residual of rtol² times the norm of the right side.
        steps: products at most.
        chunk: training examples per block of scores (their gradients are formed densely).
    """
    dataset = TensorDataset(problem.inputs, problem.labels)
    sampler = BatchSampler(SequentialSampler(dataset), batch, drop_last=False)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None)
    model = CgInfluence(
        problem.model(),
        F.cross_entropy,
        regularization=problem.l2,
        rtol=rtol,
        atol=1e-8,
        maxiter=steps,
        solve_simultaneously=True,
    ).fit(loader)
    factors = model.influence_factors(problem.query_inputs, problem.query_labels)
    pairs = zip(problem.inputs.split(chunk), problem.labels.split(chunk), strict=True)
    blocks = [
        model.influences_from_factors(factors, x, y, mode=InfluenceMode.Up).detach()
        for x, y in pairs
    ]
    return torch.cat(blocks, 1) / len(problem.inputs)
