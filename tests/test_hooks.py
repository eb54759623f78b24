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
