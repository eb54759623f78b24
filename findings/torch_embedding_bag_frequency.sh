#!/bin/sh
# torch 2.13.0, CPU: nn.EmbeddingBag(scale_grad_by_freq=True) promises gradients of rows divided by how often each row is
# looked up. It divides some by the counts of other rows; nn.Embedding divides all by their own.
# What it prints: how often each row is looked up, and by what each row's gradient was divided.
#     looked up   [2, 3, 1]
#     embedding   [2, 3, 1]
#     bag         [2, 2, 3]
# Exits with an error where the behaviour is another one. It installs into a folder of its own, removed at the end.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -W ignore - <<'END'
import torch
from torch import nn

words = torch.tensor([[0, 0, 1, 1, 1, 2]])


def gradient(layer):
    layer(words).sum().backward()
    return layer.weight.grad[:, 0]


counts = words.flatten().bincount()
divided = {}
for name, kind in (("embedding", nn.Embedding), ("bag", lambda *size, **how: nn.EmbeddingBag(*size, mode="sum", **how))):
    ratio = gradient(kind(3, 1)) / gradient(kind(3, 1, scale_grad_by_freq=True))
    divided[name] = ratio.round().long().tolist()
print("looked up  ", counts.tolist())
for name, by in divided.items():
    print(f"{name:11}", by)
assert divided == {"embedding": [2, 3, 1], "bag": [2, 2, 3]}, "the behaviour has changed"
END
