#!/bin/sh
# nngeometry 0.4: a module that the model calls twice enters the Fisher information with the input of its last call at
# both calls. PMatDense is then not the sum of p J^T J by torch.autograd, with no error or warning.
# What it prints:
#     called 1 time(s): relative error 7.1e-16
#     called 2 time(s): relative error 1.5e-01
# Exits with an error where the behaviour is another one. It installs into a folder of its own, removed at the end.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet --no-deps nngeometry==0.4 numpy==2.4.6 tqdm==4.70.1
"$work/venv/bin/python" -W ignore - <<'END'
import torch
from nngeometry.metrics import FIM
from nngeometry.object import PMatDense
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x = torch.randn(6, 3)


class Net(torch.nn.Module):
    def __init__(self, times):
        super().__init__()
        self.times, self.layer, self.head = times, torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x).tanh()
        return self.head(x)


def by_autograd(model):
    params, total = list(model.parameters()), 0
    for sample in x:
        z = model(sample[None])[0]
        p = z.softmax(0).detach()
        rows = [torch.autograd.grad(out, params, retain_graph=True) for out in z]
        J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        total = total + J.T @ (torch.diag(p) - p[:, None] * p) @ J / len(x)
    return total


for times in (1, 2):
    model = Net(times)
    found = FIM(model, DataLoader(TensorDataset(x), batch_size=6), PMatDense, function=lambda batch: model(batch))
    want = by_autograd(model)
    error = float((found.to_torch() - want).abs().max() / want.abs().max())
    print(f"called {times} time(s): relative error {error:.1e}")
    assert error < 1e-10 if times == 1 else error > 0.05
END
