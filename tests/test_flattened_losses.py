"""Losses of flattened outputs beside irregular rows: class weights, soft labels, both orders of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from program_checks import check_curvature, check_first_order
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("float64")

N, T, C = 3, 4, 2
X = torch.randn(N, T, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(C, (N, T), generator=torch.Generator().manual_seed(1))
SOFT = torch.rand(N, T, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64).softmax(-1)
WEIGHT = torch.tensor([1.0, 2.5], dtype=torch.float64)
LENGTHS = torch.tensor([4, 2, 3])
MASK = torch.arange(T) < LENGTHS[:, None]

Loss = Callable[..., Tensor]  # (logits, targets, reduction) -> the loss of rows


def _hard(z: Tensor, y: Tensor, soft: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(z, y, **options)


LOSSES: dict[str, Loss] = {
    "plain": _hard,
    "weighted": lambda z, y, soft, **o: F.cross_entropy(z, y, weight=WEIGHT, **o),
    "soft": lambda z, y, soft, **o: F.cross_entropy(z, soft, **o),
    "soft_weighted": lambda z, y, soft, **o: F.cross_entropy(z, soft, weight=WEIGHT, **o),
    "smoothed": lambda z, y, soft, **o: F.cross_entropy(z, y, weight=WEIGHT, label_smoothing=0.2, **o),
    "logistic": lambda z, y, soft, **o: _rowwise(F.binary_cross_entropy_with_logits(z, soft, WEIGHT, **o), o),
}


def _rowwise(loss: Tensor, options: Any) -> Tensor:
    return loss.sum(1) if options.get("reduction") == "none" else loss


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, C))


def _flat(order: str, x: Tensor) -> Tensor:
    """`[N,T,...]` to rows: a sample's positions one after another, a position's samples, or those of a mask."""
    if order == "masked":
        return x[MASK]
    return (x.transpose(0, 1) if order == "positions" else x).reshape(N * T, *x.shape[2:])


def _owners(order: str) -> Tensor:
    return _flat(order, torch.arange(N)[:, None].expand(N, T))


CASES = [(name, "mean") for name in LOSSES] + [("weighted", "sum"), ("soft_weighted", "sum")]


@pytest.mark.parametrize("order", ["samples", "positions", "masked"])
@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_flattened_losses(name: str, order: str, reduction: str) -> None:
    model, loss = _model(), LOSSES[name]
    y, soft = _flat(order, Y), _flat(order, SOFT)
    logits = lambda: _flat(order, model(X))  # noqa: E731
    whole = lambda z: loss(z, y, soft, reduction=reduction)  # noqa: E731

    def terms() -> Tensor:
        rows = loss(logits(), y, soft, reduction="none")
        total = rows.sum().detach() / whole(logits()).detach()  # by what the mean divides
        return torch.zeros(N).index_add(0, _owners(order), rows) / total

    check_first_order(model, lambda: whole(logits()), terms)
    check_curvature(model, logits, whole)


class _Ragged(nn.Module):
    """A layer on the rows that a mask picks, beside one on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.some, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.all(x).tanh()
        h = h.masked_scatter(MASK[..., None].expand_as(h), self.some(x[MASK]).tanh() + h[MASK])
        return self.last(h)


@pytest.mark.parametrize("order", ["samples", "positions", "masked"])
@pytest.mark.parametrize("name", ["weighted", "soft_weighted"])
def test_flattened_losses_above_irregular_rows(name: str, order: str) -> None:
    model, loss = _Ragged(), LOSSES[name]
    y, soft = _flat(order, Y), _flat(order, SOFT)
    logits = lambda: _flat(order, model(X))  # noqa: E731
    whole = lambda z: loss(z, y, soft)  # noqa: E731

    def terms() -> Tensor:
        rows = loss(logits(), y, soft, reduction="none")
        return torch.zeros(N).index_add(0, _owners(order), rows) / (rows.sum().detach() / whole(logits()).detach())

    check_first_order(model, lambda: whole(logits()), terms)
    check_curvature(model, logits, whole)
