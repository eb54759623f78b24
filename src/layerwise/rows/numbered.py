"""Rows of irregular samples, gathered once into padded `[N,T,...]`, so that every contraction is the regular one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from layerwise.rows.base import Rows

__all__ = ["Order", "Scattered", "as_scattered", "digits", "from_digits", "ranks"]

_BASE = 128  # numbers up to it are exact in every floating-point type


@dataclass(frozen=True, eq=False)
class Order:
    """Where rows of n samples go in `[N,T]`, T the rows of the longest sample.

    numbers: int64 `[M]`, the sample of each row; -1: the row is left out.
    """

    n: int
    numbers: Tensor
    _joined: dict[tuple[int, ...], tuple[Sequence[Order], Order]] = field(default_factory=dict, repr=False)

    @cached_property
    def _ranks(self) -> Tensor:
        return ranks(self.numbers, self.n)

    @cached_property
    def _kept(self) -> Tensor | None:
        """The rows that are not left out; None: all."""
        kept = self.numbers >= 0
        return None if bool(kept.all()) else kept.nonzero()[:, 0]

    @cached_property
    def length(self) -> int:
        """T."""
        own = self._ranks if self._kept is None else self._ranks[self._kept]
        return int(own.max()) + 1 if len(own) else 0

    @cached_property
    def _place(self) -> Tensor | None:
        """The place in N·T of each row that is kept; None: all rows stay where they are."""
        place = self.numbers * self.length + self._ranks
        if self._kept is not None:
            return place[self._kept]
        stays = self.full and bool((place == torch.arange(len(place), device=place.device)).all())
        return None if stays else place

    @cached_property
    def full(self) -> bool:
        """Whether a row goes to every place."""
        return (len(self.numbers) if self._kept is None else len(self._kept)) == self.n * self.length

    def place(self, x: Sequence[Tensor], dim: int = 0) -> Tensor:
        """Rows along a dimension, in one or several tensors, with `[N,T]` there; zero where no row goes."""
        if self._place is None:
            whole = x[0] if len(x) == 1 else torch.cat(list(x), dim)
            return whole.unflatten(dim, (self.n, self.length))
        if self._kept is not None and len(x) > 1:
            x = [torch.cat(list(x), dim)]
        shape = [*x[0].shape]
        shape[dim] = self.n * self.length
        out, start = x[0].new_zeros(shape), 0
        places = self._place.to(out.device)
        for part in x:
            rows = part if self._kept is None else part.index_select(dim, self._kept.to(out.device))
            out.index_add_(dim, places.narrow(0, start, rows.shape[dim]), rows)
            start += rows.shape[dim]
        return out.unflatten(dim, (self.n, self.length))

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        """Rows from their places along a dimension of N·T; the inverse of `place`, zero where a row was left out."""
        if self._place is None:
            return x
        rows = x.index_select(dim, self._place.to(x.device))
        if self._kept is None:
            return rows
        shape = [*x.shape]
        shape[dim] = len(self.numbers)
        return x.new_zeros(shape).index_copy_(dim, self._kept.to(x.device), rows)

    def joined(self, others: Sequence[Order]) -> Order:
        """The order of these rows and then of others; found once for the same orders."""
        if not others:
            return self
        key = tuple(map(id, others))
        if key not in self._joined:  # which keeps the others, so that the key stays theirs
            numbers = torch.cat([self.numbers, *(other.numbers.to(self.numbers.device) for other in others)])
            self._joined[key] = others, Order(self.n, numbers)
        return self._joined[key][1]


class Scattered(Rows):
    """Rows of irregular samples, gathered into `[N,T,...]` when they are first read.

    calls: the rows of one call or several, in their own order `[N',T',...]`. order: of all of them, call after call.
    """

    calls: Sequence[Rows]
    order: Order

    def __init__(self, calls: Sequence[Rows], order: Order) -> None:
        object.__setattr__(self, "calls", calls)
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "size_in", calls[0].size_in)

    @cached_property
    def a(self) -> Tensor | None:
        """The input rows, in order."""
        found = [rows.a.flatten(0, 1) for rows in self.calls if rows.a is not None]
        return self.order.place(found) if found else None

    @cached_property
    def g(self) -> Tensor:
        """The cotangents, in order."""
        return self.order.place([rows.g.flatten(1, 2) for rows in self.calls], 1)

    @property
    def size(self) -> torch.Size:
        """(V, N)."""
        return torch.Size((len(self.calls[0].g), self.order.n))

    @property
    def kind(self) -> str:
        """What the input is."""
        return self.calls[0].kind

    @property
    def cotangents(self) -> Sequence[Tensor]:
        """The cotangents as they arrived."""
        return [rows.g for rows in self.calls]

    def mapped(self, function: Callable[[Rows], Rows]) -> Self:
        """The rows of every call, changed one by one, in the same order."""
        return type(self)([function(rows) for rows in self.calls], self.order)

    def mask(self, own: Tensor | None) -> Tensor | None:
        """Bool `[N,T]`: the rows that are no padding, of those that `own` `[M]` chooses; None: all."""
        if own is None and self.order.full:
            return None
        count = len(self.order.numbers)
        chosen = torch.ones(count, device=self.order.numbers.device) if own is None else own.flatten().float()
        mask = self.order.place([chosen]) != 0
        return None if bool(mask.all()) else mask

    def joined(self, others: Sequence[Scattered]) -> Scattered:
        """These rows and then others."""
        calls = [*self.calls, *(rows for other in others for rows in other.calls)]
        return Scattered(calls, self.order.joined([other.order for other in others]))


def as_scattered(rows: Rows) -> Scattered:
    """Rows that lie in `[N,T,...]` as rows with a number each."""
    if isinstance(rows, Scattered):
        return rows
    n, t = rows.g.shape[1:3]
    return Scattered([rows], Order(n, torch.arange(n, device=rows.g.device).repeat_interleave(t)))


def ranks(numbers: Tensor, n: int) -> Tensor:
    """The rank of each row among those of its sample `[M]`, from sample numbers `[M]`; 0 for a row of no sample."""
    order = numbers.argsort(stable=True)
    count = torch.bincount(numbers + 1, minlength=n + 1)
    found = torch.empty_like(numbers)
    found[order] = torch.arange(len(numbers), device=numbers.device) - (count.cumsum(0) - count)[(numbers + 1)[order]]
    return torch.where(numbers < 0, 0, found)


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
