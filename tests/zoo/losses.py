"""The losses of the zoo: each as its user would write it, and by hand as elements that sum to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["LOSSES", "Loss"]


@dataclass(frozen=True)
class Loss:
    """A loss by name.

    target: (generator, shape of the logits) -> y.
    call: (logits, y) -> the scalar, through torch's own loss functions.
    elements: (logits, y) -> its terms per output position, `[N, ...]` as in the logits without their
        class axis, by formulas that share nothing with `call`; a tuple for several heads.
    """

    name: str
    target: Callable[[Generator, Any], Any]
    call: Callable[[Any, Any], Tensor]
    elements: Callable[[Any, Any], Tensor | tuple[Tensor, ...]]


# Targets ----------------------------------------------------------------------------------------


def _classes(gen: Generator, shape: torch.Size) -> Tensor:
    return torch.randint(shape[1], (shape[0], *shape[2:]), generator=gen)


def _ignoring(index: int) -> Callable[[Generator, torch.Size], Tensor]:
    def target(gen: Generator, shape: torch.Size) -> Tensor:
        y = _classes(gen, shape)
        y.view(-1)[::3] = index
        y.view(-1)[1] = 0  # one target at least counts, whatever `index` is
        return y

    return target


def _soft(gen: Generator, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=gen, dtype=torch.float64).softmax(1)


def _real(gen: Generator, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=gen, dtype=torch.float64)


def _binary(gen: Generator, shape: torch.Size) -> Tensor:
    return torch.randint(2, shape, generator=gen).to(torch.float64)


# Elements by hand -------------------------------------------------------------------------------


def _ramp(count: int, like: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, count, dtype=like.dtype)


def _ce_elements(
    z: Tensor,
    y: Tensor,
    *,
    weighted: bool = False,
    ignore: int = -100,
    smooth: float = 0.0,
    mean: bool = True,
) -> Tensor:
    """-w_y (1-ε) log p_y - (ε/C) sum_c w_c log p_c, zero where ignored; mean: over sum of the w_y kept."""
    classes = z.shape[1]
    logp = (z - z.logsumexp(1, keepdim=True)).movedim(1, -1)
    w = _ramp(classes, z) if weighted else torch.ones(classes, dtype=z.dtype)
    kept = y != ignore
    hot = F.one_hot(torch.where(kept, y, 0), classes).to(z.dtype)
    e = -((1 - smooth) * hot * w + smooth / classes * w).mul(logp).sum(-1) * kept
    return e / ((hot @ w) * kept).sum() if mean else e


def _softplus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))


# Losses as users write them ---------------------------------------------------------------------


def _cross_entropy(weighted: bool = False, **kw: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def call(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, weight=_ramp(z.shape[1], z) if weighted else None, **kw)

    return call


def _user_weighted(z: Tensor, y: Tensor) -> Tensor:
    e = F.cross_entropy(z, y, reduction="none")
    return (e * torch.linspace(0, 1, e.numel(), dtype=e.dtype).view(e.shape)).sum()


def _user_weighted_elements(z: Tensor, y: Tensor) -> Tensor:
    e = _ce_elements(z, y, mean=False)
    return e * torch.linspace(0, 1, e.numel(), dtype=e.dtype).view(e.shape)


def _stepwise(z: Tensor, y: Tensor) -> Tensor:
    """One call per position of the last axis: many loss calls in one total."""
    total = torch.zeros((), dtype=z.dtype)
    for t in range(z.shape[-1]):
        total = total + F.cross_entropy(z[..., t], y[..., t])
    return total / z.shape[-1]


def _counts(gen: Generator, shape: torch.Size) -> Tensor:
    return torch.randint(4, shape, generator=gen).to(torch.float64)


def _variance(z: Tensor) -> Tensor:
    """One for every output, the same for all samples."""
    return _ramp(z.shape[-1], z).expand(z.shape)


def _huber_elements(z: Tensor, y: Tensor, delta: float = 0.7) -> Tensor:
    d = (z - y).abs()
    return torch.where(d < delta, 0.5 * d**2, delta * (d - 0.5 * delta)) / z.numel()


def _gaussian_elements(z: Tensor, y: Tensor) -> Tensor:
    v = _variance(z)
    return 0.5 * (v.log() + (z - y) ** 2 / v) / z.numel()


def _pos_weight(z: Tensor) -> Tensor:
    return _ramp(z.shape[-1], z)


_ALL = [
    Loss("ce_mean", _classes, _cross_entropy(), _ce_elements),
    Loss("ce_module", _classes, lambda z, y: torch.nn.CrossEntropyLoss()(z, y), _ce_elements),
    Loss("ce_sum", _classes, _cross_entropy(reduction="sum"), lambda z, y: _ce_elements(z, y, mean=False)),
    Loss("ce_weighted", _classes, _cross_entropy(True), lambda z, y: _ce_elements(z, y, weighted=True)),
    Loss("ce_ignore", _ignoring(-100), _cross_entropy(), _ce_elements),
    Loss(
        "ce_ignore_class",  # the ignored index is a class like any other
        _ignoring(1),
        _cross_entropy(True, ignore_index=1),
        lambda z, y: _ce_elements(z, y, weighted=True, ignore=1),
    ),
    Loss(
        "ce_ignore_sum",
        _ignoring(-100),
        _cross_entropy(reduction="sum"),
        lambda z, y: _ce_elements(z, y, mean=False),
    ),
    Loss(
        "ce_smooth",
        _classes,
        _cross_entropy(label_smoothing=0.2),
        lambda z, y: _ce_elements(z, y, smooth=0.2),
    ),
    Loss(
        "ce_everything",
        _ignoring(-100),
        _cross_entropy(True, label_smoothing=0.2),
        lambda z, y: _ce_elements(z, y, weighted=True, smooth=0.2),
    ),
    Loss(
        "ce_soft",
        _soft,
        _cross_entropy(),
        lambda z, y: -(y * (z - z.logsumexp(1, keepdim=True))).sum(1) / (z.numel() // z.shape[1]),
    ),
    Loss("ce_scaled", _classes, lambda z, y: 10 * F.cross_entropy(z, y), lambda z, y: 10 * _ce_elements(z, y)),
    Loss("ce_user_mean", _classes, lambda z, y: F.cross_entropy(z, y, reduction="none").mean(), _ce_elements),
    Loss("ce_user_weighted", _classes, _user_weighted, _user_weighted_elements),
    Loss("ce_stepwise", _classes, _stepwise, _ce_elements),
    Loss("mse_mean", _real, lambda z, y: F.mse_loss(z, y), lambda z, y: (z - y) ** 2 / z.numel()),
    Loss("mse_sum", _real, lambda z, y: F.mse_loss(z, y, reduction="sum"), lambda z, y: (z - y) ** 2),
    Loss("mse_scaled", _real, lambda z, y: F.mse_loss(z, y) / 4, lambda z, y: (z - y) ** 2 / (4 * z.numel())),
    Loss(
        "mse_user_mean",
        _real,
        lambda z, y: F.mse_loss(z, y, reduction="none").flatten(1).sum(1).mean(),
        lambda z, y: (z - y) ** 2 / z.shape[0],
    ),
    Loss(
        "bce_mean",
        _binary,
        lambda z, y: F.binary_cross_entropy_with_logits(z, y),
        lambda z, y: (_softplus(z) - y * z) / z.numel(),
    ),
    Loss(
        "bce_pos_weight",
        _binary,
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=_pos_weight(z), reduction="sum"),
        lambda z, y: _pos_weight(z) * y * _softplus(-z) + (1 - y) * _softplus(z),
    ),
    Loss("nll_mean", _classes, lambda z, y: F.nll_loss(z.log_softmax(1), y), _ce_elements),
    Loss("huber_mean", _real, lambda z, y: F.huber_loss(z, y, delta=0.7), _huber_elements),
    Loss("gaussian_nll", _real, lambda z, y: F.gaussian_nll_loss(z, y, _variance(z)), _gaussian_elements),
    Loss(
        "poisson_nll",
        _counts,
        lambda z, y: F.poisson_nll_loss(z, y, reduction="sum"),
        lambda z, y: z.exp() - y * z,
    ),
    Loss(
        "two_calls",  # two losses of the same outputs
        lambda gen, shape: (_classes(gen, shape), _real(gen, shape)),
        lambda z, y: F.cross_entropy(z, y[0]) + 0.5 * F.mse_loss(z, y[1]),
        lambda z, y: (_ce_elements(z, y[0]), 0.5 * (z - y[1]) ** 2 / z.numel()),
    ),
    Loss(
        "two_heads",
        lambda gen, shapes: (_classes(gen, shapes[0]), _real(gen, shapes[1])),
        lambda z, y: F.cross_entropy(z[0], y[0]) + 0.5 * F.mse_loss(z[1], y[1], reduction="sum"),
        lambda z, y: (_ce_elements(z[0], y[0]), 0.5 * (z[1] - y[1]) ** 2),
    ),
]

LOSSES = {loss.name: loss for loss in _ALL}
