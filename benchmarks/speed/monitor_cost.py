"""CPU time of a watched training step over that of a plain one, by measure.

    python -m benchmarks.speed.monitor_cost [--repeats 25] [--nets digits 3c3d] [--json FILE]

A plain step is forward, backward and Adam, without the library. Each arm watches steps of a model and an optimizer of
its own; all take turns on one batch of random data, the demo's digits autoencoder with 120 images and 3C3D with 128. A
figure is the lower quartile of an arm's CPU times over that of the plain step. Records go nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from benchmarks import probe
from benchmarks.speed.overhead.nets import NETS
from layerwise.demo.digits import autoencoder, reconstruction_loss
from layerwise.monitor import Measure, Monitor

MEASURES: dict[str, Callable[[], tuple[Measure, ...]]] = {
    "not due": lw.monitor.default,
    "loss, norms, updates": lambda: lw.monitor.default()[:4],
    "noise_scale": lambda: (lw.monitor.noise_scale(),),
    "signal_to_noise": lambda: (lw.monitor.signal_to_noise(),),
    "alignment": lambda: (lw.monitor.alignment(),),
    "curvature": lambda: (lw.monitor.curvature(),),
    "largest_eigenvalue": lambda: (lw.monitor.largest_eigenvalue(),),
    "default": lw.monitor.default,
}

Problem = tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]


def problems() -> dict[str, Problem]:
    """Models and losses by name."""
    torch.manual_seed(0)
    x = torch.rand(120, 64)
    images, labels = NETS["3c3d"].data(128)
    return {
        "digits": (lambda: autoencoder(0), lambda model: reconstruction_loss(model, x)),
        "3c3d": (NETS["3c3d"].make, lambda model: F.cross_entropy(model(images), labels)),
    }


def ordinary(make: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor], monitor: Any) -> Callable[[], None]:
    """A step of Adam inside what `monitor(model)` gives."""
    model = make()
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    watched: Callable[[], AbstractContextManager[Any]] = monitor(model)

    def step() -> None:
        with watched():
            value = loss(model)
            opt.zero_grad()
            value.backward()
            opt.step()

    return step


def watch(name: str) -> Callable[[nn.Module], Callable[[], AbstractContextManager[Any]]]:
    """The context of a measure's arm."""

    def of(model: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
        monitor = Monitor(model, lambda step, record: None, measures=MEASURES[name](), every=1)
        if name == "not due":
            monitor = Monitor(model, lambda step, record: None, every=10**9)
            monitor.steps = 1
        return monitor.step

    return of


def measured(make: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor], repeats: int) -> dict[str, float]:
    """Ratios to the plain step."""
    arms = {"plain": ordinary(make, loss, lambda model: nullcontext)}
    arms |= {name: ordinary(make, loss, watch(name)) for name in MEASURES}
    times = probe.interleaved(arms, repeats, warm_up=3)
    return {name: seconds / times["plain"] for name, seconds in times.items()}


def main() -> None:
    """Measure and print."""
    nets = ["digits", "3c3d"]
    given = probe.parsed(probe.parser("benchmarks.speed.monitor_cost", __doc__, repeats=25, nets=nets, json=None))
    found = {name: measured(*problem, given.repeats) for name, problem in problems().items() if name in given.nets}
    for name, ratios in found.items():
        print(name, *(f"{arm}: {ratio:.2f}" for arm, ratio in ratios.items()), sep="\n  ")
    if given.json:
        probe.write(given.json, found)


if __name__ == "__main__":
    main()
