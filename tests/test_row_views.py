"""Rows made again from a plan, beside those that the operations lay out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Case, cases

import layerwise as lw
from layerwise import errors
from layerwise.gradient import parts
from layerwise.gradient.row_views import Remembered

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remembered[Any]]:
    """Plans of this test alone."""
    found: Remembered[Any] = Remembered()
    monkeypatch.setattr(parts, "_PLANS", found)
    yield found


def _values(subject: Any, loss: Callable[[], Tensor]) -> list[dict[str, Tensor]] | type:
    quantities = lw.PerSampleGrad(), lw.SquaredNorm(), lw.SecondMoment(), lw.PairwiseDot()
    try:
        with lw.observe(subject, *quantities) as seen:
            loss().backward()
    except errors.LayerwiseError as error:
        return type(error)
    finally:
        for p in oracle.parameters(subject).values():
            p.grad = None
    return [dict(seen[q]) for q in quantities]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id, marks=() if i % 6 == 1 else (pytest.mark.slow,))
        for i, case in enumerate(cases(first_loss_only=True))
    ],
)
def test_second_runs_of_the_zoo(case: Case) -> None:
    """The second and third pass, by plans, give the first one's bits."""
    instance = case.make(seed=0)
    first = _values(instance.subject, instance.loss)
    for _ in range(2):
        again = _values(instance.subject, instance.loss)
        if isinstance(first, type):
            assert again is first
            continue
        for one, other in zip(first, again, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def _made(found: Remembered[Any]) -> int:
    return sum(plan is not None for plan in found._found.values())


def test_a_plan_serves_equal_layers_and_no_others(plans: Remembered[Any]) -> None:
    """One plan for three equal layers; another cotangent, batch, order of memory or sample axis makes another."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    x = torch.randn(4, 3, 5)
    runs: list[tuple[Callable[[], Tensor], int]] = [
        (lambda: net(x).square(), 1),
        (lambda: net(x).sum(1), 2),  # the last layer's cotangent is an expanded tensor
        (lambda: net(x[:2]).square(), 3),
        (lambda: net(x.transpose(0, 1).contiguous().transpose(0, 1)).square(), 4),
        (lambda: net(x[:, 0]).square(), 5),
    ]
    for outputs, count in runs:
        first, again = (_values(net, partial(_sum, outputs)) for _ in range(2))
        assert not isinstance(first, type)
        assert not isinstance(again, type)
        oracle.assert_close(again[0], oracle.per_sample_grad(dict(net.named_parameters()), partial(_terms, outputs)))
        assert all(torch.equal(first[0][name], again[0][name]) for name in first[0])
        assert _made(plans) >= count


def _sum(outputs: Callable[[], Tensor]) -> Tensor:
    return outputs().sum()


def _terms(outputs: Callable[[], Tensor]) -> Tensor:
    return outputs().flatten(1).sum(1)


def test_values_that_change_under_a_plan(plans: Remembered[Any]) -> None:
    """Other inputs, and a product of a bare parameter, by the plans of the first batch."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x * self.scale).tanh())

    net = Net()
    for _ in range(3):
        x, y = torch.randn(4, 7, 6), torch.randint(3, (4, 7))
        terms = lambda: F.cross_entropy(net(x).mT, y, reduction="none").mean(1) / 4  # noqa: E731, B023
        got = _values(net, lambda: F.cross_entropy(net(x).mT, y))  # noqa: B023
        assert not isinstance(got, type)
        oracle.assert_close(got[0], oracle.per_sample_grad(dict(net.named_parameters()), terms))
    assert _made(plans) == 2


@pytest.mark.parametrize("joint", [False, True])
def test_factors_by_plans(joint: bool) -> None:
    """K-FAC finds the bias of a layer, and its layouts, where the slots were not asked."""
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), torch.randint(3, (6,))
    found = []
    for _ in range(2):
        with lw.observe(net, lw.KFLR(joint=joint)) as seen:
            F.cross_entropy(net(x), y).backward()
        found.append(seen.kflr.blocks)
    assert found[0].keys() == found[1].keys()
    for name, block in found[0].items():
        assert torch.equal(block.B, found[1][name].B)


def test_a_tensor_that_is_two_arguments_makes_no_plan_for_others() -> None:
    """`addmm(x, x, w)` and `addmm(y, x, w)` have the same layouts, and rows from another argument."""
    w = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    x, y, t = (torch.randn(4, 4, dtype=torch.float64) for _ in range(3))
    for first in (x, y):
        with lw.observe({"w": w}, lw.PerSampleGrad()) as seen:
            F.mse_loss(torch.addmm(first, x, w), t, reduction="sum").backward()
        with torch.no_grad():
            g = 2 * (torch.addmm(first, x, w) - t)
        torch.testing.assert_close(seen.per_sample_grad["w"], x[:, :, None] * g[:, None, :])
