#!/bin/sh
# torch 2.13.0: F.linear_cross_entropy with options (the chunked path) gives its gradient, but no second derivative, and
# torch.autograd.functional.hessian returns zeros for it with no error or warning; without options the Hessian is right.
# (torch.func.hessian raises.)
# What it prints:
#     without options: norm of the Hessian 0.5111
#     chunked: norm of the Hessian 0.0000
# Exits with an error where the behaviour is another one. It installs into a folder of its own, removed at the end.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -W ignore - <<'END'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x, w, y = torch.randn(5, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 3, 1])
norms = {}
for name, options in (("without options", None), ("chunked", torch.nn.LinearCrossEntropyOptions())):
    hessian = torch.autograd.functional.hessian(lambda w: F.linear_cross_entropy(x, w, y, options=options), w)
    norms[name] = float(hessian.norm())
    print(f"{name}: norm of the Hessian {norms[name]:.4f}")
assert norms["chunked"] == 0 and norms["without options"] > 0.1
END
