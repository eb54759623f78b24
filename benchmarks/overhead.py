"""What observing costs: CPU time of (gradient + quantity) / gradient, one thread, interleaved.

    python -m benchmarks.overhead [--repeats 21] [--only mlp] [--json]

Every repeat runs the plain gradient and all variants once, forwards and backwards in turn; the number is
the lower quartile of a variant's CPU time over that of the plain gradient's. `--json` writes
`benchmarks/results/overhead.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw

from .timing import interleaved

RESULTS = Path(__file__).parent / "results" / "overhead.json"

QUANTITIES: dict[str, Callable[[], tuple[lw.Quantity, ...]]] = {
    "empty observe": lambda: (),
    "per-sample gradient": lambda: (lw.PerSampleGrad(),),
    "norms": lambda: (lw.SquaredNorm(),),
    "second moment": lambda: (lw.SecondMoment(),),
    "variance": lambda: (lw.Variance(),),
    "four first-order ones": lambda: (lw.PerSampleGrad(), lw.SquaredNorm(), lw.SecondMoment(), lw.Variance()),
    "GGN diagonal, 1 sample": lambda: (lw.DiagGGN(samples=1),),
    "GGN diagonal, exact": lambda: (lw.DiagGGN(),),
    "K-FAC, 1 sample": lambda: (lw.KFAC(samples=1),),
}


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """784-1000-500-250-10, batch 128."""
    sizes = (784, 1000, 500, 250, 10)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), torch.randn(128, 784), torch.randint(10, (128,))


def net_3c3d() -> tuple[nn.Module, Tensor, Tensor]:
    """Three convolutions, three linear layers, on 3x32x32, batch 32."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(64, 96, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip
    return model, torch.randn(32, 3, 32, 32), torch.randint(10, (32,))


MODELS = {"mlp": mlp, "3c3d": net_3c3d}


def _step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for p in model.parameters():
        p.grad = None
    F.cross_entropy(model(x), y).backward()


def _observed(model: nn.Module, x: Tensor, y: Tensor, make: Callable[[], tuple[lw.Quantity, ...]]) -> None:
    quantities = make()
    with lw.observe(model, *quantities) as seen:
        _step(model, x, y)
    for q in quantities:
        _ = seen[q]


def measure(name: str, repeats: int, only: Sequence[str] = ()) -> dict[str, float]:
    """Ratios to the plain gradient by quantity; `plain` holds the gradient's CPU seconds."""
    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    runs: dict[str, Callable[[], None]] = {
        "plain": lambda: _step(model, x, y),
        "nothing active": lambda: _step(model, x, y),
    }
    for label, make in QUANTITIES.items():
        if not only or label in only:
            runs[label] = lambda make=make: _observed(model, x, y, make)  # type: ignore[misc]
    quartile = interleaved(runs, repeats)  # its first round also measures where the samples lie
    plain = quartile.pop("plain")
    return {"plain": plain, **{label: value / plain for label, value in quartile.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="repeats of every variant (at least 15 to report)")
    parser.add_argument("--only", choices=list(MODELS), help="one model")
    parser.add_argument("--quantity", action="append", default=[], choices=list(QUANTITIES), help="some quantities")
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = [options.only] if options.only else list(MODELS)
    found = {name: measure(name, options.repeats, options.quantity) for name in names}
    print(f"{'(gradient + quantity) / gradient':34}" + "".join(f"{name:>10}" for name in names))
    for label in next(iter(found.values())):
        cells = (f"{found[n][label] * 1e3:8.1f}ms" if label == "plain" else f"{found[n][label]:10.2f}" for n in names)
        print(f"{label:34}" + "".join(cells))
    if options.json:
        header = {
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "layerwise": lw.__version__,
            "threads": torch.get_num_threads(),
            "repeats": options.repeats,
            "statistic": "lower quartile of CPU time, interleaved, alternating order",
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"header": header, "ratios": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
