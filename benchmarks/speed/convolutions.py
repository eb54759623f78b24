"""Times the two ways to the per-sample gradients of a convolution, from windows and as a grouped convolution.

    python -m benchmarks.speed.convolutions [--repeats 9]

The layers of All-CNN-C, 3C3D and ResNet-8; float32, one thread, CPU time in milliseconds, lower quartile of
interleaved repeats; `plain` is the gradient alone. The rule is `layerwise.rows.cost.grouped_is_cheaper`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import probe
from layerwise.ops.base import Call
from layerwise.ops.conv import ConvSlot, slots
from layerwise.rows import contract
from layerwise.rows import cost as costs
from layerwise.rows.base import Rows, Samples, Windows

LAYERS = [  # N, channels in, channels out, places along an axis, kernel, stride, padding
    (64, 3, 16, 32, 3, 1, 1), (64, 16, 16, 32, 3, 1, 1), (64, 16, 32, 32, 3, 2, 1), (64, 32, 32, 16, 3, 1, 1),
    (64, 16, 32, 32, 1, 2, 0), (64, 32, 64, 16, 3, 2, 1), (64, 64, 64, 8, 3, 1, 1),
    (128, 3, 64, 32, 5, 1, 0), (128, 64, 96, 13, 3, 1, 0), (128, 96, 128, 5, 3, 1, 1),
    (32, 3, 96, 32, 3, 1, 1), (32, 96, 96, 32, 3, 1, 1), (32, 96, 96, 32, 3, 2, 1), (32, 96, 192, 16, 3, 1, 1),
    (32, 192, 192, 16, 3, 2, 1), (32, 192, 192, 8, 3, 1, 1), (32, 192, 192, 8, 3, 1, 0), (32, 192, 192, 6, 1, 1, 0),
]  # fmt: skip


def rows_of(layer: tuple[int, ...]) -> tuple[Callable[[bool], Rows], Callable[[], Tensor]]:
    """The rows of one layer, grouped or not, and its plain gradient."""
    n, i, o, size, kernel, stride, padding = layer
    torch.manual_seed(0)
    x, w = torch.randn(n, i, size, size), torch.randn(o, i, kernel, kernel, requires_grad=True)
    z = F.conv2d(x, w, None, stride, padding)
    g = torch.randn_like(z)
    (slot,) = slots(Call(torch.conv2d, (x, w, None, stride, padding), {}, z.shape), [w])
    assert isinstance(slot, ConvSlot)

    def rows(grouped: bool) -> Rows:
        found = slot.rows(g[None], Samples(n, 0))
        assert isinstance(found, Windows)
        return Windows(found.make, found.g, found.size_in, slot.grouped if grouped else None)

    def plain() -> Tensor:
        return torch.autograd.grad(z, w, g, retain_graph=True)[0]

    return rows, plain


def _contracted(function: Callable[[Rows], Tensor], rows: Callable[[bool], Rows], grouped: bool) -> Tensor:
    return function(rows(grouped))


def main() -> None:
    """Print the table."""
    options = probe.parsed(probe.parser("benchmarks.speed.convolutions", __doc__, repeats=9))
    titles = ("plain", "rows", "rows grouped", "moment", "moment grouped")
    print(f"{'N, I, O, size, kernel, stride, padding':40}{'rule':>9}" + "".join(f"{t:>16}" for t in titles))
    for layer in LAYERS:
        rows, plain = rows_of(layer)
        runs: dict[str, Callable[[], object]] = {
            "plain": plain,
            "rows": partial(_contracted, contract.per_sample, rows, False),
            "rows grouped": partial(_contracted, contract.per_sample, rows, True),
            "moment": partial(_contracted, contract.second_moment, rows, False),
            "moment grouped": partial(_contracted, contract.second_moment, rows, True),
        }
        low = probe.interleaved(runs, options.repeats)
        _, _, t, _, o = (found := rows(False)).g.shape
        rule = "grouped" if costs.grouped_is_cheaper(t, o, found.size_in) else "windows"
        print(f"{layer!s:40}{rule:>9}" + "".join(f"{1e3 * low[t]:16.2f}" for t in titles), flush=True)


if __name__ == "__main__":
    main()
