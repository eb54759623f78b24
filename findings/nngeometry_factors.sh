#!/bin/sh
# nngeometry 0.4: a factor is moved between the two Kronecker factors of PMatKFAC with the number of outputs C: A is
# sqrt(C - 1) times the mean of a a^T, and B is divided by it. Their product is right; what reads one of them alone (a
# damping of each factor, a trace of A) is not that of K-FAC.
# What it prints:
#     2 outputs: A and B are 1.0000 1.0000 times K-FAC's
#     3 outputs: A and B are 1.4142 0.7071 times K-FAC's
#     5 outputs: A and B are 2.0000 0.5000 times K-FAC's
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
from nngeometry.object import PMatKFAC
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x = torch.randn(6, 3)
one = torch.cat([x, torch.ones(6, 1)], 1)
for outputs in (2, 3, 5):
    model = torch.nn.Sequential(torch.nn.Linear(3, outputs))
    found = FIM(model, DataLoader(TensorDataset(x), batch_size=6), PMatKFAC, function=lambda batch: model(batch))
    ((A, B),) = found.data.values()
    p = model(x).softmax(1).detach()
    hessian = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    ratios = (A / (one.T @ one / 6)).mean(), (B / hessian).mean()
    print(outputs, "outputs: A and B are", *(f"{float(r):.4f}" for r in ratios), "times K-FAC's")
    assert abs(float(ratios[0]) - (outputs - 1) ** 0.5) < 1e-8
    assert abs(float(ratios[1]) - (outputs - 1) ** -0.5) < 1e-8
END
