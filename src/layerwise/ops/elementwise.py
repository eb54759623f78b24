"""Tensors that enter the output element by element: biases, bare parameters, parts of a `cat`.

The output is `Z = used * A + rest` with `used` broadcast; `A` is the derivative of the call by the
broadcast tensor. The output's axes are K where `used` varies, positions where it is repeated; O = I = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import SamplesMixed
from layerwise.ops.arguments import bind, count, expanded, plain, replace, writes_first
from layerwise.ops.base import Call, Slot
from layerwise.rows.base import Samples

__all__ = ["DECOMPOSITIONS", "FUNCTIONS", "BiasSlot", "ElementwiseSlot", "one_by_one", "refused", "shift", "slots"]


class BiasSlot(Slot):
    """A vector added along one axis of the output: K = 1, O its length, the input the constant 1."""

    bias = True
    by_view = True

    def __init__(self, used: Tensor, feature: int, axes: Sequence[int], out_shape: torch.Size) -> None:
        self.used, self.axes = used, axes
        self._feature, self._out_shape = feature, out_shape

    def input(self, samples: Samples | None) -> None:
        """None: the constant 1."""
        return None

    def output(self, g: Tensor, samples: Samples | None) -> Tensor:
        """Cotangent rows `[V,N,T,1,O]`."""
        positions = [a for a in range(len(self._out_shape)) if a != self._feature]
        x = _positions_first(g.to(self.used.dtype), 1, positions, [self._feature], samples, self._out_shape)
        return x.unsqueeze(-2)

    def matrix(self, used: Tensor) -> Tensor:
        """The vector as `[1,O,1]`."""
        return used.reshape(1, -1, 1)

    @property
    def arrangement(self) -> Hashable:
        """The only one."""
        return "vector"

    def fold(self, w: Tensor) -> Tensor:
        """Carry `[..., 1,O,1]` to `[..., O]`."""
        return w.reshape(*w.shape[:-3], -1)


class ElementwiseSlot(Slot):
    """A tensor broadcast against the output, or against a region of it.

    view: the tensor's shape with an axis for each of the output's, 1 where it is repeated.
    derivative: a constant, or a function that gives A with the output's shape.
    region: (axis, start), the part of the output that the tensor fills (`cat`); None is all of it.
    """

    elementwise = True
    by_view = True

    def __init__(
        self,
        used: Tensor,
        view: tuple[int, ...],
        out_shape: torch.Size,
        derivative: float | Callable[[], Tensor],
        *,
        region: tuple[int, int] | None = None,
        aligned: bool = True,
        linear: bool = True,
    ) -> None:
        self.used, self.linear = used, linear
        self.bias = isinstance(derivative, (int, float)) and derivative == 1
        if region is not None:
            fill = list(out_shape)
            fill[region[0]] = view[region[0]]
            out_shape = torch.Size(fill)
        self._view, self._shape, self._region, self._derivative = view, out_shape, region, derivative
        self._repeated = [a for a, n in enumerate(view) if n == 1]
        self._own = [a for a, n in enumerate(view) if n != 1]
        if aligned and self._own:
            skip = -1 if region is None else region[0]
            self.aligned = {a: self._own_axis(a) for a in self._own if a != skip}
        self.axes = sorted([*self._repeated, *self.aligned])
        if region is not None:
            self.axes = [a for a in self.axes if a != region[0]]

    def _own_axis(self, axis: int) -> int:
        """The axis of `used` that lies along an output axis."""
        # both shapes hold the same sizes other than 1, in the same order
        place = self._own.index(axis)
        return [d for d, n in enumerate(self.used.shape) if n != 1][place]

    def _rows(self, x: Tensor, lead: int, samples: Samples | None) -> Tensor:
        if samples is not None and samples.axis not in self._repeated:
            raise SamplesMixed(
                f"rows were asked for samples along axis {samples.axis} of an output of shape "
                f"{tuple(self._shape)}, along which the tensor itself varies; use dense()"
            )
        x = _positions_first(x, lead, self._repeated, self._own, samples, self._shape)
        return x.unsqueeze(-1)

    def input(self, samples: Samples | None) -> Tensor | None:
        """Derivative rows `[N,T,K,1]`; None where they are the constant 1."""
        if self.bias:
            return None
        if isinstance(self._derivative, (int, float)):
            # one number under strides of 0
            return self._rows(self.used.new_full((), self._derivative).expand(self._shape), 0, samples)
        return self._rows(self._derivative().to(self.used.dtype), 0, samples)

    def output(self, g: Tensor, samples: Samples | None) -> Tensor:
        """Cotangent rows `[V,N,T,K,1]`."""
        if self._region is not None:
            axis, start = self._region
            g = g.narrow(axis + 1, start, self._shape[axis])
        return self._rows(g.to(self.used.dtype), 1, samples)

    def matrix(self, used: Tensor) -> Tensor:
        """The tensor as `[K,1,1]`."""
        return used.reshape(-1, 1, 1)

    def fold(self, w: Tensor) -> Tensor:
        """Carry `[..., K,1,1]` to the tensor's shape."""
        return w.reshape((*w.shape[:-3], *self.used.shape))


