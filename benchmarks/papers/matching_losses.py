"""Picture of the local losses that transfer functions induce, over prediction and target.

    python -m benchmarks.papers.matching_losses [--out benchmarks/results/matching_losses.png]

Each is the Bregman divergence `F(a) − F(b) − f(b)(a − b)` of the prediction a from the target b, both before the
transfer function `f = F'`; the identity's is the squared loss. Source: Amid, Anil and Warmuth (2022), section 3.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import probe
from layerwise import local

__all__ = ["PANELS", "plot", "surface"]

PANELS = {"squared loss (identity)": local.IDENTITY, "tanh": local.TANH, "ReLU": local.RELU}
REACH = 2.0  # of both axes
TICKS = (-2, -1, 0, 1, 2)
LEVELS = (0.0, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # the squared loss ends at 8


def surface(transfer: local.Transfer, points: int = 201) -> tuple[Tensor, Tensor]:
    """The grid `[points]` of both axes and the loss `[target, prediction]` on it."""
    grid = torch.linspace(-REACH, REACH, points, dtype=torch.float64)
    target, prediction = torch.meshgrid(grid, grid, indexing="ij")
    return grid, transfer.bregman(prediction, target).clamp_min(0)  # rounding


def plot(path: Path) -> None:
    """Surfaces above, the same as maps with contours below; one colour scale."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    figure = probe.figure(11, 7.6, layout=None)
    colours, norm = colormaps["viridis"], PowerNorm(0.4, 0, LEVELS[-1])
    maps: list[Any] = []
    for column, (name, transfer) in enumerate(PANELS.items()):
        grid, loss = surface(transfer)
        left = 0.065 + 0.285 * column
        solid = figure.add_axes((left - 0.04, 0.5, 0.31, 0.44), projection="3d")
        _draw_surface(solid, grid, loss, colours, norm)
        figure.text(left + 0.125, 0.955, name, ha="center", fontsize=13)
        maps.append(figure.add_axes((left, 0.075, 0.25, 0.25 * 11 / 7.6)))
        image = _draw_map(maps[-1], grid, loss, colours, norm)
    maps[0].set_ylabel("target b, before f")
    maps[-1].text(-0.62, -1.65, "0 where both\nare negative", color="white", ha="center", fontsize=9)
    bar = figure.colorbar(image, cax=figure.add_axes((0.915, 0.075, 0.016, 0.86)), ticks=LEVELS, format="%g")
    bar.set_label("local loss  F(a) − F(b) − f(b)·(a − b)")
    probe.save(figure, path, smooth=True)


def _draw_surface(ax: Any, grid: Tensor, loss: Tensor, colours: Any, norm: Any) -> None:
    target, prediction = (t.numpy() for t in torch.meshgrid(grid, grid, indexing="ij"))
    ax.plot_surface(prediction, target, loss.numpy(), facecolors=colours(norm(loss.numpy())), shade=False,
                    rcount=101, ccount=101, linewidth=0, antialiased=False)  # fmt: skip
    ax.set(zlim=(0, LEVELS[-1]), xticks=TICKS, yticks=TICKS, zticks=(0, 2, 4, 6, 8))
    ax.set_xlabel("prediction a", labelpad=-5)
    ax.set_ylabel("target b", labelpad=-5)
    ax.tick_params(labelsize=8, pad=-2)
    ax.view_init(elev=32, azim=-115)
    ax.set_box_aspect((1, 1, 0.75), zoom=0.95)


def _draw_map(ax: Any, grid: Tensor, loss: Tensor, colours: Any, norm: Any) -> Any:
    image = ax.imshow(
        loss.numpy(), origin="lower", extent=(-REACH, REACH) * 2, cmap=colours, norm=norm, interpolation="bilinear"
    )
    lines = ax.contour(grid.numpy(), grid.numpy(), loss.numpy(), levels=LEVELS[1:-1], colors="white", linewidths=0.7)
    ax.clabel(lines, fmt="%g", fontsize=8)
    ax.plot((-REACH, REACH), (-REACH, REACH), ":", color="white", linewidth=1)
    ax.set(xticks=TICKS, yticks=TICKS, xlabel="prediction a, before f")
    return image


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture."""
    made = probe.parser("benchmarks.papers.matching_losses", __doc__, out=probe.RESULTS / "matching_losses.png")
    out = probe.parsed(made, argv).out
    plot(out)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
