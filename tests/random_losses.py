"""Ends of random programs: losses of torch, flattened ones, fused ones, methods of models, derivatives of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo.parts import leaf

__all__ = ["LOSSES", "Ends", "Sizes"]

Draw = Callable[[Any], Any]


class Sizes(NamedTuple):
    """Samples, positions, features, outputs."""

    n: int
    t: int
    h: int
    o: int


@dataclass
class Ends:
    """From a model and its batch to a loss.

    run: (model, x) -> what the loss receives; loss: of that, as its user writes it.
    terms: of the logits, the samples' terms by plain operations, which sum to the loss.
    logits: (model, x) -> where the Gauss-Newton matrix splits; None: where `loss` begins.
    """

    run: Callable[[Any, Tensor], Any]
    loss: Callable[[Any], Tensor]
    terms: Callable[[Any], Tensor]
    logits: Callable[[Any, Tensor], Any] | None = None


Made = tuple[str, Callable[[nn.Module], tuple[nn.Module, Ends]]]


class _Headed(nn.Module):
    """A body `[N,T,2] -> [N,T,h]` and linear heads."""

    def __init__(self, body: nn.Module, **heads: Any) -> None:
        super().__init__()
        self.body = body
        for name, head in heads.items():
            setattr(self, name, head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A mean and a logarithm of a variance, which may be a parameter alone."""
        h = self.body(x).mean(1)
        spread = self.spread(h) if isinstance(self.spread, nn.Module) else self.spread.expand(len(x), -1)
        return self.head(h), spread

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z.tanh())


def _one(draw: Draw, options: dict[str, Any]) -> tuple[str, Any]:
    name = draw(st.sampled_from(list(options)))
    return name, options[name]


def _factor(draw: Draw) -> float:
    return draw(st.sampled_from([1.0, 1.0, 3.0]))


# Losses of torch --------------------------------------------------------------------------------


def _row_losses(rows: int, o: int) -> dict[str, Callable[[Tensor, str], Tensor]]:
    """(rows `[R,o]`, reduction) -> a loss of torch; with "none", `[R]` or `[R,o]`."""
    y, soft = torch.randint(o, (rows,)), torch.rand(rows, o, dtype=torch.float64).softmax(1)
    weight, values = torch.rand(o, dtype=torch.float64) + 0.5, torch.randn(rows, o, dtype=torch.float64)
    ignored = torch.where(torch.arange(rows) % 3 == 1, -100, y)
    ce = F.cross_entropy
    return {
        "ce": lambda z, r: ce(z, y, reduction=r),
        "ce weighted": lambda z, r: ce(z, y, weight, reduction=r),
        "ce smoothed": lambda z, r: ce(z, y, weight, reduction=r, label_smoothing=0.2),
        "ce ignored": lambda z, r: ce(z, ignored, weight, reduction=r),
        "ce soft": lambda z, r: ce(z, soft, reduction=r),
        "ce soft weighted": lambda z, r: ce(z, soft, weight, reduction=r, label_smoothing=0.1),
        "nll": lambda z, r: F.nll_loss(z.log_softmax(1), ignored, weight, reduction=r),
        "mse": lambda z, r: F.mse_loss(z, values, reduction=r),
        "huber": lambda z, r: F.huber_loss(z, values, reduction=r, delta=0.7),
        "bce": lambda z, r: F.binary_cross_entropy_with_logits(z, soft, weight, reduction=r, pos_weight=weight),
        "poisson": lambda z, r: F.poisson_nll_loss(z, values.abs().round(), reduction=r),
        "gaussian": lambda z, r: F.gaussian_nll_loss(z, values, soft, reduction=r),
        "smooth_l1": lambda z, r: F.smooth_l1_loss(z, values, reduction=r, beta=0.7),
        "soft_margin": lambda z, r: F.soft_margin_loss(z, values.sign(), reduction=r),
    }  # fmt: skip


