"""A recipe for ``upweight run``: which digits taught the model to tell 1 from 7?

upweight run examples/digits_recipe.py --out digits-run
"""

import torch
from torch import nn

from upweight.demo import minimise, pixels_and_labels

pixels, labels = pixels_and_labels()
chosen = ((labels == 1) | (labels == 7)).nonzero()[:, 0]
train_ids, query_ids = chosen[:300], chosen[300:310]

train = (pixels[train_ids], (labels[train_ids] == 7).long())
queries = (pixels[query_ids], (labels[query_ids] == 7).long())
loss = "cross_entropy"
l2 = 0.01

torch.manual_seed(0)
model = nn.Linear(64, 2, dtype=torch.float64)
minimise(model, train, l2)

title = "One or seven?"
ids = train_ids.tolist()
label_names = ["one", "seven"]
image_shape = (8, 8)
