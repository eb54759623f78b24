"""Steps in loops of all kinds: a scaled loss that a closure returns, huge batches, parameters resized in between."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw

F64 = torch.float64


def _model(seed: int = 0, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def _batch(seed: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 6, generator=generator, dtype=dtype)
    return x, torch.randint(3, (12,), generator=generator)


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


RUN_AGAIN = {
    "a sweep": lambda m: lw.AltMin(m, codes="sweep", rows="all"),
    "Gauss-Newton codes": lambda m: lw.AltMin(m, weights="memory"),
    "the quadratic model": lambda m: lw.optim.KFAC(m, kind="kflr", step_size="quadratic"),
    "adapted damping": lambda m: lw.optim.KFAC(m, kind="kflr", adapt_damping_every=1),
    "layers in turn": lambda m: lw.LocoProp(m, order="output_to_input"),
}


@pytest.mark.parametrize("name", RUN_AGAIN)
@pytest.mark.parametrize("backward", [False, True])
def test_a_scaled_loss_of_a_closure_makes_the_step_of_the_loss(name: str, backward: bool) -> None:
    model, scaler = _model(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = copy.deepcopy(model)
    before = _flat(model)
    opt, other = RUN_AGAIN[name](model), RUN_AGAIN[name](plain)

    def scaled(x: Tensor, y: Tensor) -> Tensor:
        loss = scaler.scale(F.cross_entropy(model(x), y))
        if backward:
            opt.zero_grad()
            loss.backward()
        return loss

    for seed in range(2):
        x, y = _batch(seed)
        opt.step(lambda x=x, y=y: scaled(x, y))
        other.step(lambda x=x, y=y: F.cross_entropy(plain(x), y))
    assert float((_flat(model) - _flat(plain)).norm() / (_flat(plain) - before).norm()) < 1e-10


@pytest.mark.parametrize("words", [{}, {"weights": "sgd"}, {"codes": "sweep"}], ids=str)
def test_a_huge_batch_that_stale_layers_hear_later_is_let_go(words: dict[str, str]) -> None:
    model = _model(dtype=torch.float32)
    opt = lw.AltMin(model, schedule="async", staleness=2, **words)  # type: ignore[arg-type]
    skipped = []
    for seed in range(8):
        x, y = _batch(seed, torch.float32)
        x = x * 1e25 if seed == 2 else x
        before = opt.skipped
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        skipped.append(opt.skipped - before)
    assert sum(skipped) == 1 and not any(skipped[:3])  # when a layer first hears it
    assert opt.state_dict()["stale"]["steps"] == 7
