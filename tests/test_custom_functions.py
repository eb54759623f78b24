"""Second derivatives through functions of the user's own: those of brute force, or refused by the function's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise import errors

pytestmark = pytest.mark.usefixtures("float64")


class _Prepared(torch.autograd.Function):
    """The mean cross entropy, whose forward prepares the gradient, as fused losses do."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward((z.softmax(1) - F.one_hot(y, z.shape[1])) / len(z), y)
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.saved_tensors[0], None


class _PreparedWithNumber(_Prepared):
    """The same, with an argument that is no tensor."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(factor * (z.softmax(1) - F.one_hot(y, z.shape[1])) / len(z))
        return factor * F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None


class _Differentiable(torch.autograd.Function):
    """The mean cross entropy, whose backward makes the gradient from the logits."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(z, y)
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, y = ctx.saved_tensors
        return grads[0] * (z.softmax(1) - F.one_hot(y, z.shape[1])) / len(z), None


class _Smoothed(torch.autograd.Function):
    """The same with smoothed labels, whose other arguments lie on the context."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, amount: float, reduction: str = "mean") -> Tensor:
        ctx.save_for_backward(z, y)
        ctx.amount, ctx.reduction = amount, reduction
        return F.cross_entropy(z, y, label_smoothing=amount, reduction=reduction)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, y = ctx.saved_tensors
        mass = (1 - ctx.amount) * F.one_hot(y, z.shape[1]) + ctx.amount / z.shape[1]
        return grads[0] * (z.softmax(1) - mass) / (len(z) if ctx.reduction == "mean" else 1), None, None, None


class _Context(torch.autograd.Function):
    """A power, with a context of its own method."""

    @staticmethod
    def forward(z: Tensor, exponent: int) -> Tensor:
        return z**exponent

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        z, ctx.exponent = inputs
        ctx.save_for_backward(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.exponent * ctx.saved_tensors[0] ** (ctx.exponent - 1), None


class _PreparedGelu(torch.autograd.Function):
    """An activation that keeps its slope, in place of its input."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        slope = torch.func.vmap(torch.func.grad(lambda t: t * torch.sigmoid(t)))(z.flatten()).view_as(z)
        ctx.save_for_backward(slope)
        return z * z.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.saved_tensors[0]


class _Gelu(_PreparedGelu):
    """The same, from its input."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * z.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (z,) = ctx.saved_tensors
        s = z.sigmoid()
        return grads[0] * s * (1 + z * (1 - s))


class _Straight(torch.autograd.Function):
    """Rounds, with the derivative of the identity."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.mul(4).round().div(4)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


class _Detached(torch.autograd.Function):
    """Doubles, with a backward that torch cannot differentiate even in its cotangent."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 2 * z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 2 * grads[0].detach()


@torch.library.custom_op("layerwise_tests::prepared", mutates_args=())
def _library(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(z, y), (z.softmax(1) - F.one_hot(y, z.shape[1])) / len(z)


_library.register_autograd(
    lambda ctx, g, _: (g * ctx.saved_tensors[0], None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)


class _Rounded(_Straight):
    """The same, with an argument that nothing keeps."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, levels: int) -> Tensor:  # type: ignore[override]
        return z.mul(levels).round().div(levels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None

    @classmethod
    def apply(cls, z: Tensor) -> Any:  # type: ignore[override]
        return super().apply(z, 4)


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


X, Y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0, 2])

