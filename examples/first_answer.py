"""From a trained model to a checked answer in Python, on the digits that come with the package.

python examples/first_answer.py
"""

import torch
from torch import nn

import upweight as uw
from upweight.demo import minimise, split

digits = split(seed=0)
model = nn.Linear(64, 10, dtype=torch.float64)
minimise(model, digits.train, l2=0.01)

train = uw.Data.of(digits.train, ids=digits.train_ids.tolist())
inf = uw.Influence(model, train, loss="cross_entropy", l2=0.01)
queries = digits.queries(torch.arange(3))
print(inf.plan(queries))

scores = inf.explain(queries)
print(scores)
print(scores.top(queries.ids[0], k=5))

print(inf.audit().head(5))
suspects = inf.audit()["id"][:5].tolist()
print(inf.whatif(remove=suspects, on=queries))
print(inf.validate(queries, top=10, random=10))
