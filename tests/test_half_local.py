"""LocoProp and AltMin of parameters in half precision: float32 to the end of a step, then rounded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw

LOW = pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
ROWS = pytest.mark.parametrize("n", [16, 200, 1000, 5000])
Move = tuple[Tensor, Tensor]


def dense(low: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(low)


def batch(low: torch.dtype, n: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 5).to(low), torch.randint(3, (n,))


def unit(x: Tensor) -> Tensor:
    """The distance of neighbours in a type of few digits at each number, in float64."""
    info = torch.finfo(x.dtype)
    size = x.detach().double().abs().clamp_min(info.tiny)
    return torch.exp2(torch.log2(size).floor()) * info.eps


def softmax(z: Tensor) -> Tensor:
    return z.softmax(-1)


def same(z: Tensor) -> Tensor:
    return z


def recorded(model: nn.Sequential, x: Tensor, y: Tensor) -> list[Move]:
    """The inputs and cotangents of the two layers of `dense`, in the model's type as its graph has them."""
    z = model[0](x)
    h = model[1](z)
    out = model[2](h)
    g = torch.autograd.grad(F.cross_entropy(out, y), [z, out])
    return [(x, g[0]), (h.detach(), g[1])]


def fitted(layer: nn.Linear, rows: Move, f: Any, gamma: float, share: int, steps: int, step: Any) -> list[Tensor]:
    """W and b after steps on `Σ F(W a + b) − y·(W a + b)` in float64, y = f(z) − γ g, each from the next rows.

    step: from `(p, gradient, t, state)` to p.
    """
    a, g = (t.double() for t in rows)
    w, b = layer.weight.detach().double(), layer.bias.detach().double()
    y, states = f(a @ w.T + b) - gamma * g, ({}, {})
    for t in range(steps):
        part = (torch.arange(share) + t * share) % len(a)
        delta = (f(a[part] @ w.T + b) - y[part]) * (len(a) / share)
        w, b = step(w, delta.T @ a[part], t, states[0]), step(b, delta.sum(0), t, states[1])
    return [w, b]


def rmsprop(group: Mapping[str, Any], steps: int) -> Callable[..., Tensor]:
    """A step of TensorFlow's RMSProp at the published schedule."""

    def step(p: Tensor, g: Tensor, t: int, state: dict[str, Tensor]) -> Tensor:
        square, momentum = state.get("square", torch.ones_like(p)), state.get("momentum", torch.zeros_like(p))
        state["square"] = group["decay"] * square + (1 - group["decay"]) * g.square()
        rate = group["lr"] * max(1 - t / steps, 0.25)
        state["momentum"] = group["momentum"] * momentum + rate * g / (state["square"] + group["eps"]).sqrt()
        return p - state["momentum"]

    return step


def adam(group: Mapping[str, Any], scale: float) -> Callable[..., Tensor]:
    """A step of Adam on a gradient times a number."""
    beta, gamma = group["betas"]

    def step(p: Tensor, g: Tensor, t: int, state: dict[str, Tensor]) -> Tensor:
        zero, g = torch.zeros_like(p), g * scale
        state["mean"] = beta * state.get("mean", zero) + (1 - beta) * g
        state["square"] = gamma * state.get("square", zero) + (1 - gamma) * g.square()
        root = (state["square"] / (1 - gamma ** (t + 1))).sqrt()
        return p - group["lr"] / (1 - beta ** (t + 1)) * state["mean"] / (root + group["eps"])

    return step


def check(params: list[Tensor], before: list[Tensor], want: list[Tensor], units: float, share: float) -> None:
    """Each number within units of its last place, and a share of the largest move of its tensor."""
    for p, old, new in zip(params, before, want, strict=True):
        error, move = (p.detach().double() - new).abs(), (new - old.double()).abs().max()
        assert move > 0
        assert bool((error <= units * unit(p) + share * move).all()), (tuple(p.shape), (error / unit(p)).max(), move)


@LOW
@ROWS
@pytest.mark.parametrize("loss", ["matching", "squared"])
@pytest.mark.parametrize("steps", [1, 10])
def test_locoprop_rounds_once(low: torch.dtype, n: int, loss: Any, steps: int) -> None:
    """The move is that of float64 from the same inputs and cotangents, to half a unit and float32's own digits."""
    model, (x, y) = dense(low), batch(low, n)
    opt = lw.LocoProp(model, lr=5e-3, loss=loss, steps=steps)
    (group,) = opt.param_groups
    share = min(n, max(-(-n // steps), 100 if loss == "squared" else 1))
    want, before = [], [p.detach().clone() for p in model.parameters()]
    for layer, rows, f in zip((model[0], model[2]), recorded(model, x, y), (torch.tanh, softmax), strict=True):
        f = f if loss == "matching" else same
        want += fitted(layer, rows, f, group["gamma"], share, steps, rmsprop(group, steps))
    opt.step(lambda: F.cross_entropy(model(x), y))
    check(list(model.parameters()), before, want, 0.51, 2e-3)


@LOW
@ROWS
def test_altmin_rounds_once(low: torch.dtype, n: int) -> None:
    """Adam's means and squares are in float32: from float64's by half a unit."""
    model, (x, y) = dense(low), batch(low, n)
    opt = lw.AltMin(model)
    (group,) = opt.param_groups
    gamma, share = n / group["coupling"], -(-n // group["steps"])
    hidden, out = recorded(model, x, y)
    before = [p.detach().clone() for p in model.parameters()]
    want = fitted(model[0], hidden, same, gamma, share, 2, adam(group, 1 / gamma))
    want += fitted(model[2], out, softmax, float(n), share, 2, adam(group, 1 / n))
    opt.step(lambda: F.cross_entropy(model(x), y))
    check(list(model.parameters()), before, want, 0.51, 2e-3)
