"""Functions without a derivative: signs, functions of the user's own, and the rules by which codes cross them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.local import CodeStep
from layerwise.local.codes.code_step import Terms, sweep
from layerwise.replay.coded import CodedModel

RULES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "straight through": (lw.nn.StraightThrough(), lambda z, g: g * (z.abs() <= 1)),
    "wide": (lw.nn.StraightThrough(2.0), lambda z, g: g * (z.abs() <= 2)),
    "tanh": (lw.nn.Smooth(), lambda z, g: g * (1 - z.tanh() ** 2)),
    "sigmoid": (lw.nn.Smooth(torch.sigmoid), lambda z, g: g * z.sigmoid() * (1 - z.sigmoid())),
    "hinge": (lw.nn.Hinge(), lambda z, g: torch.where(1 - z * -g.sign() > 0, g, torch.zeros_like(g))),
    "one's own": (lambda z, h, g: 0.5 * g * h, lambda z, g: 0.5 * g * torch.where(z > 0, 1.0, -1.0).to(g)),
}
rules = pytest.mark.parametrize("name", RULES)
codes_kinds = pytest.mark.parametrize("codes", ["jacobi", "sweep"])


def net_of(rule: Any = None, sizes: tuple[int, ...] = (5, 6, 6, 3), seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), lw.nn.Sign(rule)]
    return nn.Sequential(*layers[:-1]).double()


def batch(n: int = 12, i: int = 5, seed: int = 1) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, i, generator=gen, dtype=torch.float64), torch.randint(3, (n,), generator=gen)


def close(x: Tensor, y: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=rtol * max(1e-6, float(y.abs().max())))


def test_sign_is_one_of_two() -> None:
    z = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0, float("nan")])
    assert lw.nn.Sign()(z).tolist() == [-1.0, -1.0, -1.0, 1.0, 1.0, -1.0]
    assert "StraightThrough" in repr(lw.nn.Sign())


def test_no_gradient_is_pretended() -> None:
    """Backpropagation, observation and LocoProp see the derivative that there is: zero."""
    net, (x, y) = net_of(), batch()
    F.cross_entropy(net(x), y).backward()
    assert all(not p.grad.any() for k in (0, 2) for p in net[k].parameters())
    assert net[4].weight.grad is not None and net[4].weight.grad.any()
    with lw.observe(net, lw.SquaredNorm()) as seen:
        F.cross_entropy(net(x), y).backward()
    assert not seen.squared_norm["0.weight"].any() and seen.squared_norm["4.weight"].any()


@rules
def test_crossing_by_each_rule(name: str) -> None:
    """Inside `crossing`, cotangents pass by the rule: straight-through estimators and the like, by hand."""
    rule, by_hand = RULES[name]
    z = torch.linspace(-3, 3, 41, dtype=torch.float64).requires_grad_()
    g = torch.randn(41, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with lw.nn.crossing():
        h = lw.nn.Sign(rule)(z)
    (found,) = torch.autograd.grad(h, z, g)
    close(found, by_hand(z.detach(), g))
    assert found.any() and (name in ("tanh", "sigmoid", "one's own") or not found.all())


def test_a_hinge_brings_back_what_is_far_on_the_wrong_side() -> None:
    z, g = torch.tensor([5.0, 5.0, -5.0, -5.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert lw.nn.Hinge()(z, z.sign(), g).tolist() == [1.0, 0.0, 0.0, -1.0]
    assert not lw.nn.StraightThrough()(z, z.sign(), g).any()


@rules
def test_a_code_crosses_one_block_by_the_rule(name: str) -> None:
    """One gradient step of a sweep's code, by hand from the code above it."""
    rule, by_hand = RULES[name]
    net, (x, y) = net_of(rule), batch()
    coded = CodedModel(net, lambda: F.cross_entropy(net(x), y))
    z = [net[0](x).detach(), net[:3](x).detach()]
    step = CodeStep(steps=1, lr=0.4, momentum=0.0)
    found = sweep(coded, dict(enumerate(z)), Terms({0: 0.7, 1: 0.3}, 12.0), step)
    h = torch.where(z[1] > 0, 1.0, -1.0).double().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net[4](h), y, reduction="sum"), h)
    upper = z[1] - 0.4 * by_hand(z[1], g)
    close(found[1], upper)
    h = torch.where(z[0] > 0, 1.0, -1.0).double().requires_grad_()
    (g,) = torch.autograd.grad(0.3 / 2 * (upper - net[2](h)).square().sum(), h)
    close(found[0], z[0] - 0.4 * by_hand(z[0], g))
    assert not torch.equal(found[0], z[0])


