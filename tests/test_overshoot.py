"""Finite batches whose step makes a layer's own loss larger: the step is not taken, and training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from torch import Tensor, nn

import layerwise as lw
from layerwise.errors import Overshot
from layerwise.local import LocalSteps
from layerwise.local.layers.overshoot import StepTaken, has_bounded_steps, overshot
from layerwise.local.problem import LocalProblem, local_loss
from layerwise.local.transfer import TANH
from layerwise.optim.layer_local.altmin import AltMin


class Scaled(nn.Module):
    """A net with a parameter that has no code."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x) * self.scale.repeat(4)))


def relu(width: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(4, width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def halves() -> nn.Module:
    return relu(16, 1).bfloat16()


NETS: dict[str, Callable[[], nn.Module]] = {
    "ReLU, narrow": lambda: relu(6, 1), "ReLU, wide": lambda: relu(64, 2), "batch norm": normed,
    "convolution": convolution, "a parameter without a code": Scaled, "bfloat16": halves,
}  # fmt: skip
SGD = LocalSteps(optimizer=torch.optim.SGD)
MOMENTUM = LocalSteps(optimizer=partial(torch.optim.SGD, momentum=0.9))
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "AltMin": lambda m: lw.AltMin(m, weights="sgd"),
    "AltMin, sweep": lambda m: lw.AltMin(m, codes="sweep", weights="sgd"),
    "AltMin, threads": lambda m: lw.AltMin(m, weights="sgd", workers=2),
    "AltMin, without momentum": lambda m: lw.AltMin(m, weights="sgd", momentum=0.0),
    "LocoProp": lambda m: lw.LocoProp(m, solver=SGD, lr=1e-2),
    "LocoProp, squared loss": lambda m: lw.LocoProp(m, preset="S", solver=SGD, lr=1e-3),
    "LocoProp, momentum": lambda m: lw.LocoProp(m, solver=MOMENTUM, lr=1e-3),
    "LocoProp, in turn": lambda m: lw.LocoProp(m, solver=SGD, lr=1e-2, order="output_to_input"),
}


def batch(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))
    labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(77))
    return x.to(dtype), (x @ labels).argmax(1)


def loss(model: nn.Module, seed: int, factor: float = 1.0) -> Tensor:
    x, y = batch(seed, next(model.parameters()).dtype)
    return F.cross_entropy(model(x * factor).float(), y)


def trained(
    make: Callable[[nn.Module], Any], net: str, bad: dict[int, float], batches: int = 40
) -> tuple[nn.Module, Any, int]:
    """A net after some batches, some of them times a factor; its optimizer, and how many others were skipped."""
    torch.manual_seed(0)
    model = NETS[net]()
    opt, others = make(model), 0
    for seed in range(batches):
        skipped = opt.skipped
        opt.step(lambda seed=seed: loss(model, seed, bad.get(seed, 1.0)))
        others += (opt.skipped - skipped) if seed not in bad else 0
    return model, opt, others


@torch.no_grad()
def loss_on_others(model: nn.Module) -> float:
    return sum(float(loss(model, seed)) for seed in range(100, 110)) / 10


@one_in(
    15, name=OPTIMIZERS, net=NETS,
    scale=[3.0, 10.0, 15.0, 20.0, 22.0, 24.0, 26.0, 32.0, 50.0, 100.0, 1e3, 1e8, 1e12, 1e16, 1e30],
)  # fmt: skip
def test_a_model_trains_on_after_a_huge_batch_at_any_scale(name: str, net: str, scale: float) -> None:
    """Within 40 batches mostly; a step that grows a layer by less than is looked at may take 320 to make up for."""
    behind = []
    for batches in (40, 320):
        model, _, others = trained(OPTIMIZERS[name], net, {5: scale}, batches)
        behind.append(loss_on_others(model) - loss_on_others(trained(OPTIMIZERS[name], net, {}, batches)[0]))
        assert others <= 1
        if behind[-1] < 0.15:
            return
    pytest.fail(f"the loss is behind by {behind} after 40 and 320 batches")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("scale", [10.0, 20.0, 1e3, 1e12])
@pytest.mark.parametrize("when", [[0], [5, 6, 7], [*range(5, 15)]], ids=str)
def test_so_it_does_after_several(when: list[int], scale: float) -> None:
    model, _, others = trained(OPTIMIZERS["AltMin"], "ReLU, wide", dict.fromkeys(when, scale), 80)
    assert others <= 3
    assert loss_on_others(model) < 0.9


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_changes_no_parameter_and_drops_the_momentum_that_would_repeat_it(name: str) -> None:
    torch.manual_seed(0)
    model = NETS["ReLU, narrow"]()
    opt = OPTIMIZERS[name](model)
    for seed in range(3):
        opt.step(lambda seed=seed: loss(model, seed))
    before, held = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict()["state"])
    opt.step(lambda: loss(model, 3, 1e2))
    assert opt.skipped == 1
    assert "raised its own loss from" in opt.why_skipped()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    after = opt.state_dict()["state"]
    assert after.keys() < held.keys() or not held
    for key, own in after.items():
        assert all(torch.equal(own[k], v) for k, v in held[key].items() if isinstance(v, Tensor))