def _positions_first(
    x: Tensor,
    lead: int,
    positions: Sequence[int],
    features: Sequence[int],
    samples: Samples | None,
    shape: torch.Size,
) -> Tensor:
    """`[lead.., *shape]` to `[lead.., N,T,C]`, the samples' axis (or the first position) in N."""
    first = positions[0] if samples is None and positions else None if samples is None else samples.axis
    rest = [a for a in positions if a != first]
    order = ([] if first is None else [first]) + rest + list(features)
    n = 1 if first is None else shape[first]
    t, c = math.prod(shape[a] for a in rest), math.prod(shape[a] for a in features)
    if order != list(range(len(shape))):
        x = x.permute([*range(lead), *(lead + a for a in order)])
    if samples is not None:
        t *= n // samples.n
        x, n = samples.split(x, lead), samples.n
    return x.reshape(*x.shape[:lead], n, t, c)


def _aligned_view(shape: Sequence[int], out_shape: torch.Size) -> tuple[int, ...] | None:
    """A shape with ones in front, where it broadcasts to the output's; else None."""
    view = (1,) * (len(out_shape) - len(shape)) + tuple(shape)
    fits = len(view) == len(out_shape) and all(a in (1, b) for a, b in zip(view, out_shape, strict=True))
    return view if fits else None


def shift(used: Tensor, argument: Tensor, out_shape: torch.Size, factor: float) -> Slot | None:
    """The slot of a tensor that is multiplied by a number and added to the output, broadcast."""
    view = _aligned_view(argument.shape, out_shape)
    return None if view is None else ElementwiseSlot(used, view, out_shape, factor)


# the number that an argument of a sum is multiplied by: (first, second), without alpha
_SUMS = {"add": (1, 1), "sub": (1, -1), "subtract": (1, -1), "rsub": (-1, 1), "__rsub__": (-1, 1)}
_SUMS |= {"__add__": (1, 1), "__radd__": (1, 1), "__iadd__": (1, 1), "__sub__": (1, -1), "__isub__": (1, -1)}
_PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__", "__imul__"}
_LINEAR = {"where", "addcmul", "lerp"}
_QUOTIENTS = {"div", "divide", "true_divide", "__truediv__", "__rtruediv__", "__itruediv__"}
_QUOTIENTS |= {"__div__", "__rdiv__", "__idiv__"}
_OTHERS = {
    "pow", "float_power", "maximum", "minimum", "max", "min", "fmax", "fmin",
    "addcdiv", "atan2", "arctan2", "hypot", "logaddexp", "logaddexp2", "copysign", "xlogy", "clamp", "clip",
    "clamp_min", "clamp_max", "fmod", "remainder", "__pow__", "__rpow__", "__ipow__",
}  # fmt: skip


def _local(call: Call, argument: Tensor) -> Tensor:
    """The derivative of an elementwise call by one of its arguments, with the output's shape."""
    leaf = argument.detach().expand(call.out_shape).requires_grad_()

    def change(x: Tensor) -> Tensor:
        return leaf if x is argument else x.detach()

    args = replace(call.args, change)
    if writes_first(call.func):
        args = (args[0].clone(), *args[1:])
    with torch.enable_grad(), torch.autocast(argument.device.type, enabled=False):
        out = call.func(*args, **replace(call.kwargs, change))
        return torch.autograd.grad(out, leaf, torch.ones_like(out))[0]


def _factor(call: Call, name: str, argument: Tensor) -> float | None:
    """The number a sum multiplies its argument by; None where the call is not a plain sum."""
    pair = _SUMS.get(name)
    if pair is None or len(call.args) + sum(k != "alpha" for k in call.kwargs) != 2:
        return None
    alpha = call.kwargs.get("alpha", 1)
    if len(call.args) == 2:
        first = call.args[0] is argument
    else:
        first = call.kwargs.get("input", call.args[0] if call.args else None) is argument
    scaled = first if name == "rsub" else not first
    return pair[0 if first else 1] * (alpha if scaled else 1)


