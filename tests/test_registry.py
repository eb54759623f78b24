"""Entries of one's own: known from then on, tested against autograd when they are registered, and removed again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise.ops import Call, ElementwiseSlot, Form, Slot, bind, register
from layerwise.ops.registry import BUILD


@pytest.fixture(autouse=True)
def _table() -> Iterator[None]:
    torch.manual_seed(0)
    known = set(BUILD)
    yield
    for func in BUILD.keys() - known:
        del BUILD[func]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.inner(x, self.weight)


def inner_form(call: Call, alpha: float = 1.0, swap: bool = False) -> Form | None:
    bound = bind(call, ("input", "other"), (None, None))
    if bound is None:
        return None
    x, y = bound
    rows, columns = tuple(range(x.ndim - 1)), tuple(range(40, 39 + y.ndim))
    out = (*rows[::-1], *columns) if swap else (*rows, *columns)
    return Form((x, y), ((*rows, 50), (*columns, 50)), out, alpha=alpha)


POWERS = (torch.randn(4, 3), nn.Parameter(torch.randn(3)))
EXAMPLE = (torch.randn(4, 5, 6), nn.Parameter(torch.randn(3, 6)))


def ldexp_slot(call: Call, used: Tensor, linear: bool = False, scale: float = math.log(2)) -> Slot | None:
    bound = bind(call, ("input", "other"), (None, None))
    if bound is None or bound[1] is not used:
        return None
    x = bound[0].detach()
    rows = lambda: scale * x * torch.exp2(used.detach())  # noqa: E731
    view = (1,) * (len(call.out_shape) - used.ndim) + tuple(used.shape)
    return ElementwiseSlot(used, view, call.out_shape, rows, linear=linear)


def observed(model: nn.Module, x: Tensor) -> Any:
    with lw.observe(model, lw.PerSampleGrad(), lw.KFAC()) as seen:
        F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
    return seen


def test_a_product_has_rows_until_its_entry_is_removed() -> None:
    model, x = Inner(), torch.randn(7, 6, dtype=torch.float64)
    before = observed(model, x)
    entry = register(torch.inner, form=inner_form, example=EXAMPLE)
    after = observed(model, x)
    assert before.kfac.forms == {"weight": "gradients"} and after.kfac.forms == {"weight": "rows"}
    torch.testing.assert_close(after.per_sample_grad["weight"], before.per_sample_grad["weight"], rtol=1e-12, atol=0)
    entry.remove()
    entry.remove()
    assert torch.inner not in BUILD and observed(model, x).kfac.forms == {"weight": "gradients"}


def test_local_optimizers_know_it_too() -> None:
    model = nn.Sequential(Inner(), nn.Tanh(), nn.Linear(3, 3, dtype=torch.float64))
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 3
    twin = nn.Sequential(nn.Linear(6, 3, bias=False, dtype=torch.float64), *model[1:])
    with torch.no_grad():
        twin[0].weight.copy_(model[0].weight)
    losses = []
    with register(torch.inner, form=inner_form, example=EXAMPLE):
        for net in (model, twin):
            before = [p.detach().clone() for p in net.parameters()]
            opt = lw.LocoProp(net)
            losses.append([float(opt.step(lambda net=net: F.cross_entropy(net(x), y))) for _ in range(3)])
            with torch.no_grad():
                for p, b in zip(net.parameters(), before, strict=True):
                    p.copy_(b)  # the two share their last layer
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_something_else_is_registered_by_its_slot() -> None:
    weight = nn.Parameter(torch.randn(3))
    with register(torch.ldexp, slot=ldexp_slot, example=(torch.randn(4, 3), weight)) as entry:
        assert entry.func is torch.ldexp and torch.ldexp in BUILD

        class Scale(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.power = nn.Parameter(torch.randn(6, dtype=torch.float64))

            def forward(self, x: Tensor) -> Tensor:
                return torch.ldexp(x, self.power)

        model, x, y = Scale(), torch.randn(5, 6, dtype=torch.float64), torch.arange(5)
        with lw.observe(model, lw.PerSampleGrad()) as seen:
            F.cross_entropy(model(x), y).backward()
        for n in range(5):
            model.zero_grad()
            (F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) / 5).backward()
            torch.testing.assert_close(seen.per_sample_grad["power"][n], model.power.grad, rtol=1e-12, atol=1e-15)
    assert torch.ldexp not in BUILD


@pytest.mark.parametrize(
    ("func", "entry", "example", "says"),
    [
        (F.linear, {"form": inner_form}, EXAMPLE, "linear is known already"),
        (torch.inner, {}, EXAMPLE, "not neither"),
        (torch.inner, {"form": inner_form, "slot": ldexp_slot}, EXAMPLE, "not both"),
        (torch.inner, {"form": inner_form}, (torch.randn(4, 6), torch.randn(3, 6)), "requires a gradient"),
        (torch.inner, {"form": lambda call: None}, EXAMPLE, r"shape \(3, 6\) describes nothing"),
        (torch.inner, {"form": lambda call: inner_form(call, alpha=2.0)}, EXAMPLE, r"differs from autograd's by 1\.0e"),
        (
            torch.inner,  # equal sizes: only the gradient of one sample shows that the axes are mixed up
            {"form": lambda call: inner_form(call, swap=True)},
            (torch.randn(4, 4, 6), nn.Parameter(torch.randn(3, 6))),
            "differs from autograd's",
        ),
        (torch.ldexp, {"slot": lambda c, u: ldexp_slot(c, u, scale=1.0)}, POWERS, "gradient differs"),
        (torch.ldexp, {"slot": lambda c, u: ldexp_slot(c, u, linear=True)}, POWERS, "linear slot has everywhere"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_refused_and_not_kept(func: Any, entry: Any, example: Any, says: str) -> None:
    known = dict(BUILD)
    with pytest.raises(ValueError, match=says):
        register(func, example=example, **entry)
    assert known == BUILD


def test_a_slot_whose_samples_are_wrong_is_refused() -> None:
    class Rolled(ElementwiseSlot):
        def dense(self, g: Tensor, samples: Any) -> Tensor:
            return super().dense(g, samples).roll(1, 1)

    def slot(call: Call, used: Tensor) -> Slot:
        x = call.args[0].detach()
        return Rolled(used, (1, 3), call.out_shape, lambda: math.log(2) * x * torch.exp2(used.detach()), linear=False)

    with pytest.raises(ValueError, match="per-sample gradient along axis 0"):
        register(torch.ldexp, slot=slot, example=(torch.randn(4, 3), nn.Parameter(torch.randn(3))))


def test_options_and_keywords() -> None:
    weight = nn.Parameter(torch.randn(3, 6))
    with register(torch.inner, form=inner_form, example=(torch.randn(4, 6),), options={"other": weight}):
        assert torch.inner in BUILD
