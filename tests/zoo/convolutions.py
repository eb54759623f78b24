"""Convolutions: 1 to 3 axes, stride, padding, dilation, groups, padding modes, transposed."""

from __future__ import annotations

import warnings

from torch import nn

from .parts import Apply, Mean
from .problem import Problem, floats, register

__all__ = ["CONVOLUTIONS"]

CONVOLUTIONS: list[Problem] = []
problem = register(CONVOLUTIONS)


@problem(floats(3, 2, 7, 6), (3, 3), "ce_mean", "ce_everything", "mse_mean", "bce_mean")
def conv2d():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, (2, 3), padding=(1, 2), dilation=(1, 2), groups=2, bias=False),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


@problem(floats(4, 3, 5, 5), (4, 3), "ce_sum", "mse_sum")
def conv2d_depthwise():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


@problem(floats(3, 2, 4, 3), (3, 3, 4, 3), "ce_mean", "ce_ignore", "mse_mean")
def conv2d_pixels():
    """A class for every pixel."""
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1))


@problem(floats(4, 2, 9), (4, 3))
def conv1d():
    return nn.Sequential(nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv1d(4, 3, 2, dilation=2), Mean(-1))


@problem(floats(3, 2, 3, 4, 4), (3, 3))
def conv3d():
    return nn.Sequential(
        nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=(0, 1, 0), groups=2),
        nn.Tanh(),
        Mean(-1, -2, -3),
        nn.Linear(4, 3),
    )


@problem(floats(3, 4, 3, 2), (3, 3))
def conv_transpose2d():
    return nn.Sequential(
        nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, (1, 2), dilation=2),
        nn.Tanh(),
        Mean(-1, -2),
    )


@problem(floats(4, 2, 4), (4, 3))
def conv_transpose1d():
    return nn.Sequential(nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1, dilation=2), nn.Tanh(), Mean(-1))


@problem(floats(3, 2, 2, 2, 2), (3, 2), "ce_mean", "bce_mean")
def conv_transpose3d():
    return nn.Sequential(nn.ConvTranspose3d(2, 2, 2, stride=(2, 1, 1), bias=False), nn.Tanh(), Mean(-1, -2, -3))


@problem(floats(3, 2, 5, 4), (3, 3))
def conv_circular():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), nn.ReLU(), Mean(-1, -2), nn.Linear(3, 3)
    )


@problem(floats(3, 2, 5, 4), (3, 3))
def conv_reflect():
    return nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=2, padding_mode="reflect"), nn.Tanh(), Mean(-1, -2))


@problem(floats(3, 2, 6), (3, 3))
def conv_replicate():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=2, padding_mode="replicate", groups=2),
        nn.Tanh(),
        Mean(-1),
        nn.Linear(4, 3),
    )


@problem(floats(3, 2, 5, 4), (3, 3), "ce_mean", "ce_soft")
def conv_same():
    """An even kernel and a dilation, so that 'same' pads one side more; and 'valid'."""

    def forward(m, x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns once that uneven padding copies the input
            h = m.a(x).tanh()
        return m.b(h).tanh().mean((-1, -2))

    return Apply(
        forward,
        a=nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2)),
        b=nn.Conv2d(3, 3, 2, padding="valid"),
    )


@problem(floats(3, 2, 5), (3, 3), "ce_mean")
def conv_same_circular():
    return nn.Sequential(nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"), nn.Tanh(), Mean(-1))
