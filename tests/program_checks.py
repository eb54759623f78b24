"""Any program over parameters against brute force: first order, diagonals and operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor

import layerwise as lw

__all__ = ["check_curvature", "check_first_order", "check_mse"]


def _named(params: Any, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    every = oracle.parameters(params)
    used = oracle.used_names(every, loss)
    return {name: p for name, p in every.items() if name in used}


def check_first_order(params: Any, loss: Callable[[], Tensor], terms: Callable[[], Tensor], **options: Any) -> None:
    """First order, and the Hessian's operator; terms: `[N]`, those of the samples, which sum to the loss."""
    named = _named(params, loss)
    grads = oracle.per_sample_grad(named, terms)
    quantities = lw.PerSampleGrad(), lw.SquaredNorm(), lw.SecondMoment(), lw.Variance(), lw.PairwiseDot()
    with lw.observe(params, *quantities, **options) as seen:
        loss().backward()
    for name, want in {
        "per_sample_grad": grads, "squared_norm": oracle.squared_norm(grads), "variance": oracle.variance(grads),
        "second_moment": oracle.second_moment(grads), "pairwise_dot": oracle.pairwise_dot(grads),
        "grad": oracle.gradient(named, loss),
    }.items():  # fmt: skip
        oracle.assert_close(dict(getattr(seen, name)), want)
    with oracle.plain_operations():
        hessian = oracle.hessian(oracle.parameters(params), loss)
    oracle.assert_close({"matrix": lw.Hessian(params, loss).to_dense()}, {"matrix": hessian})


def check_curvature(params: Any, logits: Callable[[], Any], loss_of: Callable[[Any], Tensor], **options: Any) -> None:
    """Both diagonals, and the operator of the Gauss-Newton matrix."""
    loss = lambda: loss_of(logits())  # noqa: E731
    named = _named(params, loss)
    quantities = lw.DiagGGN(), lw.DiagHessian(), lw.DiagHessian(per_sample=True)
    with lw.observe(params, *quantities, **options) as seen:
        loss().backward()
    with oracle.plain_operations():
        want = oracle.diag_hessian(named, loss)
        ggn = oracle.ggn(oracle.parameters(params), logits, loss_of)
    oracle.assert_close(dict(seen.diag_ggn), oracle.diag_ggn(named, logits, loss_of))
    oracle.assert_close(dict(seen[quantities[1]]), want)
    oracle.assert_close({name: h.sum(0) for name, h in seen[quantities[2]].items()}, want)
    oracle.assert_close({"matrix": lw.GGN(params, loss).to_dense()}, {"matrix": ggn})


def check_mse(params: Any, logits: Callable[[], Tensor], **options: Any) -> None:
    """Everything, of the mean squared error of `[N, ...]` outputs against random targets."""
    y = torch.randn_like(logits()).detach()
    terms = lambda: (logits() - y).square().flatten(1).mean(1) / len(y)  # noqa: E731
    check_first_order(params, lambda: F.mse_loss(logits(), y), terms, **options)
    check_curvature(params, logits, lambda z: F.mse_loss(z, y), **options)
