"""CPU time of a training step with each of our optimizers, against torch's Adam and RMSProp.

    python -m benchmarks.step_cost [--threads 1] [--repeats 15] [--problem mnist|digits|both] [--json FILE]

Whole steps: forward, backward and update. Two autoencoders: the deep one of MNIST (random pixels, batch 1000,
784-1000-500-250-30 and back) and the small one of scikit-learn's digits (random pixels, batch 100,
64-128-64-16 and back), where the calls cost more than the arithmetic. Nothing is learnt from random
pixels; only the time counts. Arms are interleaved in alternating order, a figure is the lower quartile.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import layerwise as lw
from benchmarks import autoencoder
from benchmarks.timing import interleaved
from layerwise.demo import problem as digits

Step = Callable[[], Any]

NEVER = 10**9  # steps: beyond the first

OURS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "LocoProp-M": lw.LocoProp,
    "LocoProp-M, all rows": lambda model: lw.LocoProp(model, rows="all"),
    "LocoProp-S": lambda model: lw.LocoProp(model, loss="squared"),
    "AltMin (Adam)": lw.AltMin,
    "AltMin (SGD)": lambda model: lw.AltMin(model, weights="sgd"),
    "AltMin (sweep)": lambda model: lw.AltMin(model, codes="sweep"),
    "KFAC, no factors due": lambda model: lw.optim.KFAC(model, update_factors_every=NEVER, update_inverses_every=NEVER),
    "KFAC, new factors": lambda model: lw.optim.KFAC(model, update_factors_every=1, update_inverses_every=NEVER),
    "KFAC, new factors and inverses": lambda model: lw.optim.KFAC(
        model, update_factors_every=1, update_inverses_every=1
    ),
}
PROBLEMS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, int]]] = {
    "mnist": (autoencoder.deep_autoencoder, (1000, autoencoder.SIZES[0])),
    "digits": (digits.autoencoder, (100, digits.SIZES[0])),
}


def ordinary(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        autoencoder.reconstruction_loss(model, x).backward()
        optimizer.step()

    return step


def layer_local(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Step:
    return lambda: optimizer.step(lambda: autoencoder.reconstruction_loss(model, x))  # type: ignore[arg-type, return-value]


def arms_of(name: str) -> dict[str, Step]:
    """A step of each optimizer, each with a model of its own."""
    make, shape = PROBLEMS[name]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    models = [make(0) for _ in range(len(OURS) + 2)]
    arms = {
        "Adam": ordinary(models[0], x, torch.optim.Adam(models[0].parameters(), 1e-3)),
        "RMSProp": ordinary(models[1], x, torch.optim.RMSprop(models[1].parameters(), 5e-4, momentum=0.9)),
    }
    arms |= {key: layer_local(m, x, build(m)) for (key, build), m in zip(OURS.items(), models[2:], strict=True)}
    return arms


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--problem", choices=[*PROBLEMS, "both"], default="both")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "torch": torch.__version__, "machine": platform.machine(), "threads": options.threads,
        "repeats": options.repeats, "seconds": {},
    }  # fmt: skip
    for name in PROBLEMS if options.problem == "both" else [options.problem]:
        found = interleaved(arms_of(name), options.repeats, warm_up=2)
        result["seconds"][name] = found
        print(f"{name}: threads {options.threads}, lower quartile of {options.repeats}, CPU time\n")
        print("| step | ms | Adam = 1 | RMSProp = 1 |\n|---|---:|---:|---:|")
        for arm, seconds in found.items():
            ratios = (seconds / found["Adam"], seconds / found["RMSProp"])
            print(f"| {arm} | {1e3 * seconds:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
        print()
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
