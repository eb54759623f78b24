"""Hooks on parameters: they change `.grad`, and no quantity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw

pytestmark = pytest.mark.usefixtures("float64")

HOOKS: dict[str, list[Callable[[Tensor], Any]]] = {
    "mask": [lambda g: g * (torch.arange(g.numel()).view(g.shape) % 2)],
    "scale": [lambda g: 3 * g],
    "two": [lambda g: g.clamp(-0.01, 0.01), lambda g: 2 * g],
    "reads": [lambda g: None],
    "zero": [torch.zeros_like],
}


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", HOOKS)
def test_quantities_are_of_the_gradient_before_the_hooks(name: str, inside: bool) -> None:
    model, x, y = _model(), torch.randn(6, 4), torch.randint(3, (6,))
    terms = lambda: F.cross_entropy(model(x), y, reduction="none") / 6  # noqa: E731
    grads = oracle.per_sample_grad(oracle.parameters(model), terms)
    quantities = lw.PerSampleGrad(), lw.SecondMoment(), lw.Variance(), lw.NoiseScale(), lw.ClippedGrad(0.1)

    def hook() -> None:
        for p in model[0].parameters():
            for change in HOOKS[name]:
                p.register_hook(change)

    if not inside:
        hook()
    F.cross_entropy(model(x), y).backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    kept = [dict(p._backward_hooks or {}) for p in model.parameters()]
    with lw.observe(model, *quantities) as seen:
        if inside:
            hook()
        F.cross_entropy(model(x), y).backward()
    oracle.assert_close(dict(seen.per_sample_grad), grads)
    oracle.assert_close(dict(seen.grad), {n: g.sum(0) for n, g in grads.items()})
    oracle.assert_close(dict(seen.second_moment), oracle.second_moment(grads))
    oracle.assert_close(dict(seen.variance), oracle.variance(grads))
    noise = oracle.noise_scale(grads, 6)
    oracle.assert_close(dict(seen.noise_scale.noise), noise["noise"])
    oracle.assert_close(dict(seen.noise_scale.signal), noise["signal"])
    oracle.assert_close(dict(seen.clipped_grad), oracle.clipped_grad(grads, 0.1)[0])
    if not inside:
        assert all(torch.equal(p.grad, plain[n]) for n, p in model.named_parameters() if p.grad is not None)
        assert [dict(p._backward_hooks or {}) for p in model.parameters()] == kept


def test_a_hook_may_remove_itself() -> None:
    model, x, y = _model(), torch.randn(6, 4), torch.randint(3, (6,))
    handle = model[0].weight.register_hook(lambda g: handle.remove())
    for _ in range(2):
        with lw.observe(model, lw.Variance()) as seen:
            F.cross_entropy(model(x), y).backward()
        terms = lambda: F.cross_entropy(model(x), y, reduction="none") / 6  # noqa: E731
        grads = oracle.per_sample_grad(oracle.parameters(model), terms)
        oracle.assert_close(dict(seen.variance), oracle.variance(grads))
    assert not model[0].weight._backward_hooks


OPERATORS: dict[str, Any] = {
    "hessian": lambda m, loss: lw.Hessian(m, loss).to_dense(),
    "ggn": lambda m, loss: lw.GGN(m, loss).to_dense(),
    "product": lambda m, loss: lw.Hessian(m, loss) @ torch.ones(38),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", HOOKS)
def test_operators_are_those_of_the_model_without_hooks(name: str, operator: str) -> None:
    model, x, y = _model(), torch.randn(6, 4), torch.randint(3, (6,))
    model = nn.Sequential(model[0], nn.Tanh(), nn.Linear(5, 2, bias=False), nn.Linear(2, 1))
    loss = lambda: F.mse_loss(model(x)[:, 0], y.double())  # noqa: E731
    want = OPERATORS[operator](model, loss)
    for change in HOOKS[name]:
        model[0].weight.register_hook(change)
        model[3].bias.register_hook(change)
    oracle.assert_close(OPERATORS[operator](model, loss), want)
    assert len(model[0].weight._backward_hooks) == len(HOOKS[name])


@pytest.mark.parametrize("name", HOOKS)
def test_derivatives_of_the_model_in_a_loss_are_before_the_hooks(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def terms() -> torch.Tensor:
        x = torch.linspace(-1, 1, 15).view(5, 3).requires_grad_()
        slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
        return (slope.norm(dim=1) - 1).square() / 5

    want = oracle.per_sample_grad(oracle.parameters(model), terms)
    hessian = lw.Hessian(model, lambda: terms().sum()).to_dense()
    for change in HOOKS[name]:
        model[0].weight.register_hook(change)
    with lw.observe(model, lw.PerSampleGrad(), lw.Variance()) as seen:
        terms().sum().backward()
    oracle.assert_close(dict(seen.per_sample_grad), {n: want[n] for n in seen.grad})
    oracle.assert_close(dict(seen.variance), oracle.variance({n: want[n] for n in seen.grad}))
    oracle.assert_close(lw.Hessian(model, lambda: terms().sum()).to_dense(), hessian)
