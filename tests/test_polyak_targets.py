"""Targets by Polyak's step: γ in units of (L − L*)/‖g‖², against its formula written with hooks and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from layerwise import local
from layerwise.errors import BadInput

LABELS = torch.arange(10) % 3


class Tied(nn.Module):
    """A table that is also the output layer: a weight without a local problem, beside a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.middle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(torch.tanh(self.middle(self.table(x)))) @ self.table.weight.T


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    x, images, words = torch.randn(10, 6), torch.randn(10, 2, 4, 4), torch.randint(5, (10,))
    return {
        "dense": (nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double(), x.double()),
        "conv": (
            nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double(),
            images.double(),
        ),
        "embedding": (nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), words),
        "batch norm": (
            nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double(),
            x.double(),
        ),
        "tied": (Tied().double(), words),
    }


def cotangents(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """The loss, `‖g‖²` by module over all its calls, and the gradients: by hooks, one backward pass."""
    squares: dict[str, list[Tensor]] = {}

    def follow(name: str, out: Tensor) -> None:
        out.register_hook(lambda g: squares.setdefault(name, []).append(g.square().sum()))

    handles = [
        module.register_forward_hook(lambda _, given, out, name=name: follow(name, out))  # type: ignore[misc]
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    value = loss()
    grads = torch.autograd.grad(value, list(model.parameters()))
    for handle in handles:
        handle.remove()
    names = [name for name, _ in model.named_parameters()]
    return value.item(), {n: float(sum(s)) for n, s in squares.items()}, dict(zip(names, grads, strict=True))


def loss_of(model: nn.Module, x: Tensor, labels: Tensor = LABELS) -> Tensor:
    return F.cross_entropy(model(x), labels)


def smooth(model: nn.Module, x: Tensor, rate: float) -> Tensor:
    return F.cross_entropy(model(x), LABELS, label_smoothing=rate)


@pytest.mark.parametrize("over", ["layer", "net"])
@pytest.mark.parametrize("name", nets())
def test_one_gradient_step_goes_polyaks_length(name: str, over: Any) -> None:
    """With plain gradient steps at T = 1, `W ← W − lr γ ∂L/∂W` with γ = (L − L*)/‖∂L/∂z‖² of its layer, or of all."""
    model, x = nets()[name]
    lower, start = 0.25, {n: p.detach().clone() for n, p in model.named_parameters()}
    loss, squares, grads = cotangents(model, lambda: loss_of(model, x))
    found = squares | {"table": float(grads["table.weight"].square().sum())} if name == "tied" else squares
    target = local.GradientStep(1.0, per=local.Polyak(lower, over))
    opt = lw.LocoProp(model, preset="gradient-descent", target=target, lr=0.1)
    opt.step(lambda: loss_of(model, x))
    for key, p in model.named_parameters():
        layer = key.rpartition(".")[0]
        used = {n for n in (q.rpartition(".")[0] for q in start) if n in found}
        below = found[layer] if over == "layer" else sum(found[n] for n in used)
        expected = start[key] - 0.1 * (loss - lower) / below * grads[key]
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def test_parameters_without_a_local_problem_count_in_the_net() -> None:
    model, x = nets()["tied"]
    loss, squares, grads = cotangents(model, lambda: loss_of(model, x))
    total = squares["middle"] + float(grads["table.weight"].square().sum())
    before = model.get_parameter("middle.weight").detach().clone()
    target = local.GradientStep(1.0, per=local.Polyak(over="net"))
    lw.LocoProp(model, preset="gradient-descent", target=target, lr=1.0).step(lambda: loss_of(model, x))
    moved = model.get_parameter("middle.weight") - before
    torch.testing.assert_close(moved, -loss / total * grads["middle.weight"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [local.GradientStep, local.Mirror, local.NaturalStep])
def test_the_linear_loss_is_at_its_bound_where_gamma_is_one(make: Any) -> None:
    """`L + ⟨g, y − z⟩ = L*` for each layer under the squared loss, whatever the target's direction."""
    model, x = nets()["dense"]
    target, found = make(1.0, per=local.Polyak(0.1)), []

    def solver(problem: Any) -> Any:
        found.append(problem)
        return torch.zeros_like(problem.weight), torch.zeros_like(problem.bias)

    opt = lw.LocoProp(model, loss="squared", target=target, solver=solver)
    loss = opt.step(lambda: loss_of(model, x))
    zs = [model[0](x), model(x)]  # type: ignore[index]
    values = [z.detach().requires_grad_() for z in zs]
    whole = [F.cross_entropy(model[2](torch.tanh(values[0])), LABELS), F.cross_entropy(values[1], LABELS)]  # type: ignore[index]
    for problem, z, total in zip(found, values, whole, strict=True):
        (g,) = torch.autograd.grad(total, z)
        reached = loss + (g * (problem.target[:, 0] - z)).sum()
        assert abs(reached.item() - 0.1) < 1e-12


def test_smoothed_labels_reach_their_entropy() -> None:
    """One layer under the loss: the linear loss at the target is the entropy of the smoothed labels."""
    torch.manual_seed(0)
    model, x, rate, size = nn.Linear(6, 3).double(), torch.randn(10, 6).double(), 0.1, 3
    on, off = 1 - rate + rate / size, rate / size
    least = -(on * math.log(on) + (size - 1) * off * math.log(off))
    smoothed = torch.full((10, size), off).double().scatter(1, LABELS[:, None], on)
    assert abs(F.cross_entropy(smoothed.log(), LABELS, label_smoothing=rate).item() - least) < 1e-7
    loss, squares, grads = cotangents(nn.Sequential(model), lambda: smooth(model, x, rate))
    before, target = model.weight.detach().clone(), local.GradientStep(1.0, per=local.Polyak(least))
    lw.LocoProp(model, preset="gradient-descent", target=target, lr=1.0).step(lambda: smooth(model, x, rate))
    expected = before - (loss - least) / squares["0"] * grads["0.weight"]
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_nothing_is_asked_for_at_or_below_the_bound_and_a_cap_holds() -> None:
    step = local.Polyak(1.0, most=3.0).step
    assert [step(1.0, 2.0), step(0.5, 2.0), step(2.0, 0.0), step(5.0, 2.0), step(9.0, 2.0)] == [0, 0, 0, 2, 3]
    model, x = nets()["dense"]
    before = [p.detach().clone() for p in model.parameters()]
    target = local.GradientStep(1.0, per=local.Polyak(50.0))
    lw.LocoProp(model, preset="gradient-descent", target=target, lr=1.0).step(lambda: loss_of(model, x))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_squares_beyond_a_types_range_are_taken_in_a_wider_one() -> None:
    """Cotangents of 1e-25 in float32, whose squares are zero there: γ is that of the loss times as much."""
    found = []
    for factor in (1.0, 1e-25):
        torch.manual_seed(0)
        net, x = nn.Linear(6, 3), torch.randn(10, 6)
        before, target = net.weight.detach().clone(), local.GradientStep(1.0, per=local.Polyak())
        opt = lw.LocoProp(net, preset="gradient-descent", target=target, lr=0.1)
        opt.step(lambda net=net, x=x, factor=factor: loss_of(net, x) * factor)
        found.append(net.weight.detach() - before)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert found[0].abs().max() > 1e-3


def test_two_backward_passes_of_one_step_are_one_loss() -> None:
    (ours, x), (theirs, _) = nets()["dense"], nets()["dense"]

    def in_parts() -> Tensor:
        parts = [loss_of(ours, part, y) / 2 for part, y in zip(x.split(5), LABELS.split(5), strict=True)]
        for part in parts:
            part.backward()
        return parts[0].detach() + parts[1].detach()

    for model, closure in ((ours, in_parts), (theirs, lambda: loss_of(theirs, x))):
        target = local.GradientStep(1.0, per=local.Polyak())
        lw.LocoProp(model, preset="gradient-descent", target=target, lr=0.1).step(closure)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_batch_with_nan_changes_nothing() -> None:
    model, x = nets()["dense"]
    before = [p.detach().clone() for p in model.parameters()]
    opt = lw.LocoProp(model, target=local.GradientStep(1.0, per=local.Polyak()))
    opt.step(lambda: loss_of(model, x * math.nan))
    assert opt.skipped == 1 and all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("wrong", [{"lower": math.inf}, {"over": "sample"}, {"most": 0.0}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="Polyak needs"):
        local.Polyak(**wrong)


def test_a_target_without_its_batch_says_so() -> None:
    z = torch.zeros(2, 1, 3)
    with pytest.raises(BadInput, match="no step size"):
        local.GradientStep(1.0, per=local.Polyak())(z, z, local.IDENTITY)
