#!/bin/sh
# torch 2.13.0: group norm's derivative by its input can be differentiated by its weight one cotangent at a time, but not
# for a batch of them: with is_grads_batched torch raises a RuntimeError about a shape in its own formula.
# What it prints:
#     one by one (3, 2)
#     in a batch RuntimeError: shape '[3, 2]' is invalid for input of size 12
# Exits with an error where the behaviour is another one. It installs into a folder of its own, removed at the end.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -W ignore - <<'END'
import torch
import torch.nn.functional as F

x, weight = torch.randn(2, 2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
(slope,) = torch.autograd.grad(F.group_norm(x, 1, weight).square().sum(), x, create_graph=True)
cotangents = torch.randn(3, 2, 2, 2)
rows = [torch.autograd.grad(slope, weight, c, retain_graph=True)[0] for c in cotangents]
print("one by one", tuple(torch.stack(rows).shape))
try:
    torch.autograd.grad(slope, weight, cotangents, is_grads_batched=True)
except RuntimeError as error:
    print("in a batch RuntimeError:", error)
    assert "is invalid for input of size" in str(error)
else:
    raise SystemExit("no error: the behaviour has changed")
END