def test_jacobi_codes_are_one_step_through_each_block() -> None:
    """The pass is the sweep's first step of rate 1/μ, block by block: a cotangent starts anew at each code."""
    net, (x, y) = net_of(), batch()
    found: dict[str, dict[str, Tensor]] = {}
    for codes in ("jacobi", "sweep"):
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        step = CodeStep(steps=1, lr=1e-6, momentum=0.0)
        opt = lw.AltMin(net, codes=codes, weights="sgd", lr=1.0, momentum=0.0, steps=1, rows="all",
                        coupling=1.0, code_step=step if codes == "sweep" else None)  # type: ignore[arg-type]  # fmt: skip
        opt.step(lambda: F.cross_entropy(net(x), y))
        found[codes] = {n: before[n] - p.detach() for n, p in net.named_parameters()}
        with torch.no_grad():
            for n, p in net.named_parameters():
                p.copy_(before[n])
    with lw.nn.crossing():
        F.cross_entropy(net(x), y).backward()
    for n, p in net.named_parameters():
        assert p.grad is not None and p.grad.any()
        close(found["jacobi"][n], p.grad, 1e-11)  # T = 1 and inputs as they were: the straight-through gradient
    # signs above may flip in a sweep, not with a step as small as this
    one, two = found["sweep"]["2.weight"].flatten(), found["jacobi"]["2.weight"].flatten()
    assert float(one @ two / one.norm() / two.norm()) > 1 - 1e-6


@codes_kinds
@pytest.mark.parametrize("name", ["straight through", "tanh", "hinge"])
def test_binary_nets_learn_and_every_layer_drifts(name: str, codes: Any) -> None:
    net, gen = net_of(RULES[name][0], (8, 32, 32, 3)), torch.Generator().manual_seed(3)
    x = torch.randn(400, 8, generator=gen, dtype=torch.float64)
    y = x[:, :3].argmax(1)
    step = CodeStep(steps=3)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt = lw.AltMin(net, codes=codes, code_step=step if codes == "sweep" else None, coupling=0.1, lr=0.02)
    first = float(opt.step(lambda: F.cross_entropy(net(x), y)))
    for t in range(100):
        rows = torch.randperm(400, generator=gen)[:100] if t else slice(None)
        last = opt.step(lambda rows=rows: F.cross_entropy(net(x[rows]), y[rows]))
    assert float(last) < 0.6 * first
    for n, p in net.named_parameters():
        assert float((p.detach() - before[n]).norm() / before[n].norm()) > 1e-3, n
    assert set(net[1](x @ net[0].weight.T).unique().tolist()) == {-1.0, 1.0}  # type: ignore[operator]


def test_functions_of_ones_own_and_functional_use() -> None:
    """Rounding as a module; the same by `lw.nn.hard` in a forward that holds no module of it."""

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(lw.nn.hard(self.a(x), torch.round, lw.nn.StraightThrough(4.0)))  # type: ignore[no-any-return]

    x, y = batch()
    one = Rounded().double()
    two = nn.Sequential(nn.Linear(5, 6), lw.nn.Hard(torch.round, lw.nn.StraightThrough(4.0)), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p, q in zip(two.parameters(), one.parameters(), strict=True):
            p.copy_(q)
    before = one.a.weight.detach().clone()
    for net in (one, two):
        lw.AltMin(net).step(lambda net=net: F.cross_entropy(net(x), y))
    assert not torch.equal(before, one.a.weight)
    assert all(map(torch.equal, one.parameters(), two.parameters()))


def test_signs_cost_nothing_in_replay_and_travel() -> None:
    net, (x, y) = net_of(), batch()
    coded = CodedModel(net, lambda: F.cross_entropy(net(x), y))
    assert coded.replays([0, 1])
    assert pickle.loads(pickle.dumps(lw.nn.Sign(lw.nn.Hinge(2.0)))).rule == lw.nn.Hinge(2.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lw.nn.StraightThrough(0.0), lambda: lw.nn.Hinge(-1.0), lambda: lw.nn.Smooth("tanh"),  # type: ignore[arg-type]
        lambda: lw.nn.Hard("sign"), lambda: lw.nn.Hard(torch.sign, lw.nn.Hinge),  # type: ignore[arg-type]
        lambda: lw.nn.Hard(lambda z: z.sum())(torch.ones(3)), lambda: lw.nn.Hard(lambda z: z > 0)(torch.ones(3)),
    ],
)  # fmt: skip
def test_what_is_no_function_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(BadInput):
        make()
