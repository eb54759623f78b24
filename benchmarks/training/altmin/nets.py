"""The nets of the study, with torch's own initial weights from a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.overhead import nets

__all__ = ["Elman", "Patches", "Sign", "dense", "elman", "lenet5", "linears", "patches", "resnet8", "seeded", "signs"]

Model = Callable[[int, Mapping[str, Any]], nn.Module]


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.where(z > 0, 1.0, -1.0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return g[0] * (z.abs() <= 1)


class Sign(nn.Module):
    """±1, −1 at 0; its gradient is passed straight through where `|z| ≤ 1`.

    Source: Bengio, Léonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons" (2013);
    the clipping is Hubara et al.'s, "Binarized Neural Networks" (2016).
    """

    def forward(self, z: Tensor) -> Tensor:
        found: Tensor = _Straight.apply(z)
        return found


class Elman(nn.Module):
    """`h_t = tanh(W [x_t, h_{t−1}] + b)` over a sequence `[N,T,I]`, and classes from the last state.

    Source: Elman, "Finding Structure in Time" (1990).
    """

    def __init__(self, features: int, units: int, classes: int) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(features + units, units), nn.Linear(units, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.cell.out_features)
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(torch.cat([x[:, t], h], 1)))
        out: Tensor = self.head(h)
        return out


class Patches(nn.Module):
    """A transformer over patches of an image, with learned positions, and classes from their mean.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), without the class token.
    """

    def __init__(self, size: int, patch: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.layers = nn.Sequential(*(nets.EncoderLayer(width, heads, 2 * width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.place
        found: Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return found


def seeded(make: Callable[[], nn.Module]) -> Model:
    """A model that has one shape, from a seed."""

    def model(seed: int, shape: Mapping[str, Any]) -> nn.Module:
        if shape:
            raise ValueError(f"the net has one shape; got {dict(shape)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make()

    return model


def dense(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> Model:
    """Linear layers of these sizes with an activation between."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for i, o in pairwise(sizes):
            layers += [nn.Linear(i, o), activation()]
        return nn.Sequential(*layers[:-1])

    return seeded(make)


def signs(*sizes: int) -> Model:
    """Linear layers with signs between."""
    return dense(*sizes, activation=Sign)


def lenet5() -> Model:
    """LeNet-5 with ReLU and max pooling, for images of 28 x 28. Source: LeCun et al. (1998), figure 2."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )
    )  # fmt: skip


def resnet8() -> Model:
    """ResNet-8 with batch norm, for images of 28 x 28. Source: He et al. (2016), section 4.2, n = 1."""
    return seeded(lambda: nets.resnet8(channels=1, size=28))


def patches() -> Model:
    """A transformer of three layers of width 64 over the 16 patches of an image of 28 x 28."""
    return seeded(lambda: Patches(size=28, patch=7, width=64, heads=4, layers=3))


def elman(features: int, units: int = 15, classes: int = 10) -> Model:
    """The recurrent net of 15 units."""
    return seeded(lambda: Elman(features, units, classes))


def linears(model: nn.Module, activation: type[nn.Module]) -> list[nn.Linear]:
    """The layers of a chain Linear, activation, ..., Linear. Raises ValueError for any other model."""
    parts = list(model) if isinstance(model, nn.Sequential) else []
    even, odd = parts[::2], parts[1::2]
    layers = [m for m in even if isinstance(m, nn.Linear) and m.bias is not None]
    if len(parts) < 3 or len(layers) < len(even) or not all(isinstance(m, activation) for m in odd):
        raise ValueError(f"a chain of linear layers with bias and {activation.__name__} between is needed; got {model}")
    return layers
