"""Rows of irregular samples, gathered once into padded `[N,T,...]`, so that every contraction is the regular one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.rows.base import Rows
from layerwise.rows.pieces import dims

__all__ = ["Order", "digits", "from_digits", "gathered", "order_of", "placed", "ranks"]

_BASE = 128  # numbers up to it are exact in every floating-point type


class Order(NamedTuple):
    """Where rows go: row `source[j]` to place `place[j]` of N·T; None: all rows stay as they are."""

    n: int
    length: int
    source: Tensor | None
    place: Tensor | None


def order_of(numbers: Tensor, n: int) -> Order:
    """The order of rows with sample numbers `[M]` in `[N,T]`, T the rows of the longest sample; -1: left out."""
    total = len(numbers)
    kept = (numbers >= 0).nonzero()[:, 0]
    numbers = numbers[kept]
    within = ranks(numbers, n)
    length = int(within.max()) + 1 if len(within) else 0
    order = numbers.argsort(stable=True)
    source, place = kept[order], (numbers * length + within)[order]
    whole = len(source) == n * length == total
    if whole and bool((source == torch.arange(len(source), device=source.device)).all()):
        return Order(n, length, None, None)
    return Order(n, length, source, place)


def ranks(numbers: Tensor, n: int) -> Tensor:
    """The rank of each row among those of its sample `[M]`, from sample numbers `[M]`; 0 for a row of no sample."""
    order = numbers.argsort(stable=True)
    count = torch.bincount(numbers + 1, minlength=n + 1)
    found = torch.empty_like(numbers)
    found[order] = torch.arange(len(numbers), device=numbers.device) - (count.cumsum(0) - count)[(numbers + 1)[order]]
    return torch.where(numbers < 0, 0, found)


def gathered(rows: Rows, order: Order) -> Rows:
    """The rows in an order, `[N,T,...]`; the places that no row goes to are zero in the input and the cotangents."""
    v, _, _, k, o, _ = dims(rows)
    g = placed(rows.g.reshape(v, -1, k, o).transpose(0, 1), order).movedim(2, 0)
    if rows.a is None:
        return Rows(None, g, rows.size_in)
    return Rows(placed(rows.a.flatten(0, 1), order), g, rows.size_in)


def placed(x: Tensor, order: Order) -> Tensor:
    """`[M, ...]` as `[N,T, ...]`."""
    if order.source is None or order.place is None:
        return x.reshape(order.n, order.length, *x.shape[1:])
    out = x.new_zeros(order.n * order.length, *x.shape[1:])
    out[order.place.to(x.device)] = x[order.source.to(x.device)]
    return out.unflatten(0, (order.n, order.length))


def digits(numbers: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Numbers from -1 to n - 1 as a stack of digits `[D, ...]` that are exact in any type; see `from_digits`."""
    found: list[Tensor] = []
    left, most = numbers + 1, n
    while most or not found:
        found.append(left % _BASE)
        left, most = left // _BASE, most // _BASE
    return torch.stack(found).to(dtype)


def from_digits(stack: Tensor) -> Tensor:
    """The numbers whose digits are `[D, ...]`."""
    stack = stack.real if stack.is_complex() else stack
    total = torch.zeros(stack.shape[1:], dtype=torch.long, device=stack.device)
    for digit in reversed(stack.unbind(0)):
        total = total * _BASE + digit.long()
    return total - 1
