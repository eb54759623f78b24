"""DeepOBS's nets with its initial weights, from a seed; without dropout and penalties, which no curve here needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.speed.overhead import nets
from benchmarks.training.altmin.nets import Model, seeded

__all__ = ["all_cnn_c", "c2d2", "c3d3", "logistic"]


def _start(layer: nn.Conv2d | nn.Linear, weight: Callable[..., Any], bias: float, **settings: float) -> None:
    assert layer.bias is not None
    weight(layer.weight, **settings)
    nn.init.constant_(layer.bias, bias)


def logistic() -> Model:
    """One linear layer of zeros, on flat MNIST."""

    def make() -> nn.Module:
        layer = nn.Linear(784, 10)
        _start(layer, nn.init.zeros_, 0.0)
        return nn.Sequential(nn.Flatten(), layer)

    return seeded(make)


def c2d2() -> Model:
    """2C2D: two convolutions of 5x5 with pooling, two dense layers; for 28 x 28 images."""

    def make() -> nn.Module:
        net = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(3136, 1024), nn.ReLU(), nn.Linear(1024, 10),
        )  # fmt: skip
        for m in net:
            if isinstance(m, nn.Conv2d | nn.Linear):
                _start(m, nn.init.trunc_normal_, 0.05, std=0.05, a=-0.1, b=0.1)
        return net

    return seeded(make)


def c3d3() -> Model:
    """3C3D: three convolutions with overlapping pooling, three dense layers; for 3 x 32 x 32 images."""

    def make() -> nn.Module:
        net = nets.c3d3()
        for m in net.children():
            if isinstance(m, nn.Conv2d):
                _start(m, nn.init.xavier_normal_, 0.0)
            elif isinstance(m, nn.Linear):
                _start(m, nn.init.xavier_uniform_, 0.0)
        return net

    return seeded(make)


def all_cnn_c(classes: int = 10) -> Model:
    """All-CNN-C without dropout, for 3 x 32 x 32 images. Source: Springenberg et al. (2015), table 1."""

    def make() -> nn.Module:
        net = nets.all_cnn_c(classes)
        for m in net.children():
            if isinstance(m, nn.Conv2d):
                _start(m, nn.init.trunc_normal_, 0.1, std=math.sqrt(2 / m.weight[0].numel()))
        return net

    return seeded(make)
