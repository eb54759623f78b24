"""A rate of 0 moves nothing, as with every optimizer of `torch.optim`: of all groups, of one, or from a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise import local
from layerwise.local.solvers.tf_rmsprop import TFRMSProp
from layerwise.optim.layer_local.choices import PRESETS, RECOVERIES

Make = Callable[[nn.Module], Any]


def _loco(**words: Any) -> Make:
    return lambda m: lw.LocoProp(m, **words)


def _altmin(**words: Any) -> Make:
    return lambda m: lw.AltMin(m, **words)


_BALL = local.FrobeniusNorm(0.1, around="zero")
MAKERS: dict[str, Make] = {
    **{f"LocoProp {preset}": _loco(preset=preset) for preset in [*PRESETS, *RECOVERIES]},
    "LocoProp Adam": _loco(solver=local.LocalSteps(3, torch.optim.Adam)),
    "LocoProp gram": _loco(solver=local.LocalSteps(3, torch.optim.SGD, "all", form="gram"), loss="squared"),
    "LocoProp decay": _loco(regularizer=local.WeightDecay(0.1)),
    "LocoProp ball": _loco(regularizer=_BALL),
    "LocoProp Frank-Wolfe": _loco(regularizer=_BALL, solver=local.ConditionalGradient(2)),
    "LocoProp Newton": _loco(solver=local.Newton()),
    "LocoProp in turn": _loco(order="output_to_input"),
    "LocoProp threads": _loco(workers=2),
    **{f"AltMin {weights}": _altmin(weights=weights) for weights in ("adam", "sgd", "memory")},
    "AltMin l1": _altmin(l1=0.01, codes="sweep"),
    "AltMin columns": _altmin(weights=local.Memory(solve="columns", recentre=False)),
    "AltMin async": _altmin(schedule="async"),
    "AltMin mac": _altmin(preset="mac"),
    "K-FAC": lambda m: lw.optim.KFAC(m, momentum=0.9, weight_decay=0.1, update_factors_every=1),
    "K-FAC quadratic": lambda m: lw.optim.KFAC(m, step_size="quadratic", adapt_damping_every=2),
    "DiagNewton": lambda m: lw.optim.DiagNewton(m, momentum=0.9, update_every=1),
}
every = pytest.mark.parametrize("name", MAKERS)


class Net(nn.Module):
    """Layers, a norm, and a parameter without a local problem."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.rate = nn.Parameter(torch.full((6,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x)) * self.rate.exp()))


def _step(model: nn.Module, opt: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
    opt.step(lambda: F.cross_entropy(model(x), y))


def _moved(model: nn.Module, act: Callable[[], None]) -> set[str]:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    act()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@every
@pytest.mark.parametrize("steps", [0, 2], ids=["from the start", "after two steps"])
def test_a_rate_of_zero_moves_nothing(name: str, steps: int) -> None:
    model = Net()
    opt = MAKERS[name](model)
    for seed in range(steps):
        assert _moved(model, lambda seed=seed: _step(model, opt, seed))  # type: ignore[misc]
    for group in opt.param_groups:
        group["lr"] = 0.0
    assert not _moved(model, lambda: [_step(model, opt, seed) for seed in range(5, 8)] and None)
    for group in opt.param_groups:
        group["lr"] = 1e-3
    assert _moved(model, lambda: _step(model, opt, 8)) and not opt.skipped


@pytest.mark.parametrize("preset", ["M", "S"])
def test_one_group_at_a_rate_of_zero_stands_still_alone(preset: str) -> None:
    model = Net()
    groups = [
        {"params": model.first.parameters()},
        {"params": [*model.norm.parameters(), *model.last.parameters(), model.rate]},
    ]
    opt = lw.LocoProp(model, groups, preset=preset)
    _step(model, opt, 0)
    opt.param_groups[0]["lr"] = 0.0
    assert _moved(model, lambda: _step(model, opt, 1)) == {n for n, _ in model.named_parameters() if "first" not in n}


def test_a_schedule_that_reaches_zero_ends_the_movement() -> None:
    model = Net()
    opt = lw.LocoProp(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: max(0.0, math.cos(epoch)))
    for seed in range(4):
        found = _moved(model, lambda seed=seed: _step(model, opt, seed))  # type: ignore[misc]
        assert bool(found) == (math.cos(seed) > 0)
        schedule.step()


@pytest.mark.parametrize("make", [TFRMSProp, torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_torchs_optimizers_and_ours_stand_still_while_their_state_advances(make: Any) -> None:
    p = torch.ones(3, requires_grad=True)
    words = {} if make is torch.optim.Adam else {"momentum": 0.9}
    opt = make([p], lr=0.1, **words)
    for rate in (0.1, 0.0):
        opt.param_groups[0]["lr"] = rate
        before, state = p.detach().clone(), {k: torch.as_tensor(v).clone() for k, v in opt.state[p].items()}
        p.grad = torch.arange(1.0, 4.0)
        opt.step()
        assert torch.equal(p, before) == (rate == 0)
        assert not all(torch.equal(torch.as_tensor(opt.state[p][k]), v) for k, v in state.items()) or not state
