"""The demo's problem: an autoencoder of scikit-learn's 8x8 digits with a 16-dimensional bottleneck."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SIZES", "Problem", "autoencoder", "digits", "reconstruction_loss"]

SIZES = (64, 128, 64, 16, 64, 128, 64)
NAMES = ("encode1", "encode2", "code", "decode1", "decode2", "pixels")
N_TRAIN = 1440


@dataclass(frozen=True)
class Problem:
    """The data, one image a row: `x_train` `[N, 64]` and `x_test` `[M, 64]`, pixels in [0, 1]."""

    x_train: Tensor
    x_test: Tensor

    @property
    def floor_train(self) -> float:
        """Lowest train loss that any model can reach: the pixels' own entropy, nats an image."""
        return _entropy(self.x_train)

    @property
    def floor_test(self) -> float:
        """Lowest test loss that any model can reach, nats an image."""
        return _entropy(self.x_test)


def _entropy(x: Tensor) -> float:
    x = x.double()
    return float(-(torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).sum() / len(x))


def digits(seed: int) -> Problem:
    """The 1,797 digits of `sklearn.datasets.load_digits`, divided by 16, split at random by `seed`: 1,440 and 357.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998), test part.
    """
    from sklearn.datasets import load_digits

    x = torch.from_numpy(np.asarray(load_digits().data, dtype=np.float32) / 16)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return Problem(x[order[:N_TRAIN]], x[order[N_TRAIN:]])


def autoencoder(seed: int) -> nn.Sequential:
    """A tanh autoencoder 64-128-64-16-64-128-64; its output is the logit of each pixel.

    Weights are Glorot uniform, `U(±sqrt(6 / (i + o)))`, and biases 0 (Glorot and Bengio, 2010, eq. 16).
    """
    generator = torch.Generator().manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, size_in, size_out in zip(NAMES, SIZES[:-1], SIZES[1:], strict=True):
        linear = nn.utils.skip_init(nn.Linear, size_in, size_out)  # draws no global random numbers
        bound = math.sqrt(6 / (size_in + size_out))
        with torch.no_grad():
            linear.weight.uniform_(-bound, bound, generator=generator)
            linear.bias.zero_()
        layers[name] = linear
        if name not in ("code", "pixels"):
            layers[f"tanh_{name}"] = nn.Tanh()
    return nn.Sequential(layers)


def reconstruction_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Sigmoid cross entropy `-Σ_pixels x log p + (1-x) log(1-p)`, mean over the batch: nats an image."""
    return F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)
