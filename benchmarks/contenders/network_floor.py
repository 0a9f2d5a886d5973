"""The floor of a network task: one forward and backward pass over training data and queries."""

from typing import Any


def run(problem: Any, *, batch: int) -> None:
    """The gradient of the summed loss, batch by batch."""
    model = problem.model()
    for inputs, labels in (*problem.batches(batch), *problem.query_batches(batch)):
        problem.losses(model(inputs), labels).sum().backward()
