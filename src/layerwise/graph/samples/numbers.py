"""The sample of every row, wherever the rows lie: measured by vector-Jacobian products from numbered loss terms.

A backward pass is linear, and a product with a power of two is exact. So where the cotangent of every loss term is
multiplied by 2^d, d a digit of its sample's number, a derivative that comes from one sample alone is multiplied by the
same power, to the bit; one that comes from several samples is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from layerwise.graph.probes import away_from_zero
from layerwise.graph.samples.sample_layout import free_axes
from layerwise.tape.pull import pull
from layerwise.tape.uses import Use

__all__ = ["MIXED", "NONE", "Root", "element_numbers", "numbers_of_both", "over", "row_numbers"]

NONE, MIXED = -1, -2  # of an element that answers for no sample, and for several

_LEVELS = {torch.float64: 128, torch.float32: 64, torch.bfloat16: 16, torch.float16: 4}  # powers of two in use


class Root(NamedTuple):
    """A tensor of numbered elements; owners: the sample of each, broadcastable to `like`; -1: of none."""

    edge: GradientEdge | Tensor
    like: Tensor
    owners: Tensor


def element_numbers(roots: Sequence[Root], n: int, ends: Sequence[GradientEdge | Tensor]) -> list[Tensor | None]:
    """For each end, the sample that every element answers for, NONE or MIXED; None where no root depends on it."""
    return _element_numbers(_pulled(roots, n, ends), range(len(ends)))


def row_numbers(roots: Sequence[Root], n: int, uses: Sequence[Use]) -> list[Tensor]:
    """The sample of each row of uses' outputs, of size 1 along the axes of features; NONE or MIXED."""
    pulled = _pulled(roots, n, [use.edge for use in uses])
    found = [_rows_at_once(use, pulled, i) for i, use in enumerate(uses)]
    rest = [i for i, rows in enumerate(found) if rows is None]
    for i, elements in zip(rest, _element_numbers(pulled, rest) if rest else (), strict=True):
        assert elements is not None
        found[i] = over(_features(uses[i]), elements)
    return [rows for rows in found if rows is not None]


class _Pulled(NamedTuple):
    """Products with cotangents of the roots, and with the same times powers of two that tell a digit of the samples.

    plain: at each end. scaled: for each digit, its place and what arrives at each end.
    """

    roots: Sequence[Root]
    n: int
    ends: Sequence[GradientEdge | Tensor]
    sent: list[Tensor]
    levels: int
    plain: list[Tensor | None]
    scaled: list[tuple[int, list[Tensor | None]]]


