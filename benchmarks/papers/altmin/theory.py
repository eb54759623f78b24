"""The rate of stochastic alternating minimization: squared error against steps, with rates ∝ 1/t.

The theorem bounds the expected squared error of stochastic alternating gradient steps over blocks, on an objective
that is strongly convex and smooth near its minimum, by O((1/t)^{3/2} + 1/t). It says nothing of nets that are not
near a minimum, of constant rates, nor of momentum. Two problems with a known minimum:

- blocks: a random quadratic in two blocks with noisy gradients, the blocks moved in turn: the theorem's own setting.
- AltMin: `y = V W* x + noise`, V known and fixed, and AltMin on W by SGD without momentum, with Jacobi and with
  swept codes: strongly convex in W, with the same minimum for all couplings.

Source: Choromanska et al. (2019), theorem 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw

from .common import Demonstration, picture

__all__ = ["DEMONSTRATION", "slope"]

Codes = Literal["jacobi", "sweep"]
SIZE, RUNS, STEPS = 6, 200, 30_000
NET_RUNS, NET_STEPS, BATCH = 5, 3_000, 10


def slope(steps: list[int], errors: list[float]) -> float:
    """The least-squares slope of log error against log step over the last decade of steps."""
    points = [(math.log(t), math.log(e)) for t, e in zip(steps, errors, strict=True) if t >= steps[-1] / 10]
    t, e = (torch.tensor(v, dtype=torch.float64) for v in zip(*points, strict=True))
    t = t - t.mean()
    return float((t @ e) / (t @ t))


def _noted(steps: int) -> list[int]:
    """Steps spread evenly on a log scale."""
    return sorted({round(10 ** (k / 10)) for k in range(int(10 * math.log10(steps)) + 1)} | {steps})


def blocks(steps: int, runs: int) -> tuple[list[int], list[float]]:
    """Mean squared error of two blocks moved in turn on `½ θᵀHθ`, gradients with unit noise, rate 3/(t + 30)."""
    generator = torch.Generator().manual_seed(0)
    half = SIZE // 2
    root = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    hessian = root @ root.T / SIZE + 0.5 * torch.eye(SIZE, dtype=torch.float64)
    theta = torch.ones(runs, SIZE, dtype=torch.float64)
    noted, errors = _noted(steps), []
    for t in range(1, steps + 1):
        for block in (slice(0, half), slice(half, SIZE)):
            noise = torch.randn(runs, half, generator=generator, dtype=torch.float64)
            theta[:, block] -= 3 / (t + 30) * (theta @ hessian[:, block] + noise)
        if t in noted:
            errors.append(float(theta.square().sum(1).mean()))
    return noted, errors


def of_altmin(codes: Codes, steps: int, runs: int) -> tuple[list[int], list[float]]:
    """Mean squared error of W, rate 4/(t + 20)."""
    noted = _noted(steps)
    total = torch.zeros(len(noted), dtype=torch.float64)
    for seed in range(runs):
        total += torch.tensor(_one(codes, steps, seed, noted), dtype=torch.float64)
    return noted, (total / runs).tolist()


def _one(codes: Codes, steps: int, seed: int, noted: list[int]) -> list[float]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first, last = nn.Linear(4, 3, bias=False).double(), nn.Linear(3, 5, bias=False).double()
    model = nn.Sequential(first, last)
    with torch.no_grad():
        first.weight.copy_(normal(3, 4))
        last.weight.copy_(torch.linalg.qr(normal(5, 3)).Q)
    truth = normal(3, 4)
    groups = [{"params": [last.weight], "lr": 0.0}, {"params": [first.weight]}]  # V has a layer, and stays
    optimizer = lw.AltMin(model, groups, codes=codes, weights="sgd", momentum=0.0, coupling=1.0, steps=1, lr=0.1)
    errors = []
    for t in range(1, steps + 1):
        optimizer.param_groups[1]["lr"] = 4 / (t + 20)
        x = normal(BATCH, 4)
        y = x @ truth.T @ last.weight.detach().T + normal(BATCH, 5)
        optimizer.step(lambda: F.mse_loss(model(x), y, reduction="sum") / (2 * BATCH))  # noqa: B023
        if t in noted:
            errors.append(float((first.weight.detach() - truth).square().sum()))
    return errors


def measure(small: bool = False) -> dict[str, Any]:
    """Errors and slopes by problem."""
    curves = {"blocks in turn, a quadratic": blocks(*((1000, 50) if small else (STEPS, RUNS)))}
    size = (100, 1) if small else (NET_STEPS, NET_RUNS)
    curves["AltMin, Jacobi codes"] = of_altmin("jacobi", *size)
    curves["AltMin, swept codes"] = of_altmin("sweep", *size)
    return {
        "title": "squared error of stochastic alternating minimization, rates ∝ 1/t",
        "curves": {name: {"steps": t, "error": e, "slope": slope(t, e)} for name, (t, e) in curves.items()},
    }


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Errors against steps, both on log scales."""
    with picture(path) as (axes,):
        for name, curve in result["curves"].items():
            axes.plot(curve["steps"], curve["error"], label=f"{name}: slope {curve['slope']:.2f}")
        steps = result["curves"]["blocks in turn, a quadratic"]["steps"]
        late = [t for t in steps if t >= 100]
        axes.plot(late, [late[0] / t for t in late], color="grey", linestyle=":", label="1/t")
        axes.set(xlabel="steps", ylabel="mean squared error", xscale="log", yscale="log", title=result["title"])


def sentence(result: Mapping[str, Any]) -> str:
    """Slopes over the last decade."""
    said = [f"{name} {curve['slope']:.2f}" for name, curve in result["curves"].items()]
    return f"Log-log slope of the squared error over the last decade of steps (−1 is 1/t): {', '.join(said)}."


DEMONSTRATION = Demonstration(measure, draw, sentence)
