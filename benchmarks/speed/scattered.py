"""Observations of samples that lie scattered, beside the same rows written the regular way.

python -m benchmarks.speed.scattered [--repeats 15]

CPU time of one step (forward, backward, quantity), one thread, interleaved, medians of ratios to the regular form.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw

N, T, WIDTH, CLASSES = 32, 16, 256, 10


def _programs() -> tuple[nn.Module, dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]]:
    """A net of two layers, and pairs of losses: the regular form and the scattered one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    x, y = torch.randn(N, T, WIDTH), torch.randint(CLASSES, (N, T))
    keep = torch.rand(N, T) < 0.7
    ignored = y.masked_fill(~keep, -100)
    label, lengths = y[:, 0], [T // 2, T + T // 2] * (N // 2)
    flat, segment = x.flatten(0, 1), torch.arange(N).repeat_interleave(torch.tensor(lengths))

    def pooled() -> Tensor:
        hidden = net[1](net[0](flat))
        return F.cross_entropy(net[2](flat.new_zeros(N, WIDTH).index_add(0, segment, hidden)), label)

    return net, {
        "chunks of the batch": (
            lambda: F.cross_entropy(net(x).flatten(0, 1), y.flatten()),
            lambda: F.cross_entropy(torch.cat([net(c) for c in x.chunk(4)]).flatten(0, 1), y.flatten()),
        ),
        "rows chosen before the loss": (
            lambda: F.cross_entropy(net(x).flatten(0, 1), ignored.flatten()),
            lambda: F.cross_entropy(net(x)[keep], y[keep]),
        ),
        "uneven segments": (lambda: F.cross_entropy(net[2](net[1](net[0](x)).sum(1)), label), pooled),
    }


def _seconds(net: nn.Module, loss: Callable[[], Tensor], make: Callable[[], lw.Quantity]) -> float:
    net.zero_grad()
    start = time.process_time()
    with lw.observe(net, make()):
        loss().backward()
    return time.process_time() - start


def main() -> int:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.scattered", description=main.__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    net, programs = _programs()
    sys.stdout.write("| program | quantity | ratio to the regular form |\n|---|---|---:|\n")
    for name, (regular, scattered) in programs.items():
        for make in (lw.PerSampleGrad, lw.SecondMoment, lw.SquaredNorm):
            ratios = []
            for _ in range(repeats + 2):
                ratios.append(_seconds(net, scattered, make) / _seconds(net, regular, make))
            sys.stdout.write(f"| {name} | {make.__name__} | {statistics.median(ratios[2:]):.2f} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
