"""CURVES: images of curves through three random points, generated.

Source: the data set of Hinton and Salakhutdinov, "Reducing the Dimensionality of Data with Neural Networks" (2006),
made of "curves that were generated from three randomly chosen points"; drawn here as quadratic Bézier curves.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["curves"]

SIDE, MARGIN, WIDTH, POINTS = 28, 4.0, 0.7, 60


def curves(rows: int, seed: int) -> Tensor:
    """`[rows, 784]` float32 in [0, 1]: ink `exp(-d²/2w²)` at distance d (pixels) from the curve, w = 0.7.

    Each curve is the quadratic Bézier curve of three points uniform on the image less a margin of 4 pixels.
    The first rows of a seed are the same whatever `rows` is.
    """
    generator = torch.Generator().manual_seed(seed)
    control = MARGIN + (SIDE - 1 - 2 * MARGIN) * torch.rand(rows, 3, 2, generator=generator)
    return torch.cat([_drawn(part) for part in control.split(500)]) if rows else torch.empty(0, SIDE * SIDE)


def _drawn(control: Tensor) -> Tensor:
    """Images `[n,784]` of the curves with control points `[n,3,2]`."""
    t = torch.linspace(0, 1, POINTS)
    basis = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    path = torch.einsum("bt,nbc->ntc", basis, control)
    pixels = torch.arange(SIDE, dtype=torch.float32)
    across, down = (torch.exp(-((path[..., c, None] - pixels) ** 2) / (2 * WIDTH**2)) for c in (0, 1))
    image = torch.zeros(len(control), SIDE, SIDE)
    for k in range(POINTS):
        image = torch.maximum(image, down[:, k, :, None] * across[:, k, None, :])
    return image.flatten(1)
