"""Convolutions in 1 to 3 dimensions and their transposes: the input rows are its windows.

A transposed convolution is the convolution of the input, with zeros stuffed between its places, with
the flipped kernel (Dumoulin and Visin 2016, section 4); so Z = W A holds for it as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise import tensors
from layerwise.ops.arguments import bind, count, plain
from layerwise.ops.base import Call, Slot
from layerwise.ops.elementwise import BiasSlot
from layerwise.rows.base import Rows, Samples, Windows
from layerwise.rows.cost import grouped_is_cheaper

__all__ = ["FUNCTIONS", "ConvSlot", "slots"]


class Geometry(NamedTuple):
    """Arguments of a convolution as they were given; `output_padding` is None unless transposed."""

    dims: int
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    output_padding: Any = None

    def tuples(self, kernel: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, int]]]:
        """Stride and dilation of the windows, and the zeros (left, right) added along each axis."""
        stride, dilation = _spread(self.stride, self.dims), _spread(self.dilation, self.dims)
        span = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if self.padding == "valid":
            return stride, dilation, [(0, 0)] * self.dims
        if self.padding == "same":  # torch puts the odd one to the right
            return stride, dilation, [(s // 2, s - s // 2) for s in span]
        padding = _spread(self.padding, self.dims)
        if self.output_padding is None:
            return stride, dilation, [(p, p) for p in padding]
        extra = _spread(self.output_padding, self.dims)
        edges = [(s - p, s - p + e) for s, p, e in zip(span, padding, extra, strict=True)]
        return (1,) * self.dims, dilation, edges


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * (dims if len(value) == 1 else 1)


class ConvSlot(Slot):
    """The kernel of a convolution. An input without a batch axis has no axis for samples."""

    def __init__(self, used: Tensor, x: Tensor, geometry: Geometry, out_shape: torch.Size) -> None:
        self.used = used
        self._x, self._geometry, self._out_shape = x, geometry, out_shape
        self._batched = len(out_shape) == geometry.dims + 2
        self.axes = (0,) if self._batched else ()

    def _padded(self) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
        """The input with all its zeros, and the stride and dilation of the windows in it."""
        geometry, dims = self._geometry, self._geometry.dims
        x = self._x.detach().to(self.used.dtype)
        x = x if self._batched else x.unsqueeze(0)
        stride, dilation, edges = geometry.tuples(self.used.shape[2:])
        if geometry.output_padding is not None:
            steps = _spread(geometry.stride, dims)
            if any(s > 1 for s in steps):
                sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], steps, strict=True)]
                stuffed = x.new_zeros(*x.shape[:2], *sizes)
                places: list[slice] = [slice(None, None, s) for s in steps]
                stuffed[(slice(None), slice(None), *places)] = x
                x = stuffed
        if any(e != (0, 0) for e in edges):
            x = F.pad(x, [n for edge in reversed(edges) for n in edge])  # negative ones crop
        return x, stride, dilation

    def rows(self, g: Tensor, samples: Samples | None) -> Rows:
        """The rows of a cotangent; the windows of one sample at a time, where samples follow one another."""
        if samples is None or not samples.n_major or not samples.n:
            return super().rows(g, samples)
        padded: list[tuple[Tensor, tuple[int, ...], tuple[int, ...]]] = []  # made once, where it is read

        def make(low: int, high: int) -> Tensor:
            if not padded:
                padded.append(self._padded())
            x, stride, dilation = padded[0]
            each = x.shape[0] // samples.n
            part = Samples(high - low, samples.axis)
            return self._windows(x[low * each : high * each], stride, dilation, part)

        y = self.output(g, samples)
        i = self._x.shape[-self._geometry.dims - 1] // self._geometry.groups * math.prod(self.used.shape[2:])
        fits = self._has_grouped(samples) and grouped_is_cheaper(y.shape[2], y.shape[4], i)
        return Windows(make, y, i, self.grouped if fits else None)

    def _has_grouped(self, samples: Samples) -> bool:
        """Whether torch has a fast kernel for `grouped`."""
        geometry, used = self._geometry, self.used
        plain = geometry.output_padding is None and self._batched and samples.n == self._x.shape[0]
        same = self._x.dtype == used.dtype == torch.float32 and used.device.type == "cpu"
        return plain and same and not isinstance(geometry.padding, str) and torch.backends.mkldnn.is_available()

    def grouped(self, g: Tensor, low: int, high: int) -> Tensor:
        """`D[n,K,O,I]` of cotangent rows `[n,T,K,O]`: a convolution with a group for each sample and group."""
        geometry, dims, n = self._geometry, self._geometry.dims, high - low
        x = self._x[low:high].detach()
        g = g.permute(0, 2, 3, 1).reshape(1, -1, *self._out_shape[2:])
        x, kernel = x.reshape(1, -1, *x.shape[2:]), self.used.shape
        weight = g.new_empty(g.shape[1], *kernel[1:])  # its values are not read
        stride, padding, dilation = (_spread(v, dims) for v in (geometry.stride, geometry.padding, geometry.dilation))
        d = torch.ops.aten.convolution_backward(
            g, x, weight, None, stride, padding, dilation, False, (0,) * dims, n * geometry.groups, (False, True, False)
        )[1]
        return d.reshape(n, geometry.groups, kernel[0] // geometry.groups, -1)

    def input(self, samples: Samples | None) -> Tensor:
        """Input rows `[N,T,K,I]`, I running over channels, then the kernel; in memory `[k,i,n,t]`."""
        return self._windows(*self._padded(), samples)

    def _windows(
        self, x: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...], samples: Samples | None
    ) -> Tensor:
        dims, (b, c), step = self._geometry.dims, x.shape[:2], x.stride()
        kernel, places = self.used.shape[2:], self._out_shape[-self._geometry.dims :]
        n, t, k = b, math.prod(places), self._geometry.groups
        view = x.as_strided(
            (b, c, *kernel, *places),
            (*step[:2], *(s * d for s, d in zip(step[2:], dilation, strict=True)),
             *(s * d for s, d in zip(step[2:], stride, strict=True))),
            x.storage_offset(),
        )  # fmt: skip
        # the one copy: [k,i,n,t] keeps runs of t whole, and serves products over t and over n,t
        if samples is None:
            view = view.movedim(0, 1 + dims)
        else:
            n, t = samples.n, t * (b // samples.n)
            view = samples.split(view, 0).movedim((0, 1), (1 + dims, 2 + dims))
        if math.prod(kernel) > 1:  # else there may be nothing to copy
            view = tensors.empty(view.shape, view).copy_(view)
        return view.reshape(k, c // k * math.prod(kernel), n, t).permute(2, 3, 0, 1)

    def output(self, g: Tensor, samples: Samples | None) -> Tensor:
        """Cotangent rows `[V,N,T,K,O]`, a view of a contiguous cotangent."""
        g = g.to(self.used.dtype)
        g = g if self._batched else g.unsqueeze(1)
        k, places = self._geometry.groups, math.prod(g.shape[3:])
        o = g.shape[2] // k
        if samples is None:
            g = g.reshape(*g.shape[:2], k, o, places)
            return g.permute(0, 1, 4, 2, 3)
        g = samples.split(g, 1)
        v, n, r = g.shape[:3]
        g = g.reshape(v, n, r, k, o, places).permute(0, 1, 2, 5, 3, 4)
        return g.squeeze(2) if r == 1 else g.flatten(2, 3)  # r = 0: no rows at all

    def matrix(self, used: Tensor) -> Tensor:
        """The kernel as `[K,O,I]`, flipped where the convolution is transposed."""
        groups = self._geometry.groups
        if self._geometry.output_padding is None:
            return used.reshape(groups, used.shape[0] // groups, -1)
        used = used.flip(tuple(range(2, used.ndim))).unflatten(0, (groups, -1)).transpose(1, 2)
        return used.reshape(groups, used.shape[1], -1)

    def fold(self, w: Tensor) -> Tensor:
        """Carry `[..., K,O,I]` back to the kernel's shape."""
        lead, groups, shape = w.shape[:-3], self._geometry.groups, self.used.shape
        if self._geometry.output_padding is None:
            return w.reshape(*lead, *shape)
        w = w.reshape(*lead, groups, shape[1], shape[0] // groups, *shape[2:])
        w = w.transpose(len(lead) + 1, len(lead) + 2).reshape(*lead, *shape)
        return w.flip(tuple(range(-self._geometry.dims, 0)))


_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
FUNCTIONS: dict[Callable[..., Any], tuple[int, bool]] = {
    **{func: (d, False) for d, func in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), 1)},
    **{
        func: (d, True)
        for d, func in enumerate((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), 1)
    },
}


def slots(call: Call, used: Sequence[Tensor]) -> list[Slot | None]:
    """The slots of a convolution's kernel and bias; None for any other tensor."""
    dims, transposed = FUNCTIONS[call.func]
    if transposed:
        bound = bind(call, _TRANSPOSED, (None, None, None, 1, 0, 0, 1, 1))
    else:
        bound = bind(call, _NAMES, (None, None, None, 1, 0, 1, 1))
    if bound is None:
        return [None] * len(used)
    x, weight, bias, stride, padding = bound[:5]
    if transposed:
        geometry = Geometry(dims, stride, padding, bound[7], bound[6], bound[5])
    else:
        geometry = Geometry(dims, stride, padding, bound[5], bound[6])
    out: list[Slot | None] = []
    for u in used:
        if not plain(u) or count(bound[:3], u) != 1 or u is x:
            out.append(None)
        elif u is weight:
            out.append(ConvSlot(u, x, geometry, call.out_shape))
        else:
            batched = len(call.out_shape) == dims + 2
            out.append(BiasSlot(u, int(batched), (0,) if batched else (), call.out_shape))
    return out