def _of_rows(draw: Draw, size: Sizes, order: str) -> Made:
    """A loss of rows `[R,o]` of the outputs in some order."""
    n, t, o = size.n, size.t, size.o
    keep = torch.rand(n, t) > 0.4
    keep[:, 0] = True
    flat: Callable[[Tensor], Tensor] = {
        "mean": lambda z: z.mean(1),
        "samples": lambda z: z.reshape(n * t, *z.shape[2:]),
        "positions": lambda z: z.transpose(0, 1).reshape(n * t, *z.shape[2:]),
        "masked": lambda z: z[keep],
        "view": lambda z: z.contiguous().view(-1, *z.shape[2:]),
    }[order]
    every = torch.arange(n)[:, None].expand(n, t)
    owner = torch.arange(n) if order == "mean" else flat(every)
    name, loss = _one(draw, _row_losses(len(owner), o))
    reduction, factor = draw(st.sampled_from(["mean", "sum", "none"])), _factor(draw)

    def whole(z: Tensor) -> Tensor:
        value = loss(z, reduction)
        return factor * (value.sum() if reduction == "none" else value)

    def terms(z: Tensor) -> Tensor:
        rows = loss(z, "none")
        rows = rows.sum(1) if rows.dim() == 2 else rows
        total = rows.sum().detach() / loss(z, reduction).sum().detach()  # by what the mean divides
        return factor * torch.zeros(n, dtype=z.dtype).index_add(0, owner, rows) / total

    run = lambda m, x: flat(m(x))  # noqa: E731
    head = nn.Linear(size.h, o)
    return f"{name} {reduction} {order}", lambda body: (_Headed(body, head=head), Ends(run, whole, terms))


def _known(draw: Draw, size: Sizes) -> Made:
    return _of_rows(draw, size, "mean")


def _flattened(draw: Draw, size: Sizes) -> Made:
    return _of_rows(draw, size, draw(st.sampled_from(["samples", "positions", "masked", "view"])))


def _fused_head(draw: Draw, size: Sizes) -> Made:
    """`F.linear_cross_entropy` with its options; the outputs are those of the head."""
    n, o = size.n, size.o
    y, weight = torch.randint(o, (n,)), torch.rand(o, dtype=torch.float64) + 0.5
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(["mean", "sum"]))}
    if draw(st.booleans()):
        options["weight"] = weight
    if draw(st.booleans()):
        options["label_smoothing"] = 0.2
    bias = draw(st.booleans())

    def run(m: Any, x: Tensor) -> tuple[Tensor, Any]:
        return m.body(x).mean(1), m.head

    def loss(z: tuple[Tensor, Any]) -> Tensor:
        h, head = z
        return F.linear_cross_entropy(h, head.weight, y, linear_bias=head.bias, **options)

    def terms(z: Tensor) -> Tensor:
        rows = F.cross_entropy(z, y, **{**options, "reduction": "none"})
        return rows / (rows.sum().detach() / F.cross_entropy(z, y, **options).detach())

    head = nn.Linear(size.h, o, bias=bias)
    return f"linear_cross_entropy {sorted(options)}", lambda body: (
        _Headed(body, head=head), Ends(run, loss, terms, lambda m, x: m.head(m.body(x).mean(1))),
    )  # fmt: skip


# Losses of the user's own -----------------------------------------------------------------------


class _PreparedCrossEntropy(torch.autograd.Function):
    """The summed cross entropy, whose forward prepares the gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(factor * (z.softmax(1) - F.one_hot(y, z.shape[1])))
        return factor * F.cross_entropy(z, y, reduction="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None


class _OnceCrossEntropy(_PreparedCrossEntropy):
    """The same, which says that it is differentiable once."""

    backward = staticmethod(torch.autograd.function.once_differentiable(_PreparedCrossEntropy.backward))


class _PreparedRows(torch.autograd.Function):
    """The squared error of each row, whose forward prepares the gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(2 * (z - y))
        return (z - y).square().sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0][:, None] * ctx.saved_tensors[0], None


class _DifferentiableCrossEntropy(torch.autograd.Function):
    """The summed cross entropy, whose backward makes the gradient from the logits."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(z, y)
        return F.cross_entropy(z, y, reduction="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, y = ctx.saved_tensors
        return grads[0] * (z.softmax(1) - F.one_hot(y, z.shape[1])), None


def _prepared(draw: Draw, size: Sizes) -> Made:
    """Functions of the user's own as losses."""
    n, o = size.n, size.o
    y, values = torch.randint(o, (n,)), torch.randn(n, o, dtype=torch.float64)
    ce = lambda z: F.cross_entropy(z, y, reduction="none")  # noqa: E731
    squares = lambda z: (z - values).square().sum(1)  # noqa: E731
    share = 1 / n if draw(st.booleans()) else 1.0
    name, (loss, terms) = _one(draw, {
        "prepared": (lambda z: _PreparedCrossEntropy.apply(z, y, share), lambda z: share * ce(z)),
        "once": (lambda z: _OnceCrossEntropy.apply(z, y, share), lambda z: share * ce(z)),
        "rows": (lambda z: _PreparedRows.apply(z, values).mean(), lambda z: squares(z) / n),
        "differentiable": (lambda z: share * _DifferentiableCrossEntropy.apply(z, y), lambda z: share * ce(z)),
        "beside": (
            lambda z: _PreparedCrossEntropy.apply(z, y, share) + F.mse_loss(z, values, reduction="sum"),
            lambda z: share * ce(z) + squares(z),
        ),
    })  # fmt: skip
    head = nn.Linear(size.h, o)
    run = lambda m, x: m(x).mean(1)  # noqa: E731
    return f"{name} function", lambda body: (_Headed(body, head=head), Ends(run, loss, terms))


