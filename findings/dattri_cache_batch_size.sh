#!/bin/sh
# dattri 0.3.0: influence scores of IFAttributorExplicit (IFAttributorCG's, too) change with the batch size of the loader
# given to `cache`, for the same samples in the same order and a loss that is a mean over the batch: the products with
# the inverse Hessian of each batch are added up, so that scores grow with the number of batches.
# What it prints:
#     cached in batches of 1: [-4.28, -18.4]
#     cached in batches of 2: [-2.56, -8.49]
#     cached in batches of 8: [-0.41, -1.47]
# Exits with an error where the behaviour is another one. It installs into a folder of its own, removed at the end.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet --no-deps \
    dattri==0.3.0 numpy==2.4.6 scipy==1.17.1 tqdm==4.70.1 pyyaml==6.0.4
"$work/venv/bin/python" -W ignore - <<'END'
import torch
import torch.nn.functional as F
from dattri.algorithm.influence_function import IFAttributorExplicit
from dattri.task import AttributionTask
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
x, y = torch.randn(8, 3), torch.randint(2, (8,))
queries = TensorDataset(torch.randn(2, 3), torch.tensor([0, 1]))


def loss(params, data):
    inputs, targets = (t if t.dim() > k else t[None] for k, t in zip((1, 0), data))
    return F.cross_entropy(torch.func.functional_call(model, params, (inputs,)), targets.view(-1))


scores = {}
for size in (1, 2, 8):
    task = AttributionTask(loss, model, model.state_dict())
    attributor = IFAttributorExplicit(task=task, regularization=0.1)
    attributor.cache(DataLoader(TensorDataset(x, y), batch_size=size))
    train = DataLoader(TensorDataset(x, y), batch_size=8)
    scores[size] = attributor.attribute(train, DataLoader(queries, batch_size=2)).detach()
    print(f"cached in batches of {size}:", [round(s, 2) for s in scores[size][0].tolist()])
assert not torch.allclose(scores[1], scores[8], rtol=0.5, atol=0)
assert not torch.allclose(scores[2], scores[8], rtol=0.5, atol=0)
END
