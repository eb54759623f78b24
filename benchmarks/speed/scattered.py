"""Observations of samples that lie scattered, beside the same rows written the regular way.

python -m benchmarks.speed.scattered [--repeats 15]

CPU time of one step (forward, backward, quantity), one thread, interleaved, medians of ratios to the regular form; and
the same ratio of the plain step, without an observation. The medians are of one machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw

N, T, WIDTH, CLASSES = 32, 16, 256, 10
QUANTITIES = (lw.PerSampleGrad, lw.SecondMoment, lw.SquaredNorm)

Program = Callable[[], Tensor]


class _Net(nn.Module):
    """Two layers; experts between them where there is a route, and positions added where these are given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.place = nn.Embedding(T, WIDTH)
        self.register_buffer("places", torch.arange(T).expand(N, T))

    def forward(
        self, x: Tensor, route: Tensor | None = None, halves: bool = False, places: Tensor | None = None
    ) -> Tensor:
        h = self.first(x).tanh()
        if places is not None:
            h = h + self.place(places)
        if halves:
            h = torch.cat([expert(half) for expert, half in zip(self.experts, h.chunk(2, 1), strict=True)], 1)
        if route is not None:
            out = torch.zeros_like(h)
            for i, expert in enumerate(self.experts):
                out[route == i] = expert(h[route == i])
            h = out
        return self.head(h)


def _programs() -> tuple[nn.Module, dict[str, tuple[Program, Program]]]:
    """A net, and pairs of losses: the regular form and the scattered one."""
    torch.manual_seed(0)
    net = _Net()
    x, y = torch.randn(N, T, WIDTH), torch.randint(CLASSES, (N, T))
    label, lengths = y[:, 0], [T // 2, T + T // 2] * (N // 2)
    flat, segment = x.flatten(0, 1), torch.arange(N).repeat_interleave(torch.tensor(lengths))
    keep, masks = torch.rand(N, T) < 0.7, itertools.cycle(torch.rand(200, N, T) < 0.7)
    routes, shared = itertools.cycle(torch.randint(2, (200, N, T))), torch.arange(T)[None]

    def terms(logits: Tensor, targets: Tensor = y) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    def pooled() -> Tensor:
        hidden = net.first(flat).tanh()
        return F.cross_entropy(net.head(flat.new_zeros(N, WIDTH).index_add(0, segment, hidden)), label)

    def chosen(mask: Tensor) -> Tensor:
        return F.cross_entropy(net(x)[mask], y[mask])

    def ignored(mask: Tensor) -> Tensor:
        return terms(net(x), y.masked_fill(~mask, -100))

    return net, {
        "chunks of the batch": (lambda: terms(net(x)), lambda: terms(torch.cat([net(c) for c in x.chunk(4)]))),
        "chunks, beside chunks of positions": (
            lambda: terms(torch.cat([net(c) for c in x.chunk(4, 1)], 1)),
            lambda: terms(torch.cat([net(c) for c in x.chunk(4)])),
        ),
        "rows chosen before the loss": (lambda: ignored(keep), lambda: chosen(keep)),
        "the same, another mask in each batch": (lambda: ignored(next(masks)), lambda: chosen(next(masks))),
        "experts, routed anew in each batch": (
            lambda: terms(net(x, halves=True)),
            lambda: terms(net(x, next(routes))),
        ),
        "positions that all samples share": (
            lambda: terms(net(x, places=net.get_buffer("places"))),
            lambda: terms(net(x, places=shared)),
        ),
        "uneven segments": (lambda: F.cross_entropy(net.head(net.first(x).tanh().sum(1)), label), pooled),
    }


def _seconds(net: nn.Module, loss: Program, make: Callable[[], lw.Quantity] | None) -> float:
    net.zero_grad()
    start = time.process_time()
    with nullcontext() if make is None else lw.observe(net, make()):
        loss().backward()
    return time.process_time() - start


def _ratio(net: nn.Module, pair: tuple[Program, Program], make: Callable[[], lw.Quantity] | None, repeats: int) -> str:
    regular, scattered = pair
    ratios = [_seconds(net, scattered, make) / _seconds(net, regular, make) for _ in range(repeats + 3)]
    return f"{statistics.median(ratios[3:]):.2f}"


def main() -> int:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.scattered", description=main.__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    net, programs = _programs()
    names = [make.__name__ for make in QUANTITIES]
    sys.stdout.write(f"| program | plain step | {' | '.join(names)} |\n|---|{'---:|' * (len(names) + 1)}\n")
    for name, pair in programs.items():
        found = [_ratio(net, pair, make, repeats) for make in (None, *QUANTITIES)]
        sys.stdout.write(f"| {name} | {' | '.join(found)} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
