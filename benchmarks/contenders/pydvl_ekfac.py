"""pyDVL: its EK-FAC, for networks of Linear layers with biases."""

from typing import Any

import torch
from pydvl.influence import InfluenceMode
from pydvl.influence.torch import EkfacInfluence
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset


def run(problem: Any, *, batch: int, chunk: int) -> Tensor:
    """Fit with corrected eigenvalues, factors of the queries, then scores by chunks.

    Args:
        problem: the task.
        batch: rows at once in fitting; fetched whole, without collating.
        chunk: training examples whose gradients are formed at once.
    """
    dataset = TensorDataset(problem.inputs, problem.labels)
    sampler = BatchSampler(SequentialSampler(dataset), batch, drop_last=False)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None)
    model = EkfacInfluence(
        problem.model(), update_diagonal=True, hessian_regularization=problem.damping
    ).fit(loader)
    factors = model.influence_factors(problem.query_inputs, problem.query_labels)
    blocks = [
        model.influences_from_factors(factors, x, y, mode=InfluenceMode.Up).detach()
        for x, y in problem.batches(chunk)
    ]
    return torch.cat(blocks, 1) / len(problem.inputs)
