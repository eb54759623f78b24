"""Passes through autograd's graph in which operations on zeros cost nothing.

A vector-Jacobian product of zeros is zero, whatever the graph; what it is wanted for is its own graph, whose derivative
by the cotangent is the Jacobian. So every operation that is linear in a cotangent that is known to be zero gives a zero
that takes no memory, and no time: half of what a product with the Jacobian costs otherwise. Torch's derivative of a
convolution's backward computes two more products with that cotangent, which nobody reads; they cost nothing either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise.errors import Undefined
from layerwise.graph.decisions import decided
from layerwise.tape.modes import dispatch_flags_kept, end_dispatch_modes

__all__ = ["KnownZeros"]

Found = TypeVar("Found")
Shapes = list[Sequence[int] | None]  # of an operation's outputs; None: it has no such output

_PROBE = 256  # elements that are looked at before a whole tensor is
_aten = torch.ops.aten


class KnownZeros(TorchDispatchMode):
    """A mode in which operations that are linear in a tensor of zeros give zeros without being run.

    All such zeros share memory, which stays zero. skipped: the operations that were not run. ended: whether no pass
    runs under the mode, so that it does nothing, where an interrupt keeps it among torch's modes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: set[Any] = set()
        self._plain = self._dense = False
        self.ended = True
        self._held: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._all: list[tuple[int, int, Tensor]] = []  # where they lie; kept, so that nothing else ever lies there

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, torch's default, imports the whole compiler at the first operation

    def run(self, passed: Callable[[], Found], dense: bool = False) -> Found:
        """What a pass gives under the mode; where it writes to such zeros, it is run again with plain ones.

        dense: zeros that differ from plain ones in nothing but their memory. Autograd chooses layouts of derivatives by
        the strides of what it saved. Others are one element, expanded, which nobody adds to in place.
        """
        self._dense = dense
        if not self._plain:
            end_dispatch_modes()
            with suppress(RuntimeError, Undefined):
                self.ended = False
                try:
                    with dispatch_flags_kept(), self:
                        found = passed()
                finally:
                    self.ended = True
                if not any(decided(x.any()) for *_, x in self._all):
                    return found
            self._plain = True
        return passed()

    def zeros(self, like: Tensor, shape: Sequence[int], dense: bool = True) -> Tensor:
        """Zeros of a shape, known as such; plain ones where they are no more than one. dense: as in `run`."""
        shape = torch.Size(shape)
        if self._plain or shape.numel() < 2:
            return like.new_zeros(shape)
        dense = dense and self._dense
        key, size = (like.dtype, like.device), shape.numel() if dense else 1
        held = self._held.get(key)
        if held is None or len(held) < size:
            self._held[key] = held = like.new_zeros(size)
            start = held.data_ptr()
            self._all.append((start, start + held.nbytes, held))
        return held[:size].view(shape) if dense else held[:1].expand(shape)

    def known(self, x: Any) -> bool:
        """Whether a tensor is made of such zeros."""
        if type(x) is not Tensor or x.layout is not torch.strided:
            return False
        place = x.data_ptr()
        return any(start <= place < end for start, end, _ in self._all)

    def vanishes(self, x: Tensor) -> bool:
        """Whether a tensor is zero, known as such or not."""
        if self.known(x):
            return True
        if type(x) is not Tensor or x.layout is not torch.strided or not x.numel() or x.is_meta:
            return False
        held = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        first = x.as_strided((min(_PROBE, x.numel(), held),), (1,))
        return not bool(first.any()) and not bool(x.any())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = None if self.ended else _RULES.get(func)
        if rule is not None and (not kwargs or func is _aten.clone.default):
            shapes = rule(self, args)
            if shapes is not None:
                self.skipped.add(func)
                like = args[0] if isinstance(args[0], Tensor) else args[0][0]
                whole = func is not _aten.mm.default or like.stride(-1) == 1  # the others are gradients of weights
                outputs = tuple(
                    None if shape is None else self.zeros(like, shape, whole and not i)
                    for i, shape in enumerate(shapes)
                )
                return outputs if len(func._schema.returns) > 1 else outputs[0]
        return func(*args, **(kwargs or {}))


# -- what each operation gives for zeros: the shapes of its outputs, or None where it is to be run ---------------


def _mm(mode: KnownZeros, args: Any) -> Shapes | None:
    x, y = args
    return [(*x.shape[:-1], y.shape[-1])] if mode.vanishes(x) or mode.vanishes(y) else None


