"""How near stochastic series come to the exact Gauss-Newton solve, by passes over the data.

    python -m benchmarks.series        (about two minutes on one core)

A perceptron on the package's digits and a small transformer on made-up sequences, both small enough
for a dense solve in float64. Printed: the median relative error ‖x − x*‖ / ‖x*‖ of 4 queries.
A pass is one product of every training example with every query, as one step of conjugate
gradients takes; the EK-FAC fit and the search for a scale are not counted.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upweight import CG, Data, Kronecker, LiSSA, Objective
from upweight.curvature import Leading, curvature
from upweight.demo.digits import pixels_and_labels
from upweight.engine import query_rows
from upweight.linalg import Inverse, Operator
from upweight.risk import Risk

L2, QUERIES, TRAIN = 1e-3, 4, 1_000
PASSES = (5, 10, 20, 40)
SERIES = LiSSA(repeats=1, batch_size=128, max_error=1e9, max_residual=1e9)


class Transformer(nn.Module):
    """One encoder layer of width 16 over 8 tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.places = nn.Parameter(0.3 * torch.randn(8, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[b, 8]`` to logits ``[b, 4]``."""
        logits: Tensor = self.head(self.layer(self.table(tokens) + self.places).mean(1))
        return logits


def sequences() -> tuple[Tensor, Tensor]:
    """Is the first half larger, is there a 10, and one label in ten drawn anew."""
    generator = torch.Generator().manual_seed(1)
    n = TRAIN + QUERIES
    tokens = torch.randint(11, (n, 8), generator=generator)
    larger = tokens[:, :4].sum(1) > tokens[:, 4:].sum(1)
    labels = larger.long() * 2 + (tokens.max(1).values > 9).long()
    wrong = torch.rand(n, generator=generator) < 0.1
    return tokens, torch.where(wrong, torch.randint(4, (n,), generator=generator), labels)


def trained(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """30 epochs of Adam in batches of 64, then in float64."""
    generator = torch.Generator().manual_seed(0)
    descent = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        for rows in torch.randperm(len(y), generator=generator).split(64):
            penalty = sum(p.square().sum() for p in model.parameters())
            loss = F.cross_entropy(model(x[rows]), y[rows]) + 0.5 * L2 * penalty
            descent.zero_grad()
            loss.backward()
            descent.step()
    return model.double().eval()


def problems() -> dict[str, tuple[Operator, Tensor]]:
    """A Gauss-Newton matrix and query rows of each network."""
    torch.manual_seed(0)
    perceptron = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    found = {}
    for name, model, (x, y) in (
        ("perceptron", perceptron, pixels_and_labels()),
        ("transformer", Transformer(), sequences()),
    ):
        single = x.float() if x.is_floating_point() else x
        trained(model, single[:TRAIN], y[:TRAIN])
        risk = Risk(Objective(model, "cross_entropy", l2=L2), Data.of((x[:TRAIN], y[:TRAIN])))
        asked = Data.of((x[TRAIN : TRAIN + QUERIES], y[TRAIN : TRAIN + QUERIES]))
        found[name] = curvature("ggn", risk), query_rows(risk.objective, asked, "loss")
    return found


def main() -> None:
    """Print a table."""
    print(f"| network | damping | way | {' | '.join(f'{p} passes' for p in PASSES)} |")
    print(f"|---|---|---|{'---|' * len(PASSES)}")
    for name, (matrix, rows) in problems().items():
        dense = matrix.to_dense()
        for damping in (0.0, 0.01):
            operator = matrix + damping
            shifted = dense + damping * torch.eye(len(dense), dtype=dense.dtype)
            exact = torch.linalg.solve(shifted, rows.T).T

            def error(inverse: Inverse, rows: Tensor = rows, exact: Tensor = exact) -> str:
                gap = (inverse.solve(rows).value - exact).norm(dim=1) / exact.norm(dim=1)
                return f"{float(gap.median()):.3f}"

            alone = Kronecker()(operator, QUERIES)
            assert isinstance(alone, Inverse)
            ways = {"EK-FAC alone": [error(alone)] * len(PASSES)}
            for way, maker in (("LiSSA", None), ("ASTRA", Kronecker())):
                drawn = SERIES.repeats * SERIES.batch_size
                depths = [round(passes * TRAIN / drawn) for passes in PASSES]
                solvers = [replace(SERIES, depth=d, preconditioner=maker) for d in depths]
                ways[way] = [error(solver.init(operator)) for solver in solvers]
            steps = [CG(rtol=0.0, max_steps=p, preconditioner=Leading(TRAIN)) for p in PASSES]
            ways["ggn_cg"] = [error(solver.init(operator)) for solver in steps]
            for way, errors in ways.items():
                print(f"| {name} | {damping:g} | {way} | {' | '.join(errors)} |", flush=True)


if __name__ == "__main__":
    main()
