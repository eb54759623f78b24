"""Random projections of per-sample gradients from the rows: sketches of a matrix, and rank-one sign matrices.

A tensor sketch adds the elements of a matrix, with random signs, into `dim` numbers. Place and sign of an element are
those of its row and its column together, so that a matrix of one position, g a^T, is the circular convolution of a
sketch of g with one of a, and needs not be formed where there are few positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from layerwise.rows.base import Rows
from layerwise.rows.cost import convolution_is_cheaper
from layerwise.rows.layout import MatrixLayout
from layerwise.rows.pieces import chunks, dims, ranges
from layerwise.tensors import without_grad

__all__ = ["TensorSketch", "in_layout", "signs"]


def signs(name: str, shape: Sequence[int], count: int, seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Independent random signs `[count,R]` and `[count,C]` for a parameter, the same for the same name and seed.

    R is the first axis of `shape` and C all others together; a parameter of one axis has C = 1 with the sign 1.
    Type and device are those of `like`; the draw itself is made on the CPU.
    """
    (r, c), generator = _sides(shape), _generator(name, seed)
    left = torch.randint(2, (count, r), generator=generator).mul_(2).sub_(1)
    right = torch.randint(2, (count, c), generator=generator).mul_(2).sub_(1) if c > 1 else torch.ones(count, 1)
    return left.to(like), right.to(like)


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    shape = torch.Size(shape)
    return (shape[0], shape[1:].numel()) if len(shape) > 1 else (shape.numel(), 1)


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def in_layout(left: Tensor, right: Tensor, layout: MatrixLayout) -> tuple[Tensor, Tensor, bool] | None:
    """Values of rows `[J,R]` and of columns `[J,C]` of a parameter by those of its uses' layout, `[J,K,O]`, `[J,K,I]`.

    With them, whether the first of the two is made of `right`. None where they do not factor in that layout.
    """
    found = _places(layout, right.shape[1])
    if found is None:
        return None
    out, into, turned = found
    outer, inner = (right, left) if turned else (left, right)
    return outer[:, out.to(left.device)], inner[:, into.to(left.device)], turned


@lru_cache(maxsize=2**10)
def _places(layout: MatrixLayout, columns: int) -> tuple[Tensor, Tensor, bool] | None:
    """The row and the column of the parameter at each O and I of a layout, and whether O runs over columns."""
    place = layout.places()
    if not place.numel():
        return None
    row, column = place // columns, place % columns
    for out, into, turned in ((row, column, False), (column, row, True)):
        if bool((out == out[:, :, :1]).all()) and bool((into == into[:, :1]).all()):
            return out[:, :, 0].clone(), into[:, 0].clone(), turned
    return None


