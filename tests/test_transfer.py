"""Transfer functions: f = dF/da, convexity, Fenchel-Young, ranges, large arguments, recognition of calls."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layerwise.errors import BadInput
from layerwise.local import transfer as tr
from layerwise.local.transfer import Transfer, find

TABLE = [
    tr.IDENTITY, tr.TANH, tr.SIGMOID, tr.RELU, tr.leaky_relu(0.2), tr.leaky_relu(3.0), tr.SOFTMAX,
    tr.HARD_TANH, tr.hard_tanh(0, 6), tr.ARCTAN, tr.ELU, tr.elu(0.7), tr.SOFTPLUS, tr.softplus(2.5),
    tr.RELU_SQUARED,
]  # fmt: skip
WITH_DUAL = [t for t in TABLE if t.dual is not None]
each = pytest.mark.parametrize("t", TABLE, ids=lambda t: t.name)


def rows(n: int = 400, o: int = 5, scale: float = 4.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(n, o, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@each
def test_f_is_the_gradient_of_the_potential(t: Transfer) -> None:
    a = rows().requires_grad_()
    (grad,) = torch.autograd.grad(t.potential(a).sum(), a)
    torch.testing.assert_close(t.f(a.detach()), grad, rtol=1e-12, atol=1e-13)


@each
def test_f_is_the_difference_quotient_of_the_potential(t: Transfer) -> None:
    # Independent of autograd, and of kinks: no sample within h of one, by seed.
    a, h = rows(50), 1e-5
    for i in range(a.shape[1]):
        e = h * F.one_hot(torch.tensor(i), a.shape[1]).double()
        quotient = (t.potential(a + e) - t.potential(a - e)) / (2 * h)
        torch.testing.assert_close(quotient if t.joint else quotient[:, i], t.f(a)[:, i], rtol=1e-8, atol=1e-8)


@each
def test_potential_is_convex_and_f_monotone(t: Transfer) -> None:
    a, b = rows(seed=1), rows(seed=2)
    for w in (0.1, 0.5, 0.8):
        chord = w * t.potential(a) + (1 - w) * t.potential(b) - t.potential(w * a + (1 - w) * b)
        assert chord.min() >= -1e-12
    product = (t.f(a) - t.f(b)) * (a - b)
    assert (product.sum(-1) if t.joint else product).min() >= 0
    assert t.bregman(a, b).min() >= -1e-12
    assert t.bregman(a, a).abs().max() <= 1e-12


@pytest.mark.parametrize("t", WITH_DUAL, ids=lambda t: t.name)
def test_gap_is_non_negative_and_zero_at_the_transfer(t: Transfer) -> None:
    a, b = rows(scale=2.0, seed=1), rows(scale=2.0, seed=2)
    y = t.f(b)
    assert t.gap(a, y).min() >= -1e-12
    torch.testing.assert_close(t.gap(b, y), torch.zeros_like(t.gap(b, y)), rtol=0, atol=1e-12)
    # Bregman's form needs no dual, and is the same number.
    torch.testing.assert_close(t.gap(a, y), t.bregman(a, b), rtol=1e-11, atol=1e-11)


def test_a_missing_dual_is_refused() -> None:
    with pytest.raises(BadInput, match="softplus"):
        tr.SOFTPLUS.gap(rows(), rows())


@each
def test_range_and_projection(t: Transfer) -> None:
    y = t.f(rows(scale=30.0))
    assert y.min() >= t.low and y.max() <= t.high
    torch.testing.assert_close(t.project(y), y, rtol=0, atol=1e-14)
    outside = rows(scale=30.0, seed=3)
    inside = t.project(outside)
    torch.testing.assert_close(t.project(inside), inside, rtol=0, atol=1e-14)
    if t.dual is not None:
        assert t.dual(inside).isfinite().all() or t is tr.ARCTAN  # −log cos has no finite ends
    if t.joint:
        torch.testing.assert_close(inside.sum(-1), torch.ones(len(inside), dtype=torch.float64))
        # Nearest point: the residual makes no acute angle with any vertex of the simplex.
        angle = (outside - inside).unsqueeze(1) * (torch.eye(5, dtype=torch.float64) - inside.unsqueeze(1))
        assert angle.sum(-1).max() <= 1e-10
    elif math.isfinite(t.low):
        assert t.dual is None or t.dual(torch.tensor([t.low - 0.1], dtype=torch.float64)).isinf().all()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_arguments_stay_finite(t: Transfer, dtype: torch.dtype) -> None:
    size = 1e6 if t is tr.RELU_SQUARED else 1e15
    a = torch.tensor([[-size, -1e3, -100.0, -30.0, 0.0, 30.0, 100.0, 1e3, size]], dtype=dtype)
    assert t.f(a).isfinite().all() and t.potential(a).isfinite().all()
    if not t.joint:
        torch.testing.assert_close(t.potential(a).double(), t.potential(a.double()), rtol=1e-6, atol=1e-12)


def test_known_values() -> None:
    one = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    log_cosh = [math.log(math.cosh(1))] * 2 + [0]
    torch.testing.assert_close(tr.TANH.potential(one), torch.tensor(log_cosh, dtype=torch.float64), rtol=0, atol=1e-15)
    # −Li₂(−1) = π²/12; both branches of the dilogarithm meet there.
    torch.testing.assert_close(tr.SOFTPLUS.potential(one)[2].item(), math.pi**2 / 12, rtol=0, atol=1e-15)
    brute = sum((-1) ** (k + 1) * math.exp(-k) / k**2 for k in range(1, 60))
    torch.testing.assert_close(tr.SOFTPLUS.potential(one)[1].item(), brute, rtol=1e-14, atol=0)
    assert tr.HARD_TANH.potential(torch.tensor([0.5, 3.0])).tolist() == [0.125, 2.5]


def test_relu_loss_vanishes_where_prediction_and_target_are_negative() -> None:
    a, b = -rows().abs(), -rows(seed=1).abs()
    assert tr.RELU.bregman(a, b).abs().max() == 0
    assert tr.RELU.bregman(a, -b).min() > 0
    assert tr.RELU.bregman(-a, b).min() > 0
    assert tr.TANH.bregman(a, b).min() > 0


@each
def test_the_residual_in_place_is_that_of_f(t: Transfer) -> None:
    a, y = rows(), rows(seed=1)
    b = a.clone()
    assert t.residual_(b, y) is b
    torch.testing.assert_close(b, t.f(a) - y, rtol=1e-15, atol=1e-15)


MODULES = [
    (nn.Tanh(), "tanh"), (nn.Sigmoid(), "sigmoid"), (nn.ReLU(), "relu"), (nn.ReLU(inplace=True), "relu"),
    (nn.LeakyReLU(0.2), "leaky_relu(0.2)"), (nn.LeakyReLU(0.2, inplace=True), "leaky_relu(0.2)"),
    (nn.LeakyReLU(0.0), "relu"), (nn.ReLU6(), "hard_tanh(0,6)"), (nn.Hardtanh(), "hard_tanh"),
    (nn.Hardtanh(-2, 3, inplace=True), "hard_tanh(-2,3)"), (nn.ELU(), "elu"), (nn.ELU(0.5), "elu(0.5)"),
    (nn.Softplus(), "softplus"), (nn.Softplus(beta=2), "softplus(2)"), (nn.Softmax(-1), "softmax"),
    (nn.Softmax(1), "softmax"),
]  # fmt: skip
FUNCTIONS = [
    (torch.tanh, "tanh"), (torch.tanh_, "tanh"), (Tensor.tanh, "tanh"), (Tensor.tanh_, "tanh"),
    (F.tanh, "tanh"),
    (torch.relu, "relu"), (torch.relu_, "relu"), (Tensor.relu_, "relu"), (F.relu_, "relu"),
    (torch.special.expit, "sigmoid"), (Tensor.sigmoid_, "sigmoid"), (F.sigmoid, "sigmoid"),
    (torch.arctan, "arctan"), (Tensor.atan, "arctan"), (F.elu_, "elu"), (F.hardtanh_, "hard_tanh"),
    (lambda x: F.leaky_relu_(x, 0.3), "leaky_relu(0.3)"),
    (lambda x: F.leaky_relu(x, negative_slope=0.3), "leaky_relu(0.3)"),
    (lambda x: x.clamp(min=0), "relu"), (lambda x: x.clamp_(0), "relu"),
    (lambda x: torch.clamp(x, -1, 1), "hard_tanh"),
    (lambda x: x.clamp_min(0), "relu"), (lambda x: torch.softmax(x, 1), "softmax"),
    (lambda x: torch.special.softmax(x, -1), "softmax"), (lambda x: x.softmax(dim=-1), "softmax"),
]  # fmt: skip


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Transfer] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = find(func, args, kwargs)
        if found is not None:
            self.found.append(found)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("call", "name"), MODULES + FUNCTIONS)
def test_calls_are_recognised(call, name: str) -> None:  # type: ignore[no-untyped-def]
    x = rows(20)
    with Seen() as seen:
        out = call(x.clone())
    (found,) = {t.name: t for t in seen.found}.values()
    assert found.name == name and found.monotone and not found.stand_in
    # softplus: torch's own goes linear at βa > 20
    torch.testing.assert_close(found.f(x), out, rtol=0, atol=3e-9 if "softplus" in name else 1e-15)


@pytest.mark.parametrize(
    ("call", "name", "monotone"),
    [
        (nn.GELU(), "gelu", False), (nn.SiLU(), "silu", False), (nn.Mish(), "mish", False),
        (nn.SELU(), "selu", True),
        (nn.Hardswish(), "hardswish", False), (nn.LeakyReLU(-0.1), "leaky_relu(-0.1)", False),
        (nn.Softmax(0), "softmax(dim=0)", True), (F.logsigmoid, "log_sigmoid", True),
    ],
)  # fmt: skip
def test_functions_outside_the_theory_stand_in_as_squared(call, name: str, monotone: bool) -> None:  # type: ignore[no-untyped-def]
    x = rows(20)
    with Seen() as seen:
        call(x)
    (found,) = seen.found
    assert (found.name, found.monotone, found.stand_in) == (name, monotone, True)
    assert torch.equal(found.f(x), x) and torch.equal(found.potential(x), 0.5 * x * x)


def test_other_calls_are_no_transfer_function() -> None:
    w = torch.randn(4, 4)
    for func, args in ((torch.add, (w, w)), (F.linear, (w, w)), (F.dropout, (w,)), (torch.clamp, (w, w, w))):
        assert find(func, args) is None