def _own(draw: Draw, size: Sizes) -> Made:
    """Losses by hand, of what the model returns."""
    n, o = size.n, size.o
    y = torch.randn(n, size.t, o, dtype=torch.float64)
    name, each = _one(draw, {
        "cubed": lambda z: (z - y).abs().pow(3).mean((1, 2)),
        "cosh": lambda z: (z - y).cosh().log().sum((1, 2)),
        "quartic": lambda z: (z.mean(1) - y[:, 0]).square().sum(1).square(),
        "focal": lambda z: (1 - z.softmax(-1)[..., 0]).square().mul(-z.log_softmax(-1)[..., 0]).mean(1),
    })  # fmt: skip
    factor, summed = _factor(draw), draw(st.booleans())
    share = factor if summed else factor / n
    loss = lambda z: factor * (each(z).sum() if summed else each(z).mean())  # noqa: E731
    head = nn.Linear(size.h, o)
    return f"own {name}", lambda body: (
        _Headed(body, head=head), Ends(lambda m, x: m(x), loss, lambda z: share * each(z)),
    )  # fmt: skip


def _methods(draw: Draw, size: Sizes) -> Made:
    """Losses of `encode` and `decode`; the second part may be a function of parameters alone."""
    n, o = size.n, size.o
    y, noise = torch.randn(n, o, dtype=torch.float64), torch.randn(n, o, dtype=torch.float64)
    alone = draw(st.booleans())
    spread = leaf(o) if alone else nn.Linear(size.h, o)
    decoder = nn.Linear(o, o)
    divergence = lambda mean, v: 0.5 * (mean.square() + v.exp() - v - 1).sum(1)  # noqa: E731
    log_prob = lambda z: 0.5 * ((y - z[0]).square() * (-z[1]).exp() + z[1]).sum(1)  # noqa: E731

    def coded(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, v = m.encode(x)
        return m.decode(mean + noise * (0.5 * v).exp()), mean, v

    name, (run, each) = _one(draw, {
        "log_prob": (lambda m, x: m.encode(x), log_prob),
        "coded": (coded, lambda z: (z[0] - y).square().mean(1) + divergence(*z[1:])),
        "coded, torch's": (
            coded, lambda z: F.mse_loss(z[0], y, reduction="none").mean(1) + 0.1 * divergence(*z[1:]),
        ),
        "decode": (lambda m, x: (m.decode(m.encode(x)[0]),), lambda z: (z[0] - y).cosh().log().sum(1)),
    })  # fmt: skip
    heads = {"head": nn.Linear(size.h, o), "spread": spread, "decoder": decoder}
    return f"methods {name}{', spread alone' if alone else ''}", lambda body: (
        _Headed(body, **heads), Ends(run, lambda z: each(z).mean(), lambda z: each(z) / n),
    )  # fmt: skip


def _derivatives(draw: Draw, size: Sizes) -> Made:
    """Penalties on the derivative of the model by its input."""
    n = size.n
    y = torch.randn(n, size.t, 2, dtype=torch.float64)

    def slopes(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        z = m(x)
        return z, torch.autograd.grad(z.sum(), x, create_graph=True)[0]

    name, each = _one(draw, {
        "penalty": lambda z: (z[1].flatten(1).square().sum(1).add(0.1).sqrt() - 1).square(),
        "forces": lambda z: z[0].mean((1, 2)).square() + (z[1] - y).square().mean((1, 2)),
        "equation": lambda z: (z[1][..., 0] + z[0][..., 0] * z[1][..., 1]).square().mean(1),
        "both": lambda z: F.mse_loss(z[1], y, reduction="none").mean((1, 2)) + z[0].square().mean((1, 2)),
    })  # fmt: skip
    head = nn.Linear(size.h, size.o)
    summed = draw(st.booleans())
    share = 1.0 if summed else 1 / n
    return f"derivatives {name}", lambda body: (
        _Headed(body, head=head),
        Ends(slopes, lambda z: each(z).sum() if summed else each(z).mean(), lambda z: share * each(z)),
    )  # fmt: skip


LOSSES: dict[str, Callable[[Draw, Sizes], Made]] = {
    "known": _known, "flattened": _flattened, "fused_head": _fused_head, "prepared": _prepared, "own": _own,
    "methods": _methods, "derivatives": _derivatives,
}  # fmt: skip
