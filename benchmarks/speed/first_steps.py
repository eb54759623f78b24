"""CPU time of K-FAC's steps on ResNet-18, each in plain steps (forward, backward and SGD's update).

    python -m benchmarks.speed.first_steps [--threads 1] [--steps 6] [--size 64] [--batch 8] [--repeats 3]

Random images; nothing is trained. K-FAC with its defaults measures factors in steps 1, 2, 3, 5, 6, and inverts them in
1, 2, 3, 5: the first steps are the dearest. Each of them stands between two plain steps, whose mean it is divided by; a
figure is the lower quartile over repeats with new models.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from benchmarks import probe
from benchmarks.speed.overhead.nets import Block

__all__ = ["resnet18", "steps_in_plain_steps"]


def resnet18(classes: int = 10) -> nn.Module:
    """He et al. (2016), table 1, batch norm in evaluation mode."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    layers += [Block(*width) for width in (*widths, (512, 512, 1))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)).eval()


def steps_in_plain_steps(make: Callable[[], nn.Module], x: Tensor, y: Tensor, steps: int) -> tuple[list[float], float]:
    """K-FAC's steps in the order in which they come, in plain steps, and the seconds of a plain step."""
    models = make(), make()
    kfac, sgd = lw.optim.KFAC(models[0]), torch.optim.SGD(models[1].parameters(), 1e-3)

    def plain() -> float:
        start = time.process_time()
        sgd.zero_grad()
        F.cross_entropy(models[1](x), y).backward()
        sgd.step()
        return time.process_time() - start

    plain()
    between, found = [plain()], []
    for _ in range(steps):
        start = time.process_time()
        kfac.step(lambda: F.cross_entropy(models[0](x), y))
        found.append(time.process_time() - start)
        between.append(plain())
    return [2 * t / (a + b) for t, a, b in zip(found, between[:-1], between[1:], strict=True)], min(between)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    made = probe.parser("benchmarks.speed.first_steps", __doc__ or "", threads=1, repeats=3, steps=6, size=64, batch=8)
    options = probe.parsed(made, argv)
    torch.manual_seed(0)
    x, y = torch.randn(options.batch, 3, options.size, options.size), torch.arange(options.batch) % 10
    runs = [steps_in_plain_steps(resnet18, x, y, options.steps) for _ in range(options.repeats)]
    print(f"threads {options.threads}; a plain step takes {1e3 * min(plain for _, plain in runs):.0f} ms\n")
    rows = [[i + 1, f"{probe.lower_quartile([found[i] for found, _ in runs]):.1f}"] for i in range(options.steps)]
    print(probe.table(["K-FAC's step", "plain steps"], rows))


if __name__ == "__main__":
    main()
