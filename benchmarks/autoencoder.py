"""The deep autoencoder that LocoProp's authors trained on MNIST.

Source: Amid, Anil and Warmuth, "LocoProp: Enhancing BackProp via Local Loss Optimization", AISTATS 2022,
section 5, and the program published with it (for the biases, which do not start at 0).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SIZES", "deep_autoencoder", "mean_loss", "reconstruction_loss"]

SIZES = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


def deep_autoencoder(seed: int, sizes: tuple[int, ...] = SIZES, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers with tanh between, identity at the code (the middle of the sizes), the pixels' logits as output.

    Glorot uniform: weights `U(±sqrt(6 / (i + o)))`, biases `U(±sqrt(3 / o))`.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    code = (len(sizes) - 1) // 2 - 1
    for number, (size_in, size_out) in enumerate(pairwise(sizes)):
        linear = nn.utils.skip_init(nn.Linear, size_in, size_out)
        for parameter, bound in (
            (linear.weight, math.sqrt(6 / (size_in + size_out))),
            (linear.bias, math.sqrt(3 / size_out)),
        ):
            with torch.no_grad():
                parameter.uniform_(-bound, bound, generator=generator)
        layers.append(linear)
        if number not in (code, len(sizes) - 2):
            layers.append(activation())
    return nn.Sequential(*layers)


def reconstruction_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Sigmoid cross entropy of the pixels in [0, 1], summed over pixels, mean over the batch (nats)."""
    return F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)


@torch.no_grad()
def mean_loss(model: nn.Module, x: Tensor, rows: int = 5000) -> float:
    """The loss over all rows of `x`, a part at a time; the parts are added up in double precision."""
    return sum(float(reconstruction_loss(model, part)) * len(part) for part in x.split(rows)) / len(x)