@dataclass(frozen=True)
class TensorSketch:
    """A linear map of a parameter, as a matrix `[R,C]` (the first axis, and all others), to `dim` numbers.

    S(D)_j = sum of u_r v_c D[r,c] over all r, c with h_r + k_c = j modulo dim.
    rows: h and u, int64 `[2,R]`; columns: k and v, int64 `[2,C]`.
    Source: Pham and Pagh (2013), "Fast and scalable polynomial kernels via explicit feature maps", section 3.
    """

    dim: int
    rows: Tensor
    columns: Tensor

    @classmethod
    def drawn(cls, name: str, shape: Sequence[int], dim: int, seed: int, device: torch.device) -> TensorSketch:
        """Places and signs for a parameter, the same for the same name and seed on every device."""
        generator = _generator(name, seed)
        r, c = (_drawn(n, dim, generator) for n in _sides(shape))
        if c.shape[1] == 1:  # a vector: nothing to tell apart
            c = torch.tensor([[0], [1]])
        return cls(dim, r.to(device), c.to(device))

    def matrix(self, like: Tensor) -> Tensor:
        """The map as a matrix `[dim, R·C]`, in the type of `like`."""
        size = self.rows.shape[1] * self.columns.shape[1]
        return self.of_gradients(torch.eye(size).to(like)[None])[0].T

    @without_grad
    def of_gradients(self, g: Tensor) -> Tensor:
        """`[V,N,dim]`: sketches of per-sample gradients `[V,N,R·C]` in the parameter's own order."""
        place, sign = self._elements(self.rows[:, None], self.columns[:, None], g)
        return self._added(g * sign, place)

    def forms(self, rows: Rows) -> bool:
        """Whether `of_rows` forms the per-sample gradients of a float input, for Fourier transforms cost more."""
        _, _, t, _, o, i = dims(rows)
        known = rows.g.dtype in (torch.float32, torch.float64)  # of which all devices have a Fourier transform
        return not (known and rows.laid_out and convolution_is_cheaper(t, o, i, self.dim))

    @without_grad
    def of_rows(self, rows: Rows, layout: MatrixLayout, sums: Tensor | None = None) -> Tensor | None:
        """`[V,N,dim]`: sketches of the per-sample gradients of rows, without those of more than a few samples at once.

        None where the elements of the layout do not factor. sums: for a float input, `[K,O,I]` to which the sum of
        these gradients over v and n is added. Raises `BadInput` where the rows contradict each other.
        """
        factors = in_layout(self.rows, self.columns, layout)
        if factors is None:
            return None
        out, into, _ = factors
        v, n, *_ = dims(rows)
        if rows.a is None:
            place, sign = self._elements(out, into, rows.g)
            return self._added(rows.g.sum(2).flatten(2) * sign, place)
        if not rows.a.is_floating_point():
            return self._of_index(rows.a, rows.g, out, into)
        if sums is None and not self.forms(rows):
            return self._convolved(rows.a, rows.g, out, into)
        place, sign = self._elements(out, into, rows.g)
        result = rows.g.new_empty(v, n, self.dim)
        for w, low, high, d in chunks(rows):
            if sums is not None:
                sums += d.sum(0)
            result[w, low:high] = self._added(d.flatten(1).mul_(sign), place)
        return result

    def _elements(self, out: Tensor, into: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The places of all elements of a matrix before they are taken modulo dim, and their signs, both `[K·O·I]`."""
        place = out[0, :, :, None] + into[0, :, None]
        sign = out[1].to(like.dtype)[:, :, None] * into[1].to(like.dtype)[:, None]
        return place.flatten(), sign.flatten()

    def _added(self, values: Tensor, place: Tensor) -> Tensor:
        """`[..., dim]`: signed values `[..., M]` added up by their places."""
        both = values.new_zeros(*values.shape[:-1], 2 * self.dim)
        both.scatter_add_(-1, place.expand(values.shape), values)
        return both[..., : self.dim] + both[..., self.dim :]

    def _of_index(self, index: Tensor, g: Tensor, out: Tensor, into: Tensor) -> Tensor:
        """Of an input that is a look-up, one row of O elements for each position."""
        place = (into[0, 0][index][:, :, None] + out[0, 0]).flatten(1)
        sign = into[1, 0][index][:, :, None] * out[1, 0]
        return self._added((g[:, :, :, 0] * sign).flatten(2), place)

    def _convolved(self, a: Tensor, g: Tensor, out: Tensor, into: Tensor) -> Tensor:
        """Of each position by the transforms of the sketches of its input and its cotangent."""
        v, n, t, k, _ = g.shape
        result = g.new_empty(v, n, self.dim)
        for low, high in ranges(n, 4 * t * k * self.dim * g.element_size(), g):
            inputs = self._transformed(a[low:high], into)
            for w in range(v):
                product = self._transformed(g[w, low:high], out).mul_(inputs).sum((1, 2))
                result[w, low:high] = torch.fft.irfft(product, self.dim)
        return result

    def _transformed(self, x: Tensor, side: Tensor) -> Tensor:
        """`[n,T,K,dim/2+1]`: transforms of sketches of rows x `[n,T,K,F]`, by the places and signs of their side."""
        sketch = x.new_zeros(*x.shape[:-1], self.dim)
        sketch.scatter_add_(-1, side[0].expand(x.shape), x * side[1].to(x.dtype))
        return torch.fft.rfft(sketch)


def _drawn(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Places and signs, int64 `[2,count]`."""
    places = torch.randint(dim, (count,), generator=generator)
    return torch.stack([places, torch.randint(2, (count,), generator=generator).mul_(2).sub_(1)])
