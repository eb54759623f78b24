"""What the tests of local problems are run on: every transfer function, groups, biases, and a chain of layers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from layerwise.local import transfer as tr
from layerwise.local.transfer import IDENTITY, RELU, SOFTMAX, TANH

__all__ = ["TRANSFERS", "biases", "each", "groups", "mlp"]

TRANSFERS = [
    IDENTITY, TANH, tr.SIGMOID, RELU, tr.leaky_relu(0.2), SOFTMAX, tr.HARD_TANH, tr.ARCTAN, tr.ELU,
    tr.SOFTPLUS, tr.RELU_SQUARED,
]  # fmt: skip
each = pytest.mark.parametrize("f", TRANSFERS, ids=lambda t: t.name)
groups = pytest.mark.parametrize("k", [1, 3])
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def mlp(*sizes: int, f: Callable[[], nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), f()]
    return nn.Sequential(*layers[:-1]).double()
