"""Products with the Jacobian compute no product of zeros, and nothing becomes wrong by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import layerwise as lw
from layerwise.graph.second.known_zeros import KnownZeros


class Attention(nn.Module):
    """A layer norm and attention by its parts, with a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return (x + self.out(F.scaled_dot_product_attention(q, k, v))).mean(1)


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3).eval(), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.ConvTranspose2d(3, 4, 2, dilation=2, output_padding=1, stride=2), nn.GELU(),
        nn.Conv2d(4, 4, 1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def _sequences() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 4, 2), nn.SiLU(), nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(8, 4))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), (4,)),
    "convolutions": (_convolutions, (2, 7, 7)),
    "sequences": (_sequences, (4, 3)),
    "attention": (Attention, (3, 4)),
}


@pytest.fixture(params=NETS)
def problem(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Callable[[], Tensor], dict[str, Tensor]]]:
    torch.manual_seed(0)
    make, size = NETS[request.param]
    model = make().double()
    x, y = torch.randn(3, *size, dtype=torch.float64), torch.randint(4, (3,))
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    yield model, lambda: F.cross_entropy(model(x), y), v


def test_products_are_those_with_plain_zeros(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, v = problem
    fast = lw.GGN(model, loss)
    found = [fast @ v, fast @ v]
    monkeypatch.setattr(KnownZeros, "run", lambda self, passed, dense=False: passed())
    monkeypatch.setattr(KnownZeros, "zeros", lambda self, like, shape, dense=True: like.new_zeros(shape))
    expected = lw.GGN(model, loss) @ v
    for name, want in expected.items():
        for got in found:
            torch.testing.assert_close(got[name], want, rtol=1e-12, atol=1e-14 * float(want.abs().max()))


def test_an_operator_costs_the_forward_pass_and_a_product_two_passes(problem: Any) -> None:
    """In multiply-adds: J v and J^T u have as many as the backward pass each, all of them needed."""
    model, loss, v = problem
    forward, backward, made, product = (FlopCounterMode(display=False) for _ in range(4))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with forward:
            total = loss()
        with backward:
            total.backward()
    with made:
        operator = lw.GGN(model, loss)
    with product:
        operator @ v
    assert made.get_total_flops() == forward.get_total_flops()
    assert product.get_total_flops() <= 2 * backward.get_total_flops()


def test_zeros_that_were_written_to_are_made_again() -> None:
    zeros = KnownZeros()
    like = torch.ones(3, 4)

    def passed() -> Tensor:
        return zeros.zeros(like, like.shape).add_(1)

    assert torch.equal(zeros.run(passed, dense=True), like)
    assert torch.equal(KnownZeros().run(lambda: zeros.zeros(like, (2, 2)) + 1), torch.ones(2, 2))


def test_a_pass_that_cannot_write_is_run_again() -> None:
    zeros = KnownZeros()
    assert torch.equal(zeros.run(lambda: zeros.zeros(torch.ones(1), (2, 2)).add_(1)), torch.ones(2, 2))


def test_memory_of_zeros_is_never_given_to_others() -> None:
    zeros = KnownZeros()
    with zeros:
        zeros._dense = True
        small = zeros.zeros(torch.ones(1), (2, 2))
        address = small.data_ptr()
        del small
        zeros.zeros(torch.ones(1), (64, 64))
        assert all(not zeros.known(torch.ones(2, 2)) for _ in range(64))
    assert zeros.known(torch.zeros(1)) is False and address


def test_infinite_weights_do_not_turn_zeros_into_nan() -> None:
    """Zero times infinity is NaN in the values of a pass of zeros, which nobody reads."""
    zeros = KnownZeros()
    w = torch.full((2, 2), torch.inf)
    found = zeros.run(lambda: torch.mm(zeros.zeros(w, (2, 2)), w))
    assert torch.equal(found, torch.zeros(2, 2))


def test_a_flat_net_costs_the_columns_of_its_losses_alone() -> None:
    """In multiply-adds: the exact Hessian diagonal of a ReLU net is the GGN's, and no pass proves it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    counts, values = [], []
    for quantity in (lw.DiagGGN(), lw.DiagHessian()):
        with FlopCounterMode(display=False) as counter, lw.observe(model, quantity) as seen:
            F.cross_entropy(model(x), y).backward()
        counts.append(counter.get_total_flops())
        values.append(seen[quantity])
    assert counts[1] <= counts[0]
    for name, want in values[0].items():
        torch.testing.assert_close(values[1][name], want)
