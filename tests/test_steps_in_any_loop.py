"""Steps in loops of all kinds: a scaled loss that a closure returns, huge batches, parameters resized in between."""

from __future__ import annotations

import copy
from typing import Any

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


@pytest.mark.parametrize("at", range(2, 8))
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
def test_so_is_one_by_which_a_stale_layer_overshoots(scale: float, at: int) -> None:
    model = _model(dtype=torch.float32)
    opt = lw.AltMin(model, weights="sgd", schedule="async", staleness=2)
    skipped = []
    for seed in range(16):
        x, y = _batch(seed, torch.float32)
        x = x * scale if seed == at else x
        before = opt.skipped
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        skipped.append(opt.skipped - before)
    assert sum(skipped) <= 3 and not any(skipped[at + 6 :])  # none where no layer hears it


SHAPED = {
    "LocoProp": lambda m: lw.LocoProp(m, solver=lw.local.LocalSteps(optimizer=torch.optim.Adam, state="persistent")),
    "AltMin": lambda m: lw.AltMin(m, weights="sgd"),
    "K-FAC": lambda m: lw.optim.KFAC(m, update_factors_every=1, update_inverses_every=1),
    "DiagNewton": lambda m: lw.optim.DiagNewton(m, update_every=1),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", SHAPED)
def test_a_parameter_of_another_shape_than_its_state_is_refused(name: str, loaded: bool) -> None:
    """Before any kernel reads the state: one for the smaller shape would be read past its end."""
    model, (x, y) = _model(), _batch(0)
    opt = SHAPED[name](model)
    opt.step(lambda: F.cross_entropy(model(x), y))
    if loaded:
        state, opt = opt.state_dict(), SHAPED[name](model)
        opt.load_state_dict(state)
    with torch.no_grad():  # smaller, so that even unrefused nothing is read that is not there
        model[2].weight.data, model[2].bias.data = model[2].weight[:2].clone(), model[2].bias[:2].clone()
    before = _flat(model)
    with pytest.raises(
        lw.errors.BadInput, match=r"2\.weight was of shape \(3, 8\).*is of shape \(2, 8\) now; make a new"
    ):
        opt.step(lambda: F.cross_entropy(model(x), y.clamp(max=1)))
    assert torch.equal(_flat(model), before)


NESTED = {
    "a factor that is missing": (("blocks", "0.weight", "inverse", "A"), "gone"),
    "a factor without its matrix": (("blocks", "0.weight", "B"), None),
    "an inverse without its marks": (("blocks", "0.weight", "inverse", "kept"), "gone"),
    "an inverse that is a list": (("blocks", "0.weight", "inverse"), []),
    "a matrix of two sizes": (("blocks", "0.weight", "size"), [1, 8]),
    "axes that are none": (("blocks", "0.weight", "axes"), None),
    "a count of NaN": (("blocks", "0.weight", "batches"), float("nan")),
    "draws that are a word": (("draws",), "many"),
}


@pytest.mark.parametrize("name", NESTED)
def test_a_preconditioner_refuses_what_its_state_cannot_hold(name: str) -> None:
    path, value = NESTED[name]
    model, (x, y) = _model(), _batch(0)
    pre = lw.optim.Preconditioner(model, update_factors_every=1)
    with pre.watch():
        F.cross_entropy(model(x), y).backward()
    pre.step()
    state = copy.deepcopy(pre.state_dict())
    pre.load_state_dict(state)
    place: Any = state
    for key in path[:-1]:
        place = place[key]
    if value == "gone":
        del place[path[-1]]
    else:
        place[path[-1]] = value
    before = pre.blocks
    with pytest.raises(lw.errors.BadInput, match=str(value) if value == "many" else r"0\.weight"):
        pre.load_state_dict(state)
    assert pre.blocks is before


@pytest.mark.parametrize("key, value", [("a", torch.zeros(12, 2, 6)), ("target", None), ("gamma", -1.0)])
def test_stale_layers_refuse_minibatches_of_another_shape(key: str, value: object) -> None:
    model, (x, y) = _model(), _batch(0)
    opt = lw.AltMin(model, schedule="async")
    opt.step(lambda: F.cross_entropy(model(x), y))
    state = copy.deepcopy(opt.state_dict())
    state["stale"]["heard"][0]["0.weight"][key] = value
    with pytest.raises(lw.errors.BadInput, match=r"of a minibatch of 0\.weight is"):
        opt.load_state_dict(state)


@pytest.mark.parametrize("words", [{}, {"codes": "sweep"}], ids=str)
def test_parts_of_tensors_of_their_own_are_one_batch_where_their_number_is_said(words: dict[str, str]) -> None:
    model, (x, y) = _model(), _batch(0)
    parts = [(a.clone(), b.clone()) for a, b in zip(x.chunk(3), y.chunk(3), strict=True)]
    other = copy.deepcopy(model)
    lw.AltMin(model, rows="all", **words).step(lambda: F.cross_entropy(model(x), y))  # type: ignore[arg-type]
    opt = lw.AltMin(other, rows="all", **words)  # type: ignore[arg-type]
    before = _flat(other)
    loss = opt.step(lambda: torch.stack([F.cross_entropy(other(a), b) for a, b in parts]).sum() / 3, samples=12)
    assert torch.isfinite(loss)
    assert float((_flat(model) - _flat(other)).norm() / (_flat(model) - before).norm()) < 1e-10


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaler_goes_on_after_a_non_finite_batch_was_caught(unscaled: bool) -> None:
    """As the page on trainers says."""
    model, scaler = _model(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    pre = lw.optim.Preconditioner(model, on_nonfinite="raise")
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    caught = 0
    for seed in range(3):
        x, y = _batch(seed)
        opt.zero_grad()
        try:
            with pre.watch():
                scaler.scale(F.cross_entropy(model(x * float("inf") if seed == 1 else x), y)).backward()
            if unscaled:
                scaler.unscale_(opt)
            pre.step()
        except lw.errors.NonFinite:
            caught += 1
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        else:
            scaler.step(opt)
            scaler.update()
    assert caught == 1 and scaler.get_scale() == 512 and torch.isfinite(_flat(model)).all()


def test_a_stage_without_a_layer_says_so() -> None:
    x, _ = _batch(0, torch.float32)
    opt = lw.distributed.Pipeline(lw.distributed.Stage({"0": nn.LayerNorm(6), "1": nn.PReLU()}))
    with pytest.raises(lw.errors.BadInput, match=r"the stage of 0\.weight, 0\.bias, 1\.weight has no layer"):
        opt.step(x, lambda out: F.mse_loss(out, x))
    assert opt.skipped == 0
