"""A pilot of new combinations: norm balls, whitening, a rule for T, Polyak's targets, other optimizers behind.

    python -m benchmarks.training.locoprop.combinations [--out benchmarks/results/combinations.json]

Declared beforehand: three rates a method on seed 0, each for the same seconds of processor time on one thread (steps
alone, whatever else runs on the machine); the best rate again on seed 1, which is reported beside it. Prints its
budget first. Runs already in the file are not run again. SOAP is that of the package pytorch_optimizer; without it
its rows are left out.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import layerwise as lw
from benchmarks import probe
from benchmarks.training.locoprop.schedule_free import ScheduleFreeAdamW
from benchmarks.training.problem import mean_loss
from benchmarks.training.problems import PROBLEMS
from layerwise import local

__all__ = [
    "ADAM", "LOCAL", "METHODS", "RATES", "Muon", "batches", "before", "chosen", "main", "plain", "run", "run_missing",
]  # fmt: skip

PROBLEM, SECONDS = "text-transformer", 12.0
# The settings that the study chose for each method on this problem, and rates a factor of two or three apart, around
# the best of an earlier pilot.
LOCAL: dict[str, Any] = {"gamma": 31_300.0, "steps": 4, "momentum": 0.9457, "lr": 5.68e-4}
ADAM: dict[str, Any] = {"betas": (0.777, 0.999), "eps": 5.31e-5, "fused": True}
SOAP: dict[str, Any] = {"betas": (0.777, 0.99677), "weight_decay": 0.0, "precondition_frequency": 10}
_ADAM, _MUON, _SOAP = (5e-3, 1e-2, 2e-2), (0.037, 0.073, 0.15), (6.5e-3, 1.3e-2, 2.6e-2)
_LOCAL = (5.7e-4, 1.1e-3, 2.3e-3)
RATES = {
    "adam": _ADAM, "schedule-free adamw": _ADAM, "soap": _SOAP, "muon": _MUON, "locoprop-m": _LOCAL,
    "spectral T=1": (0.01, 0.03, 0.1), "spectral T=3": (0.03, 0.1, 0.3), "spectral T=3 > momentum": (0.03, 0.1, 0.3),
    "locoprop-m > adamw": (2.5e-3, 5e-3, 1e-2), "locoprop-m > soap": _SOAP, "locoprop-m > muon": _MUON,
    "locoprop-m whitened": _LOCAL, "locoprop-m whitened > muon": _MUON, "whitened T=1 with momentum": (0.03, 0.1, 0.2),
    "locoprop-m T by decrease": _LOCAL, "locoprop-m polyak": _LOCAL,
}  # fmt: skip
Closure = Callable[[], Tensor]
Step = Callable[[Closure], Tensor]


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` for matrices and filters, in float32, and Adam for what is left.

    torch's own runs in bfloat16, for which processors without such units take many times as long.
    """

    def __init__(self, model: nn.Module, lr: float, momentum: float = 0.777, rest_lr: float = 3e-3) -> None:
        super().__init__(list(model.parameters()), {"lr": lr, "momentum": momentum})
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        params = list(model.parameters())
        self._matrices = [p for p in params if p.dim() > 1 and id(p) not in tables]
        rest = [p for p in params if p.dim() < 2 or id(p) in tables]
        self._adam = torch.optim.Adam(rest, lr=rest_lr, betas=(0.9, 0.95))
        self._ball = local.SpectralNorm(adjust="original", dtype=None)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move all parameters along their gradients."""
        lr, momentum = self.param_groups[0]["lr"], self.param_groups[0]["momentum"]
        for p in self._matrices:
            if p.grad is None:
                continue
            average = self.state[p].setdefault("average", torch.zeros_like(p))
            average.lerp_(p.grad, 1 - momentum)
            change = self._ball.lowest(p.grad.lerp(average, momentum).flatten(1)[None], p)
            p.add_(change.view_as(p), alpha=lr)
        self._adam.step()


def plain(optimizer: torch.optim.Optimizer) -> Step:
    def step(closure: Closure) -> Tensor:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        loss = closure()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def before(first: lw.LocoProp, optimizer: torch.optim.Optimizer) -> Step:
    """The local result as the gradient of another optimizer."""

    def step(closure: Closure) -> Tensor:
        loss = first.step(closure)
        optimizer.step()
        return loss

    return step


def _locoprop(model: nn.Module, **words: Any) -> lw.LocoProp:
    return lw.LocoProp(model, **{**LOCAL, **words})


def _ball(model: nn.Module, rate: float, steps: int, write: Any = "weights") -> lw.LocoProp:
    ball = local.SpectralNorm(rate, adjust="original", dtype=None)
    solver = local.ConditionalGradient(steps)
    return lw.LocoProp(model, gamma=LOCAL["gamma"], regularizer=ball, solver=solver, lr=1.0, write=write)


def _soap(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP as Soap  # with the benchmarks' requirements

    found: torch.optim.Optimizer = Soap(model.parameters(), lr=lr, **SOAP)
    return found


class _Averaging:
    """Steps of schedule-free AdamW; `finish` puts its average into the model."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self._optimizer = ScheduleFreeAdamW(model.parameters(), lr, betas=(0.9, 0.999), eps=ADAM["eps"])
        self._step = plain(self._optimizer)

    def __call__(self, closure: Closure) -> Tensor:
        return self._step(closure)

    def finish(self) -> None:
        """Put the average into the model."""
        self._optimizer.average()


def _has_soap() -> bool:
    return importlib.util.find_spec("pytorch_optimizer") is not None


def _running_foof(model: nn.Module, lr: float) -> lw.LocoProp:
    """One gradient step a batch in the metric of the inputs, with momentum."""
    solver = local.LocalSteps(1, partial(torch.optim.SGD, momentum=0.9), "all")
    return lw.LocoProp(model, target=local.GradientStep(1.0), solver=solver, regularizer=local.Whitening(), lr=lr)


