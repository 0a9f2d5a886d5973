"""dattri: its EK-FAC, for Linear layers, with labels from the data (an empirical Fisher matrix).

In 0.3.0 a layer's gradient is laid out as weights, then biases, and reshaped as if each bias stood
behind its own row of weights; and eigenvalues of a batch are averaged. Both are left as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from dattri.algorithm.influence_function import IFAttributorEKFAC
from dattri.task import AttributionTask
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset


def run(problem: Any, *, batch: int) -> Tensor:
    """Cache the factors, then all pairs; all queries are one batch."""
    model = problem.model()

    def loss(params: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (pair[0],)), pair[1])

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    train = DataLoader(TensorDataset(problem.inputs, problem.labels), batch_size=batch)
    queries = TensorDataset(problem.query_inputs, problem.query_labels)
    attributor = IFAttributorEKFAC(task=task, device="cpu", damping=problem.damping)
    attributor.cache(train)
    with torch.no_grad():
        scores = attributor.attribute(train, DataLoader(queries, batch_size=len(queries)))
    found: Tensor = scores.T / len(problem.inputs)
    return found