def _convolution(mode: KnownZeros, args: Any) -> Shapes | None:
    x, w, bias, strides, padding, dilation, transposed, more, groups = args
    if bias is not None or not (mode.vanishes(x) or mode.vanishes(w)):
        return None
    places = []
    for n, k, step, pad, apart, extra in zip(x.shape[2:], w.shape[2:], strides, padding, dilation, more, strict=True):
        span = apart * (k - 1)
        places.append(
            (n - 1) * step - 2 * pad + span + extra + 1 if transposed else (n + 2 * pad - span - 1) // step + 1
        )
    return [(x.shape[0], w.shape[1] * groups if transposed else w.shape[0], *places)]


def _convolution_backward(mode: KnownZeros, args: Any) -> Shapes | None:
    g, x, w, bias, *_, wanted = args
    return _wanted((x.shape, w.shape, bias), wanted) if mode.vanishes(g) else None


def _layer_norm_backward(mode: KnownZeros, args: Any) -> Shapes | None:
    g, x, _, _, _, weight, bias, wanted = args
    shapes = (x.shape, *(None if p is None else p.shape for p in (weight, bias)))
    return _wanted(shapes, wanted) if mode.known(g) else None


def _batch_norm_backward(mode: KnownZeros, args: Any) -> Shapes | None:
    g, x, weight, *_, wanted = args
    channels = None if weight is None else weight.shape
    return _wanted((x.shape, channels, channels), wanted) if mode.known(g) else None


def _wanted(shapes: Sequence[Sequence[int] | None], wanted: Sequence[bool]) -> Shapes:
    return [shape if want else None for shape, want in zip(shapes, wanted, strict=True)]


def _like_first(mode: KnownZeros, args: Any) -> Shapes | None:
    return [args[0].shape] if mode.known(args[0]) else None


def _like_second(mode: KnownZeros, args: Any) -> Shapes | None:
    return [args[1].shape] if mode.known(args[0]) else None


def _product(mode: KnownZeros, args: Any) -> Shapes | None:
    x, y = args
    if not (mode.known(x) or mode.known(y)):
        return None
    if not isinstance(y, Tensor):  # a number
        return [x.shape]
    same = (x.dtype, x.device) == (y.dtype, y.device)
    return [torch.broadcast_shapes(x.shape, y.shape)] if same else None


def _joined(mode: KnownZeros, args: Any) -> Shapes | None:
    parts, *axes = args
    axis = axes[0] if axes else 0
    if not all(mode.known(x) and x.dim() == parts[0].dim() and x.dtype == parts[0].dtype for x in parts):
        return None
    shape = list(parts[0].shape)
    shape[axis] = sum(x.shape[axis] for x in parts)
    return [shape]


def _both(mode: KnownZeros, args: Any) -> Shapes | None:
    x, y = args
    return _product(mode, args) if mode.known(x) and mode.known(y) else None


def _quotient(mode: KnownZeros, args: Any) -> Shapes | None:
    return _product(mode, args) if mode.known(args[0]) else None


def _sum(mode: KnownZeros, args: Any) -> Shapes | None:
    x, axes, *keep = args
    if not mode.known(x) or not axes:
        return None
    summed = {axis % x.dim() for axis in axes}
    kept = bool(keep and keep[0])
    return [[1 if i in summed else n for i, n in enumerate(x.shape) if kept or i not in summed]]


_Rule = Callable[[KnownZeros, Any], Shapes | None]
_RULES: dict[Any, _Rule] = {
    _aten.mm.default: _mm,
    _aten.bmm.default: _mm,
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
    _aten.cat.default: _joined,
    _aten.add.Tensor: _both,
    _aten.sub.Tensor: _both,
    _aten.mul.Tensor: _product,
    _aten.div.Tensor: _quotient,
    _aten.sum.dim_IntList: _sum,
    **dict.fromkeys(
        (_aten.clone.default, _aten.neg.default, _aten.mul.Scalar, _aten.div.Scalar), _like_first
    ),
    **dict.fromkeys(
        (
            _aten.threshold_backward.default, _aten.gelu_backward.default, _aten.silu_backward.default,
            _aten.tanh_backward.default, _aten.sigmoid_backward.default, _aten.softplus_backward.default,
            _aten.leaky_relu_backward.default, _aten._softmax_backward_data.default,
            _aten.max_pool2d_with_indices_backward.default, _aten.avg_pool2d_backward.default,
            _aten._adaptive_avg_pool2d_backward.default,
        ),
        _like_second,
    ),
}  # fmt: skip