def test_it_is_an_error_where_asked_for() -> None:
    model = NETS["ReLU, narrow"]()
    opt = lw.AltMin(model, weights="sgd", on_nonfinite="raise")
    with pytest.raises(
        Overshot, match=r"the step of 0\.weight, which raised its own loss from .* changed no parameter"
    ):
        opt.step(lambda: loss(model, 0, 1e6))


@pytest.mark.parametrize("net", sorted(NETS))
def test_nothing_is_looked_at_on_ordinary_batches(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = trained(OPTIMIZERS["AltMin"], net, {})
    monkeypatch.setattr("layerwise.local.layers.overshoot._losses", lambda *_: pytest.fail("looked at a loss"))
    model, opt, _ = trained(OPTIMIZERS["AltMin"], net, {})
    assert opt.skipped == want[1].skipped == 0
    assert all(map(torch.equal, model.state_dict().values(), want[0].state_dict().values()))


def problem(weight: Tensor, bias: Tensor | None) -> LocalProblem:
    generator = torch.Generator().manual_seed(1)
    a, target = (torch.randn(7, 2, n, generator=generator, dtype=torch.float64) for n in (3, 5))
    return LocalProblem(a, weight, bias, target.tanh(), TANH)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("factor", [-1.1, 1.1, 1.3, -1.3, 5.0, -40.0, 1e9])
def test_the_losses_are_those_of_the_definition(factor: float, with_bias: bool) -> None:
    torch.manual_seed(0)
    old = [torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)][: 1 + with_bias]
    new = [t * factor for t in old]
    wanted = [float(local_loss(problem(*(ts if with_bias else [*ts, None])))) for ts in (old, new)]
    params = dict(zip("wb", [t.clone() for t in new], strict=False))
    made = StepTaken(params, old, lambda: problem(params["w"], params.get("b")))
    found = list(overshot([made]))
    assert bool(found) == (abs(factor) > 1.25 and wanted[1] > wanted[0])
    for _, words in found:
        first, last = (float(word) for word in words.split("from ")[1].split(" to "))
        assert [first, last] == pytest.approx(wanted, rel=1e-2)
    assert all(map(torch.equal, params.values(), new))


@pytest.mark.parametrize("loss", [2.0, -2.0])
@pytest.mark.parametrize("old", [1.0, 1e-6, 0.0])
def test_what_has_no_loss_of_its_own_may_grow_tenfold_or_to_where_a_quadratic_loss_is_as_large(
    old: float, loss: float
) -> None:
    for factor, slope, far in ((9.0, 1e9, False), (11.0, 0.99, False), (11.0, 1.01, True), (1e12, 0.99, False)):
        new = factor * (old or 1.0)
        before, p = torch.full((3,), old, dtype=torch.float64), torch.full((3,), new, dtype=torch.float64)
        gradient = (4 * slope * loss / (p - before).square().sum()) * (p - before)
        found = list(overshot([StepTaken({"p": p}, [before], None, (torch.tensor(loss), gradient))]))
        assert bool(found) == (far or (old == 0.0 and slope > 1))
        assert not found or f"grew its norm from {3**0.5 * old:.3g} to {3**0.5 * new:.3g}" in found[0][1]


class Gains(nn.Module):
    """A residual net whose gains and lone biases begin at one value."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.gain, self.bias = nn.Parameter(torch.full((16,), start)), nn.Parameter(torch.full((16,), start))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + F.relu(self.inner(h)) * self.gain + self.bias)


@pytest.mark.parametrize("words", [{}, {"codes": "sweep"}], ids=str)
@pytest.mark.parametrize("start", [0.0, 1e-6, 1e-3])
def test_gains_and_biases_that_begin_near_zero_are_trained(start: float, words: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Gains(start)
    opt = lw.AltMin(model, weights="sgd", **words)
    for seed in range(40):
        opt.step(lambda seed=seed: loss(model, seed))
    assert opt.skipped == 0
    assert loss_on_others(model) < 0.4
    assert float(model.gain.detach().abs().max()) > 0.01


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e12])
@pytest.mark.parametrize("start", [0.0, 1e-6, 1.0])
def test_a_huge_first_batch_does_not_carry_them_away(start: float, scale: float) -> None:
    torch.manual_seed(0)
    model = Gains(start)
    opt = lw.AltMin(model, weights="sgd")
    opt.step(lambda: loss(model, 0, scale))
    for seed in range(1, 60):
        opt.step(lambda seed=seed: loss(model, seed))
    assert opt.skipped <= 2
    assert loss_on_others(model) < 0.5


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Muon, torch.optim.Rprop])
def test_bounded_steps_are_bounded(kind: Any) -> None:
    p = torch.ones(4, 4, requires_grad=True)
    opt = kind([p], lr=0.01)
    for size in (1.0, 1e12, 1.0):
        p.grad = torch.full((4, 4), size)
        opt.step()
    assert float(p.detach().abs().max()) < 2
    assert has_bounded_steps(kind)
    assert not has_bounded_steps(torch.optim.SGD)
    assert not has_bounded_steps(lambda params, lr: kind(params, lr=lr))


def test_deferred_verdicts_are_of_numbers_that_are_not_finite_alone() -> None:
    model = NETS["ReLU, narrow"]()
    opt = AltMin(model, weights="sgd", on_nonfinite="defer")
    for seed in range(3):
        opt.step(lambda seed=seed: loss(model, seed))
    opt.step(lambda: loss(model, 3, 1e6))
    assert opt.skipped == 0