REFUSED: dict[str, tuple[Callable[[nn.Module], Tensor], str]] = {
    "prepared": (lambda m: _Prepared.apply(m(X), Y), "_PreparedBackward"),
    "prepared_number": (lambda m: _PreparedWithNumber.apply(m(X), Y, 2.0), "_PreparedWithNumberBackward"),
    "prepared_sum": (lambda m: 3 * _Prepared.apply(m(X), Y) + m(X).square().mean(), "_PreparedBackward"),
    "library": (lambda m: _library(m(X), Y)[0], "GeneratedBackwardFor_layerwise_tests_prepared"),
    "prepared_inside": (lambda m: _Prepared.apply(_Gelu.apply(m(X)), Y), "_PreparedBackward"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", [lw.GGN, lw.Hessian])
def test_operators_refuse_a_loss_that_prepares_its_gradient(kind: Any, name: str) -> None:
    model, (loss, node) = _model(), REFUSED[name]
    with pytest.raises(errors.Undefined, match=node):
        kind(model, lambda: loss(model)) @ torch.ones(43)


@pytest.mark.parametrize("quantity", [lw.DiagHessian(), lw.DiagHessian(draws=2), lw.DiagGGN(), lw.KFLR()], ids=repr)
@pytest.mark.parametrize("name", REFUSED)
def test_quantities_refuse_a_loss_that_prepares_its_gradient(quantity: Any, name: str) -> None:
    """Those of samples see that one number depends on several of them."""
    model, (loss, node) = _model(), REFUSED[name]
    with pytest.raises((errors.Undefined, errors.SamplesMixed), match=node), lw.observe(model, quantity):
        loss(model).backward()
    assert all(p.grad is None for p in model.parameters())


class _Once(_Prepared):
    """The prepared one, which says that it is differentiable once."""

    backward = staticmethod(torch.autograd.function.once_differentiable(_Prepared.backward))


@pytest.mark.parametrize("function", [_Prepared, _Once])
def test_a_prepared_number_is_not_known_to_be_a_sum_over_samples(function: Any) -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    with pytest.raises(errors.SamplesMixed, match="a number for each sample"), lw.observe(model, lw.PerSampleGrad()):
        function.apply(model(x), y).backward()
    with lw.observe(model) as seen:
        function.apply(model(x), y).backward()
    oracle.assert_close(
        dict(seen.grad), oracle.gradient(oracle.parameters(model), lambda: F.cross_entropy(model(x), y))
    )


def test_first_order_needs_no_second_derivative() -> None:
    model = _model()
    with lw.observe(model) as seen:
        _Prepared.apply(model(X), Y).backward()
    want = oracle.gradient(oracle.parameters(model), lambda: F.cross_entropy(model(X), Y))
    oracle.assert_close(dict(seen.grad), want)


EXACT: dict[str, tuple[Callable[[nn.Module], Tensor], Callable[[nn.Module], Tensor]]] = {
    "loss": (lambda m: _Differentiable.apply(m(X), Y), lambda m: F.cross_entropy(m(X), Y)),
    "smoothed": (
        lambda m: _Smoothed.apply(m(X), Y, 0.2, "mean"),
        lambda m: F.cross_entropy(m(X), Y, label_smoothing=0.2),
    ),
    "context": (
        lambda m: F.cross_entropy(m[2](_Context.apply(m[0](X), 3)), Y),
        lambda m: F.cross_entropy(m[2](m[0](X) ** 3), Y),
    ),
    "head": (
        lambda m: F.cross_entropy(_Gelu.apply(m(X)), Y),
        lambda m: F.cross_entropy((lambda z: z * z.sigmoid())(m(X)), Y),
    ),
    "first": (
        lambda m: F.mse_loss(m[2](_Gelu.apply(m[0](X))), X[:, :3]),
        lambda m: F.mse_loss(m[2]((lambda z: z * z.sigmoid())(m[0](X))), X[:, :3]),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_functions_with_a_true_second_derivative_are_exact(name: str) -> None:
    model, (own, plain) = _model(), EXACT[name]
    want = oracle.hessian(oracle.parameters(model), lambda: plain(model))
    oracle.assert_close(lw.Hessian(model, lambda: own(model)).to_dense(), want)
    oracle.assert_close(lw.GGN(model, lambda: own(model)).to_dense(), lw.GGN(model, lambda: plain(model)).to_dense())
    with lw.observe(model, lw.DiagHessian()) as seen:
        own(model).backward()
    flat = torch.cat([seen.diag_hessian[name].flatten() for name, _ in model.named_parameters()])
    oracle.assert_close(flat, want.diagonal())


@pytest.mark.parametrize("function", [_PreparedGelu, _Straight, _Rounded, _Detached], ids=lambda f: f.__name__)
def test_functions_inside_the_model_are_refused_where_they_curve(function: Any) -> None:
    """Their first derivatives are what they say, so products with J are exact unless J itself cannot be had."""
    model = _model()

    def loss() -> Tensor:
        return F.cross_entropy(model[2](function.apply(model[0](X))), Y)

    node = function.__name__ + "Backward"
    with pytest.raises(errors.Undefined, match=rf"{node}, .* \(line \d+ of test_custom_functions.py\)"):
        lw.Hessian(model, loss) @ torch.ones(43)
    with pytest.raises(errors.Undefined, match=node), lw.observe(model, lw.DiagHessian(draws=1)):
        loss().backward()
    with pytest.raises(errors.Undefined, match=node), lw.observe(model, lw.DiagHessian()):
        loss().backward()
    if function is _Detached:
        with pytest.raises(errors.Undefined, match=node):
            lw.GGN(model, loss) @ torch.ones(43)
        return
    with lw.observe(model, lw.DiagGGN()) as seen:
        loss().backward()
    diagonal = torch.cat([seen.diag_ggn[name].flatten() for name, _ in model.named_parameters()])
    oracle.assert_close(lw.GGN(model, loss).to_dense().diagonal(), diagonal)


# linear_cross_entropy -------------------------------------------------------------------------------------


class _Headed(nn.Module):
    """A trunk, and the head that `linear_cross_entropy` multiplies with."""

    def __init__(self, *rest: int) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.weight, self.bias = nn.Parameter(torch.randn(3, *rest, 5)), nn.Parameter(torch.randn(3, *rest))

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x).tanh()


CHUNKED = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked": {"options": CHUNKED},
    "sum": {"options": CHUNKED, "reduction": "sum"},
    "weights": {"options": CHUNKED, "weight": torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)},
    "ignored": {"options": CHUNKED, "ignore_index": 1},
    "smoothed": {"label_smoothing": 0.2},
}


def _pair(model: _Headed, options: dict[str, Any], y: Tensor = Y) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    plain = {key: value for key, value in options.items() if key != "options"}

    def logits() -> Tensor:
        return torch.einsum("ni,c...i->nc...", model(X), model.weight) + model.bias

    return (
        lambda: F.linear_cross_entropy(model(X), model.weight, y, linear_bias=model.bias, **options),
        lambda: F.cross_entropy(logits(), y, **plain),
    )


def _same(model: nn.Module, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> None:
    found = []
    quantities = [lw.PerSampleGrad(), lw.Variance(), lw.DiagGGN(), lw.DiagHessian()]
    for loss in (one, other):
        with lw.observe(model, *quantities) as seen:
            loss().backward()
        found.append([dict(seen[q]) for q in quantities])
        found[-1] += [{"matrix": kind(model, loss).to_dense()} for kind in (lw.GGN, lw.Hessian)]
    for got, want in zip(*found, strict=True):
        oracle.assert_close(got, want)


@pytest.mark.parametrize("name", OPTIONS)
def test_linear_cross_entropy_is_a_layer_and_a_loss(name: str) -> None:
    model = _Headed()
    _same(model, *_pair(model, OPTIONS[name]))


def test_linear_cross_entropy_of_several_positions() -> None:
    model = _Headed(2)
    _same(model, *_pair(model, {}, torch.randint(3, (6, 2))))


def test_linear_cross_entropy_with_a_frozen_head() -> None:
    model = _Headed()
    model.weight.requires_grad_(requires_grad=False)
    model.bias.requires_grad_(requires_grad=False)
    _same(model, *_pair(model, {"options": CHUNKED}))


def test_the_module_of_linear_cross_entropy() -> None:
    loss = nn.LinearCrossEntropyLoss(5, 3, options=CHUNKED)
    model = nn.ModuleDict({"trunk": nn.Linear(4, 5), "loss": loss})
    x = lambda: model["trunk"](X).tanh()  # noqa: E731
    weight, bias = loss.linear.weight, loss.linear.bias
    _same(model, lambda: loss(x(), Y), lambda: F.cross_entropy(F.linear(x(), weight, bias), Y))


@pytest.mark.parametrize("kind", [lw.LocoProp, lw.AltMin, lw.optim.KFAC])
def test_steps_with_linear_cross_entropy(kind: Any) -> None:
    one, other = _Headed(), _Headed()
    other.load_state_dict(one.state_dict())
    for model, place in ((one, 0), (other, 1)):
        torch.manual_seed(1)
        opt, linear = kind(model, lr=0.1), lambda m=model: F.cross_entropy(F.linear(m(X), m.weight, m.bias), Y)
        loss = linear if place else _pair(model, {"options": CHUNKED})[0]
        opt.step(loss)
    oracle.assert_close(dict(one.named_parameters()), dict(other.named_parameters()))