def _pulled(roots: Sequence[Root], n: int, ends: Sequence[GradientEdge | Tensor]) -> _Pulled:
    levels = min((_LEVELS.get(root.like.dtype, 16) for root in roots), default=16)
    if not roots or not ends:
        return _Pulled(roots, n, ends, [], levels, [None] * len(ends), [])
    generator = torch.Generator().manual_seed(0)
    sent = [_noise(root, generator) for root in roots]
    edges = [root.edge for root in roots]
    plain = pull(edges, sent, ends)
    scaled = []
    for place in _places(n, levels):
        powers = [
            (root.owners.clamp(min=0) // place % levels).to(x.dtype).exp2() for root, x in zip(roots, sent, strict=True)
        ]
        scaled.append((place, pull(edges, [x * p for x, p in zip(sent, powers, strict=True)], ends)))
    return _Pulled(roots, n, ends, sent, levels, plain, scaled)


def _rows_at_once(use: Use, pulled: _Pulled, i: int) -> Tensor | None:
    """The sample of each row, read off its largest element and true of all of them; None where it is not."""
    g = pulled.plain[i]
    if g is None:
        return torch.full([1] * len(use.call.out_shape), NONE)
    largest = _largest(use, g)
    number = torch.where(largest == 0, NONE, 0)
    for place, scaled in pulled.scaled:
        h = scaled[i]
        assert h is not None
        digit = _digit(_largest(use, h) / largest, pulled.levels)
        if h.numel() and not bool((h - g * digit.to(g.dtype).exp2()).abs().amax() == 0):
            return None
        number = torch.where(largest == 0, NONE, number + digit.long() * place)
    return number


def _largest(use: Use, g: Tensor) -> Tensor:
    axes = _features(use)
    return g.abs().amax(axes, keepdim=True) if axes and g.numel() else g.abs()


def _features(use: Use) -> list[int]:
    """The axes of a use's output along which no samples lie."""
    return [a for a in range(len(use.call.out_shape)) if a not in free_axes(use)]


def _element_numbers(pulled: _Pulled, at: Sequence[int]) -> list[Tensor | None]:
    """The numbers of elements at some of the ends."""
    plain = [pulled.plain[i] for i in at]
    found = [None if g is None else torch.full(g.shape, NONE, device=g.device) for g in plain]
    exact = True
    for place, scaled in pulled.scaled:
        for number, g, i in zip(found, plain, at, strict=True):
            h = scaled[i]
            if number is None or g is None or h is None:
                continue
            exact &= _read_digit(number, g, h, place, pulled.levels)
    return found if exact else _by_halves(pulled.roots, pulled.sent, pulled.n, [pulled.ends[i] for i in at])


def _digit(factor: Tensor, levels: int) -> Tensor:
    return factor.abs().log2().round().nan_to_num(0, 0, 0).clamp(0, levels - 1)


def _read_digit(number: Tensor, g: Tensor, h: Tensor, place: int, levels: int) -> bool:
    """Add one digit to the numbers; False where a factor is a power of two up to rounding alone, so that it is open."""
    answers = g != 0
    digit = _digit(h / g, levels)
    wanted = g * digit.to(g.dtype).exp2()
    same = (h == wanted) | ~torch.isfinite(g)
    near = (h - wanted).abs() <= 64 * torch.finfo(g.dtype).eps * h.abs()
    number.copy_(torch.where(answers & (number == NONE), 0, number))
    number.add_(torch.where(answers & (number >= 0), digit.long() * place, 0))
    number.copy_(torch.where((answers & ~same) | (~answers & (h != 0)), MIXED, number))
    return not bool((near & ~same & answers).any())


def _by_halves(
    roots: Sequence[Root], sent: Sequence[Tensor], n: int, ends: Sequence[GradientEdge | Tensor]
) -> list[Tensor | None]:
    """The same by two products for each bit of the numbers: from the samples that have it, and from the others."""
    found: list[Tensor | None] = [None] * len(ends)
    for bit in range(max(1, (n - 1).bit_length())):
        answers = []
        for has in (1, 0):
            masks = [((root.owners >> bit) & 1) == has for root in roots]
            masked = [x * m for x, m in zip(sent, masks, strict=True)]
            answers.append(pull([root.edge for root in roots], masked, ends))
        for i, (one, other) in enumerate(zip(*answers, strict=True)):
            if one is None or other is None:
                continue
            number = found[i]
            if number is None:
                found[i] = number = torch.full(one.shape, NONE, device=one.device)
            hit, miss = one != 0, other != 0
            number.copy_(torch.where((hit | miss) & (number == NONE), 0, number))
            number.add_(torch.where(hit & (number >= 0), 1 << bit, 0))
            number.copy_(torch.where(hit & miss, MIXED, number))
    return found


def over(axes: Sequence[int], elements: Tensor) -> Tensor:
    """The sample that all elements along some axes answer for, as far as they answer, of size 1 there."""
    if not axes:
        return elements
    high = elements.amax(list(axes), keepdim=True)
    low = torch.where(elements == NONE, high, elements).amin(list(axes), keepdim=True)
    return torch.where(low == high, high, MIXED)


def numbers_of_both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The numbers of elements that answer for the terms of two losses."""
    if one is None or other is None:
        return other if one is None else one
    both = torch.where(one == NONE, other, one)
    return torch.where((one != NONE) & (other != NONE) & (one != other), MIXED, both)


def _noise(root: Root, generator: torch.Generator) -> Tensor:
    """Random cotangents; zero where an element belongs to no sample."""
    x = away_from_zero(root.like.shape, generator, torch.float64)
    return x.to(root.like) * (root.owners >= 0)


def _places(n: int, levels: int) -> Iterator[int]:
    place = 1
    while place < max(n, 2):
        yield place
        place *= levels
