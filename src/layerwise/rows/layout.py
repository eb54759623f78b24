"""How the tensor that a use reads is a matrix, and where that matrix lies in its parameter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.rows.views import Map

__all__ = [
    "LONG_SIDE",
    "Laid",
    "Matrix",
    "Places",
    "dense_laid",
    "dense_matrix",
    "dense_sides",
    "grouped",
    "rest_of",
    "same_places",
]

LONG_SIDE = 2**14  # of a matrix of per-sample gradients, beyond which its factor is a diagonal


class Matrix(NamedTuple):
    """How a parameter, or a slice of it, is a matrix `[K,O,I]`. Holds no data.

    fold: `[..., K,O,I]` to `[..., *shape]`, zero outside the slice; matrix: its left inverse.
    bias: where its inputs are the constant 1. partner: the bias that all its uses add to its rows, where known.
    """

    fold: Map
    matrix: Map
    bias: bool
    partner: str | None = None


class Laid(NamedTuple):
    """How a parameter's gradient gives Kronecker factors, one pair for each of its matrices.

    form: "rows", the inputs and cotangents of its uses as one matrix; "slices", those of uses that read disjoint
    slices of it; "gradients", the gradients of single samples. rest: the elements that no use reads, or None.
    """

    form: str
    matrices: tuple[Matrix, ...]
    rest: Matrix | None = None

    def same(self, other: Laid, shape: torch.Size) -> bool:
        """Whether both have the same form and the same matrices."""
        if self.form != other.form or len(self.matrices) != len(other.matrices):
            return False
        pairs = zip(self.matrices, other.matrices, strict=True)
        return all(same_places(one.matrix, two.matrix, shape) for one, two in pairs)


@dataclass(frozen=True)
class Indices:
    """A long row of places, with a short repr that differs where they do."""

    values: Tensor

    def __repr__(self) -> str:
        return hashlib.sha256(self.values.numpy().tobytes()).hexdigest()


class Places(NamedTuple):
    """A `Matrix` as the places of its elements in the parameter, which can be sent to another process.

    shape: [K,O,I]; view: strides and offset, where it is a view of contiguous memory; flat: else the places.
    """

    shape: tuple[int, ...]
    view: tuple[tuple[int, ...], int] | None
    flat: Indices | None
    bias: bool
    partner: str | None

    @classmethod
    def of(cls, matrix: Matrix, shape: torch.Size) -> Places:
        """Those of a matrix of a parameter of some shape."""
        found = _as_view(matrix.matrix, shape)
        if found is not None:
            return cls(tuple(found[0]), (tuple(found[1]), int(found[2])), None, matrix.bias, matrix.partner)
        places = matrix.matrix(torch.arange(shape.numel()).reshape(shape))
        return cls(tuple(places.shape), None, Indices(places.flatten()), matrix.bias, matrix.partner)

    def restored(self, shape: torch.Size) -> Matrix:
        """The matrix of a parameter of that shape."""
        if self.flat is not None:
            places = self.flat.values
        else:
            assert self.view is not None
            places = torch.arange(shape.numel()).as_strided(self.shape, *self.view).flatten()
        return _at(places, self.shape, shape)._replace(bias=self.bias, partner=self.partner)


# -- matrices -----------------------------------------------------------------------------------------------


def grouped(matrices: Sequence[Map], shape: torch.Size) -> list[list[int]] | None:
    """Which of several maps `matrix` of a parameter are the same; None where two that differ share an element."""
    if len(matrices) == 1:
        return [[0]]
    elements = torch.arange(shape.numel()).reshape(shape)
    places = [matrix(elements) for matrix in matrices]
    groups: list[list[int]] = []
    for i, mine in enumerate(places):
        for group in groups:
            if torch.equal(places[group[0]], mine):
                group.append(i)
                break
        else:
            groups.append([i])
    if len(groups) > 1:
        shown = torch.cat([places[group[0]].flatten() for group in groups])
        if len(shown.unique()) < len(shown):
            return None
    return groups


def same_places(one: Map, other: Map, shape: torch.Size) -> bool:
    """Whether two maps `matrix` of a parameter are the same."""
    mine, its = _as_view(one, shape), _as_view(other, shape)
    if mine is not None and mine == its:
        return True
    elements = torch.arange(shape.numel()).reshape(shape)
    return torch.equal(one(elements), other(elements))


def _as_view(matrix: Map, shape: torch.Size) -> tuple[Any, ...] | None:
    """Shape, strides and offset of a map's result where that is a view of what it gets."""
    memory = torch.empty(shape, device="meta")
    found = matrix(memory)
    return (found.shape, found.stride(), found.storage_offset()) if found._base is memory else None


def rest_of(matrices: Sequence[Matrix], shape: torch.Size) -> Matrix | None:
    """The elements of a parameter that stand in none of the matrices, as `[1,1,I]`; None where there are none."""
    elements = torch.arange(shape.numel()).reshape(shape)
    missing = torch.ones(shape.numel(), dtype=torch.bool)
    for matrix in matrices:
        missing[matrix.matrix(elements).flatten()] = False
    if not missing.any():
        return None
    index = missing.nonzero()[:, 0]
    return _at(index, (1, 1, len(index)), shape)


def _at(index: Tensor, laid: Sequence[int], shape: torch.Size) -> Matrix:
    """The matrix of the elements at some flat places of a parameter."""

    def fold(w: Tensor) -> Tensor:
        lead, places = w.shape[:-3], index.to(w.device)
        return w.new_zeros(*lead, shape.numel()).index_copy_(-1, places, w.flatten(-3)).view((*lead, *shape))

    return Matrix(fold, lambda p: p.reshape(-1)[index.to(p.device)].view(*laid), False)


def dense_sides(shape: torch.Size) -> tuple[int, int, bool]:
    """(O, I, turned) of `dense_matrix`: whether I runs over the first axis."""
    rows = shape[0] if shape else 1
    columns = shape[1:].numel() if shape else 1
    if rows > max(columns, LONG_SIDE):
        return columns, rows, True
    return rows, columns, False


def dense_matrix(shape: torch.Size) -> Matrix:
    """A parameter as one matrix `[1,O,I]`, the first axis by the rest; a vector is a column.

    A matrix with a side over `LONG_SIDE` has the longer one for I.
    """
    o, i, turned = dense_sides(shape)
    if turned:
        return Matrix(
            lambda w: w.transpose(-1, -2).reshape((*w.shape[:-3], *shape)),
            lambda p: p.reshape(1, i, o).transpose(1, 2),
            False,
        )
    return Matrix(lambda w: w.reshape((*w.shape[:-3], *shape)), lambda p: p.reshape(1, o, i), i == 1)


def dense_laid(shape: torch.Size) -> Laid:
    """The form of a parameter whose factors are made from the gradients of single samples."""
    return Laid("gradients", (dense_matrix(shape),))
