"""A step is whole or has not happened; a finite batch never ends a model; parameters may change in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from benchmarks import faults

every = pytest.mark.parametrize("name", faults.OPTIMIZERS)


# Whole steps ------------------------------------------------------------------------------------------------------


@every
def test_an_operation_that_raises_takes_the_step_back(name: str) -> None:
    make = faults.OPTIMIZERS[name]
    found = faults.tried(make, every=max(1, faults.count(make) // 12), first=1)
    assert found.tried >= 9 and not found.failed


@every
def test_an_interrupt_between_two_lines_takes_the_step_back(name: str) -> None:
    make = faults.OPTIMIZERS[name]
    found = faults.tried(make, lines=True, every=max(1, faults.count(make, lines=True) // 6), first=3)
    assert found.tried >= 5 and not found.failed


@pytest.mark.slow
@every
def test_each_operation_that_raises_takes_the_step_back(name: str) -> None:
    assert not faults.tried(faults.OPTIMIZERS[name]).failed


def test_the_injector_finds_a_step_that_is_half_made() -> None:
    class Halves(lw.LocoProp):
        def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
            loss = super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(0.9)
            return loss

    total = faults.count(lambda m: Halves(m))
    assert faults.tried(lambda m: Halves(m), first=total - 3).failed


@pytest.mark.parametrize("quantities", [(lw.SecondMoment(),), (lw.DiagHessian(),)], ids=["once", "twice"])
def test_an_interrupt_on_the_way_in_leaves_no_mode_and_no_hook(quantities: Any) -> None:
    model, x, y = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2), torch.tensor([1])
    place = 0
    while True:
        place += 1
        context, fault = lw.observe(model, *quantities), faults.Lines(place)
        try:
            with fault:
                context.__enter__()
            break
        except KeyboardInterrupt:
            assert not faults.left_over(model), place
            with context as seen:
                F.cross_entropy(model(x), y).backward()
            assert torch.isfinite(seen.grad["0.weight"]).all() and not faults.left_over(model)
    context.__exit__(None, None, None)
    assert place > 20 and not faults.left_over(model)


# Finite batches ---------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("scale", [1e5, 1e10, 1e15, 1e18, 1e20, 1e25, 1e30, 1e37])
@pytest.mark.parametrize("norm", [True, False], ids=["batch norm", ""])
def test_a_finite_batch_never_ends_a_model(name: str, scale: float, norm: bool) -> None:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(6)] if norm else []
    model = nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    opt = faults.OPTIMIZERS[name](model)
    y = torch.randint(3, (8,))

    def step(x: Tensor) -> None:
        opt.step(lambda: F.cross_entropy(model(x), y))

    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 4, generator=generator)
        x[0] *= scale if seed in (1, 3) else 1.0
        step(x)
        assert all(bool(torch.isfinite(p).all()) for p in (*model.parameters(), *model.buffers()))
    skipped = opt.skipped
    for seed in range(6, 9):
        step(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)))
    assert opt.skipped == skipped
