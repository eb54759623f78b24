#!/bin/sh
# torch 2.13.0: the third derivative of layer norm, and of batch norm in training mode, is silently wrong where it is made by
# three calls of torch.autograd.grad: the first two derivatives agree with the same norm written with mean and square
# root, the third does not. Group norm and RMS norm, and batch norm in evaluation, have the right one.
# What it prints, by the order of the derivative:
#     layer norm 1: right, 2: right, 3: wrong
#     batch norm 1: right, 2: right, 3: wrong
#     group norm 1: right, 2: right, 3: right
#     RMS norm 1: right, 2: right, 3: right
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
x = torch.randn(5, 4)
weights, directions = torch.randn(5, 4), torch.randn(2, 5, 4)


def by_hand(x, axis, centred=True):
    x = x - x.mean(axis, keepdim=True) if centred else x
    return x / (x.square().mean(axis, keepdim=True) + 1e-5).sqrt()


def derivatives(norm):
    """The gradient of a weighted sum of outputs, and twice the gradient of its product with a direction."""
    at = x.clone().requires_grad_()
    value, found = (norm(at) * weights).sum(), []
    for k in range(3):
        (g,) = torch.autograd.grad(value, at, create_graph=True)
        found.append(g.detach())
        value = (g * directions[min(k, 1)]).sum()
    return found


pairs = {
    "layer norm": (lambda x: F.layer_norm(x, (4,)), lambda x: by_hand(x, 1)),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), lambda x: by_hand(x, 0)),
    "group norm": (lambda x: F.group_norm(x, 2), lambda x: by_hand(x.view(5, 2, 2), 2).view(5, 4)),
    "RMS norm": (lambda x: F.rms_norm(x, (4,), eps=1e-5), lambda x: by_hand(x, 1, centred=False)),
}
seen = {}
for name, (fused, plain) in pairs.items():
    gaps = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(derivatives(fused), derivatives(plain))]
    seen[name] = ["right" if gap < 1e-8 else "wrong" for gap in gaps]
    assert all(gap < 1e-8 or gap > 1e-2 for gap in gaps), gaps
    print(name + " " + ", ".join(f"{order}: {said}" for order, said in enumerate(seen[name], 1)))
assert seen["layer norm"] == seen["batch norm"] == ["right", "right", "wrong"], "the behaviour has changed"
assert seen["group norm"] == seen["RMS norm"] == ["right", "right", "right"], "the behaviour has changed"
END