def _general(name: str, call: Call, argument: Tensor) -> Slot | None:
    base = expanded(argument)
    used, shape = (argument, tuple(argument.shape)) if base is None else base
    view = _aligned_view(shape, call.out_shape)
    if view is None:
        return None
    factor = _factor(call, name, argument)
    if factor is not None:
        return ElementwiseSlot(used, view, call.out_shape, factor)
    if name in _PRODUCTS and len(call.args) == 2:
        other = call.args[1] if call.args[0] is argument else call.args[0]
        if isinstance(other, Tensor) and other is not argument:
            rows = partial(other.detach().expand, call.out_shape)
            return ElementwiseSlot(used, view, call.out_shape, rows)
    dividend = call.args[1:2] if name.startswith("__r") else call.args[:1]
    linear = name in _LINEAR | _PRODUCTS or (name in _QUOTIENTS and count(dividend, argument) == 1)
    linear = linear and count((call.args, call.kwargs), argument) == 1
    return ElementwiseSlot(used, view, call.out_shape, partial(_local, call, argument), linear=linear)


def _masked_fill(call: Call, argument: Tensor) -> Slot | None:
    bound = bind(call, ("input", "mask", "value"), (None, None, None))
    view = _aligned_view(argument.shape, call.out_shape)
    if bound is None or view is None:
        return None
    mask = bound[1] if bound[2] is argument else ~bound[1]
    return ElementwiseSlot(argument, view, call.out_shape, partial(mask.expand, call.out_shape))


def _joined(stack: bool, call: Call, argument: Tensor) -> Slot | None:
    """`cat` and `stack`: the tensor fills a region of the output."""
    bound = bind(call, ("tensors", "dim"), (None, 0))
    if bound is None or not isinstance(bound[1], int):
        return None
    parts, dim = list(bound[0]), bound[1] % len(call.out_shape)
    if any(x.ndim != len(call.out_shape) - stack for x in parts):
        return None  # cat still takes an empty vector among larger tensors
    base = expanded(argument)
    used, shape = (argument, tuple(argument.shape)) if base is None else base
    place = next(j for j, x in enumerate(parts) if x is argument)
    if stack:
        return ElementwiseSlot(used, (*shape[:dim], 1, *shape[dim:]), call.out_shape, 1, region=(dim, place))
    if shape[dim] != argument.shape[dim]:  # repeated along the joined axis itself
        used, shape = argument, tuple(argument.shape)
    start = sum(x.shape[dim] for x in parts[:place])
    return ElementwiseSlot(used, shape, call.out_shape, 1, region=(dim, start))


FUNCTIONS: dict[Callable[..., Any], Callable[[Call, Tensor], Slot | None]] = {
    torch.masked_fill: _masked_fill,
    torch.Tensor.masked_fill: _masked_fill,
    torch.Tensor.masked_fill_: _masked_fill,
}
for _name in ("cat", "concat", "concatenate", "stack"):
    FUNCTIONS[getattr(torch, _name)] = partial(_joined, _name == "stack")
for _name in (*_SUMS, *_PRODUCTS, *_QUOTIENTS, *_LINEAR, *_OTHERS):
    for _owner in (torch, torch.Tensor):
        for _spelt in (_name, _name + "_"):
            if hasattr(_owner, _spelt):
                FUNCTIONS.setdefault(getattr(_owner, _spelt), partial(_general, _name))


def slots(call: Call, used: Sequence[Tensor]) -> list[Slot | None]:
    """The slots of tensors used element by element; None for one that this form does not describe."""
    return one_by_one(FUNCTIONS[call.func], call, used)


def one_by_one(build: Callable[[Call, Tensor], Slot | None], call: Call, used: Sequence[Tensor]) -> list[Slot | None]:
    """The slot that `build` makes for each tensor; None for a tensor that is not dense, strided and real."""
    return [build(call, u) if plain(u) else None for u in used]


def _given(tensors: Sequence[Any]) -> Sequence[Tensor]:
    """The tensors of a call that takes them one by one or as one list."""
    return tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors


def _broadcast_tensors(*tensors: Any) -> tuple[Tensor, ...]:
    """`torch.broadcast_tensors`, by a call for each tensor."""
    given = _given(tensors)
    shape = torch.broadcast_shapes(*(t.shape for t in given))
    return tuple(t.expand(shape) for t in given)


def _meshgrid(*tensors: Any, indexing: str | None = None) -> tuple[Tensor, ...]:
    """`torch.meshgrid`, by calls that return one tensor each."""
    given = _given(tensors)
    grids = _broadcast_tensors([t.reshape(-1, *[1] * (len(given) - 1 - i)) for i, t in enumerate(given)])
    return tuple(g.transpose(0, 1) for g in grids) if indexing == "xy" and len(given) > 1 else grids


def refused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Nothing is refused."""


DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.broadcast_tensors: _broadcast_tensors,
    torch.meshgrid: _meshgrid,
}