METHODS: dict[str, Callable[[nn.Module, float], Step]] = {
    "adam": lambda m, lr: plain(torch.optim.Adam(m.parameters(), lr=lr, **ADAM)),
    "schedule-free adamw": _Averaging,
    "soap": lambda m, lr: plain(_soap(m, lr)),
    "muon": lambda m, lr: plain(Muon(m, lr)),
    "locoprop-m": lambda m, lr: _locoprop(m, lr=lr).step,
    "spectral T=1": lambda m, r: _ball(m, r, 1).step,
    "spectral T=3": lambda m, r: _ball(m, r, 3).step,
    "spectral T=3 > momentum": lambda m, r: before(
        _ball(m, r, 3, "grad"), torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
    ),
    "locoprop-m > adamw": lambda m, lr: before(
        _locoprop(m, write="grad"), torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.0, **ADAM)
    ),
    "locoprop-m > soap": lambda m, lr: before(_locoprop(m, write="grad"), _soap(m, lr)),
    "locoprop-m > muon": lambda m, lr: before(_locoprop(m, write="grad"), Muon(m, lr)),
    "locoprop-m whitened": lambda m, lr: _locoprop(m, lr=lr, regularizer=local.Whitening()).step,
    "locoprop-m whitened > muon": lambda m, lr: before(
        _locoprop(m, write="grad", regularizer=local.Whitening()), Muon(m, lr)
    ),
    "whitened T=1 with momentum": lambda m, lr: _running_foof(m, lr).step,
    "locoprop-m T by decrease": lambda m, lr: (
        _locoprop(m, lr=lr, steps=16, solver=local.LocalSteps(16, stop=local.marginal_value)).step
    ),
    "locoprop-m polyak": lambda m, lr: (
        _locoprop(m, lr=lr, gamma=None, target=local.GradientStep(1.0, per=local.Polyak(over="net"))).step
    ),
}


def batches(rows: int, size: int, seed: int) -> Iterator[Tensor]:
    """Shuffled epochs for ever."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(10_000 * seed + epoch)
        yield from torch.randperm(rows, generator=generator).split(size)
        epoch += 1


def run(method: str, rate: float, seed: int) -> dict[str, Any]:
    """Train for the seconds; the train loss, the steps taken and the seconds of one."""
    problem = PROBLEMS[PROBLEM]
    torch.manual_seed(seed)
    split = problem.split(problem.rows)
    model = problem.model(seed, {})
    step = METHODS[method](model, rate)
    spent, count = 0.0, 0
    for index in batches(len(split.x), problem.batch, seed):
        x, y = split.x[index], split.y[index]
        start = time.process_time()
        step(partial(problem.loss, model, x, y))
        spent += time.process_time() - start
        count += 1
        if spent >= SECONDS:
            break
    if isinstance(step, _Averaging):
        step.finish()
    train, test = (mean_loss(problem, model, *pair) for pair in ((split.x, split.y), (split.x_test, split.y_test)))
    row = {"problem": PROBLEM, "method": method, "rate": rate, "seed": seed, "steps": count}
    return {**row, "seconds a step": round(spent / count, 4), "train": round(train, 4), "test": round(test, 4)}


def run_missing(
    out: Path, rates: Mapping[str, Sequence[float]], seeds: Sequence[int], seconds: float,
    run: Callable[[str, float, int], dict[str, Any]], loss: Callable[[dict[str, Any]], float], **same: Any,
) -> None:  # fmt: skip
    """Run what a file lacks: every rate of each method on the first seed, the best of them on the others.

    seconds: of a run. loss: of a row, by which rates are chosen. same: what all rows hold beside method, rate and seed.
    """
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = probe.read(out) if out.exists() else []
    runs = sum(len(tried) + len(seeds) - 1 for tried in rates.values())
    there = sum(same.items() <= row.items() for row in found)
    print(f"at most {seconds * runs / 60:.0f} minutes of a processor in steps; {there} of {runs} runs are there")

    def value(method: str, rate: float, seed: int) -> float:
        key = {**same, "method": method, "rate": rate, "seed": seed}
        row = next((r for r in found if key.items() <= r.items()), None)
        if row is None:
            row = run(method, rate, seed)
            found.append(row)
            probe.write(out, found)
            print(row, flush=True)
        return _rank(loss(row))

    for method, given in rates.items():
        tried = {rate: value(method, rate, seeds[0]) for rate in given}
        for seed in seeds[1:]:
            value(method, min(tried, key=tried.__getitem__), seed)


def _rank(loss: float) -> float:
    """A loss to choose by: NaN is the worst."""
    return loss if math.isfinite(loss) else math.inf


def chosen(
    found: Sequence[dict[str, Any]], loss: Callable[[dict[str, Any]], float]
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """By method, the runs of its best rate on seed 0, by which `run_missing` chose, all seeds."""
    best: dict[str, list[dict[str, Any]]] = {}
    for method in dict.fromkeys(row["method"] for row in found):
        own = [row for row in found if row["method"] == method]
        rate = min((row for row in own if row["seed"] == 0), key=lambda row: _rank(loss(row)))["rate"]
        best[method] = [row for row in own if row["rate"] == rate]
    return best


def main(out: Path) -> None:
    """Run what the file lacks."""
    methods = {name: rates for name, rates in RATES.items() if "soap" not in name or _has_soap()}
    run_missing(out, methods, (0, 1), SECONDS, run, lambda row: float(row["train"]), problem=PROBLEM)


if __name__ == "__main__":
    main(Path(sys.argv[2] if sys.argv[1:2] == ["--out"] else "benchmarks/results/combinations.json"))
