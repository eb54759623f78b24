#!/bin/sh
# torch 2.13.0: the second derivative through torch.sparse_coo_tensor is taken for zero. The Hessian of the sum of v^4,
# by way of a sparse tensor with the values v^2, is diag(4 v^2) in place of diag(12 v^2), with no error or warning; the
# gradient is right.
# What it prints:
#     gradients [4.0, 32.0] [4.0, 32.0]
#     diagonals of the Hessian, sparse and dense [4.0, 16.0] [12.0, 48.0]
# Exits with an error where the behaviour is another one. It installs into a folder of its own, removed at the end.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -W ignore - <<'END'
import torch

places, v = torch.tensor([[0, 1], [1, 0]]), torch.tensor([1.0, 2.0])


def sparse(v):
    return torch.sparse_coo_tensor(places, v**2, (2, 2)).to_dense().square().sum()


def dense(v):
    return torch.zeros(2, 2).index_put(tuple(places), v**2).square().sum()


slopes = [torch.autograd.functional.jacobian(f, v) for f in (sparse, dense)]
hessians = [torch.autograd.functional.hessian(f, v).diagonal() for f in (sparse, dense)]
print("gradients", *(g.tolist() for g in slopes))
print("diagonals of the Hessian, sparse and dense", *(h.tolist() for h in hessians))
assert torch.equal(*slopes)
assert torch.allclose(hessians[0], 4 * v**2) and torch.allclose(hessians[1], 12 * v**2)
END
