"""What refusals say: what was seen, in which call, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from program_checks import check_first_order
from torch import Tensor, nn

import layerwise as lw
from layerwise import errors

pytestmark = pytest.mark.usefixtures("float64")

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X[:, :2].clone()


class _Product(torch.autograd.Function):
    """A function of one's own that reads a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] @ w.T, x.T @ grads[0]


class _Net(nn.Module):
    """A layer, a scale of the loss, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


OUTSIDE: list[Tensor] = []


def _outside(m: _Net) -> Tensor:
    return F.mse_loss(OUTSIDE[0], Y)


# the program, the error, and what its text must say
REFUSED: dict[str, tuple[Callable[[_Net], Tensor], type[Exception], list[str]]] = {
    "own_function": (
        lambda m: F.mse_loss(_Product.apply(X, m.a.weight.T)[:, :2], Y), errors.UncoveredUse,
        ["a.weight", "_ProductBackward", r"function of your own \(line \d+ of test_refusals.py\)", "torch calls"],
    ),
    "outside": (_outside, errors.UncoveredUse, ["no call read it inside the context", "run the forward inside"]),
    "constants": (
        lambda m: F.mse_loss(m(torch.eye(3)), torch.ones(3, 2)), errors.UncoveredUse,
        ["calls read it, but none together with data", "make it outside"],
    ),
    "vmapped": (
        lambda m: F.mse_loss(torch.vmap(m)(X), Y), errors.UncoveredUse, ["under torch.func", "plain torch calls"]
    ),
    "functional_grad": (
        lambda m: torch.vmap(torch.func.grad(lambda x: m(x[None]).sum()))(X).square().sum(), errors.UncoveredUse,
        ["under torch.func"],
    ),
    "penalty": (
        lambda m: F.mse_loss(m(X), Y) + m.a.weight.square().sum(), errors.Undefined,
        ["a.weight", "enters the loss directly", r"Use 2: add of a.weight \(line \d+ of test_refusals.py\)",
         "before the mean", "add its gradient yourself"],
    ),
    "learned_scale": (
        lambda m: F.mse_loss(m(X), Y) * m.scale.exp(), errors.Undefined, ["Use 2: mul of scale", "one number"]
    ),
    "batch_norm": (
        lambda m: F.mse_loss(m.b(m.norm(m.a(X))), Y), errors.SamplesMixed,
        [r"Use 0: linear of a.bias, a.weight \(line \d+", "they meet in the call 'native_batch_norm'", "model.eval"],
    ),
    "contrastive": (
        lambda m: F.cross_entropy(m(X) @ m(X.flip(0)).T, torch.arange(4)), errors.SamplesMixed,
        ["has a part in the loss of several", r"they meet in the call 'mm' \(autograd's MmBackward0\) above it\."],
    ),
    "contrastive_by_hand": (
        lambda m: -(m(X) @ m(X).T).log_softmax(1).diagonal().mean(), errors.SamplesMixed,
        [r"the loss \(line \d+ of test_refusals.py\) is no sum over samples", "the call 'log_softmax'",
         "linear, as a mean is", "where 4 is not their number, pass samples=N"],
    ),
    "function_of_a_mean": (
        lambda m: (m(X).mean(0) - Y[0]).square().sum(), errors.SamplesMixed, ["the call 'pow'", "must come last"]
    ),
    "reduced": (
        lambda m: F.mse_loss(m(X).mean(), Y.mean()), errors.BadInput,
        [r"mse_loss \(line \d+ of test_refusals.py\) reads outputs of shape \(\)", "reduced over the batch"],
    ),
    "marked": (
        lambda m: lw.as_loss(lambda z: (z - m.scale).abs().pow(3).mean())(m(X)), errors.UnknownLoss,
        [r"<lambda> \(line \d+ of test_refusals.py\) is marked as a loss", "in a tuple",
         "depends on the parameter 'scale' by another way than its first argument"],
    ),
    "marked_contrastive": (
        lambda m: lw.as_loss(lambda z: -(z @ z.T).log_softmax(1).diagonal().mean())(m(X)), errors.SamplesMixed,
        [r"<lambda> \(line \d+ of test_refusals.py\) is no sum over samples", "the call 'log_softmax'"],
    ),
    "largest_of_the_batch": (
        lambda m: F.mse_loss(m.b((z := m.a(X)) + z / z.abs().sum(1).max()), Y), errors.SamplesMixed,
        ["they meet in the call 'max'", "whose result the call 'div' .* reads for every sample"],
    ),
    "mean_of_the_batch": (
        lambda m: F.mse_loss(m.b((z := m.a(X)) - z.mean(0)), Y), errors.SamplesMixed,
        ["they meet in the call 'mean'", "whose result the call 'sub' .* reads for every sample"],
    ),
    "running_sum": (
        lambda m: F.mse_loss(m.b((z := m.a(X)).tanh() + z.cumsum(0)), Y), errors.SamplesMixed,
        ["they meet by way of the call 'tanh' .*, the call 'cumsum'|'cumsum' .*, the call 'tanh'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_what_was_seen_and_what_to_do(name: str) -> None:
    model, (loss, kind, says) = _Net(), REFUSED[name]
    OUTSIDE[:] = [model(X)]
    with pytest.raises(kind) as caught, lw.observe(model, lw.Variance()):
        loss(model).backward()
    for text in says:
        caught.match(text)
    assert all(p.grad is None for p in model.parameters())


def test_a_scripted_model_is_refused_by_that_name() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
    with pytest.raises(errors.UncoveredUse, match="scripted block"), lw.observe(model, lw.Variance()):
        F.mse_loss(model(X), Y).backward()


# Remedies that the texts name, and what needs none ------------------------------------------------------------

ANSWERED: dict[str, Callable[[_Net], Tensor]] = {
    "penalty_in_the_terms": lambda m: (m(X) - Y).square().mean(1) + m.a.weight.square().sum(),
    "learned_scale_in_the_terms": lambda m: (m(X) - Y).square().mean(1) * m.scale.exp() - m.scale,
    "cast_to_the_data": lambda m: (F.linear(X, m.a.weight.to(X), m.a.bias.type_as(X)).tanh() - 1).square().mean(1),
    "data_cast_to_a_parameter": lambda m: (m(X[[2, 0, 3, 1]].to(m.a.weight)) - Y).square().mean(1),
    "learned_target": lambda m: F.mse_loss(m(X), m.scale.exp().expand(4, 2), reduction="none").mean(1),
    "learned_centre": lambda m: F.huber_loss(m(X), m.b.bias[None] * 2, reduction="none").mean(1),
    "learned_variance": lambda m: F.gaussian_nll_loss(m(X), Y, F.softplus(m.scale).expand(4, 2), reduction="none").mean(
        1
    ),
}


@pytest.mark.filterwarnings("ignore::layerwise.errors.SlowPath", "ignore:Using a target size")
@pytest.mark.parametrize("name", ANSWERED)
def test_what_the_refusals_advise_is_exact(name: str) -> None:
    model, terms = _Net(), ANSWERED[name]
    check_first_order(model, lambda: terms(model).mean(), lambda: terms(model) / 4)
