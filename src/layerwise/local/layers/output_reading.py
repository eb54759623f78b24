"""What reads a layer's output on the way to the loss: a known transfer function, or a loss with a link of its own.

Calls between the two that give the output's elements again (a view, another order of axes, a copy, another type, a
choice of rows) change neither: an elementwise function is the same wherever an element lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from layerwise.graph.coverage import Graph
from layerwise.graph.loss_scale import loss_scale
from layerwise.local.layers.kinds import Kind
from layerwise.local.transfer import IDENTITY, SIGMOID, SOFTMAX, Transfer, find, squared
from layerwise.losses import Likelihood, LossCall, is_loss, likelihood
from layerwise.ops.base import Slot
from layerwise.tape.calls import CHOOSES, CONVERTS, LOG_SOFTMAX
from layerwise.tape.pull import pull
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Reader, Use, unhooked

__all__ = ["Reading", "reading", "rows_of"]

_LINKS = {"identity": IDENTITY, "sigmoid": SIGMOID, "softmax": SOFTMAX}


class Reading(NamedTuple):
    """The transfer function of an output, the likelihood of the loss call that reads it, and f(z) where it was kept.

    likelihood: None where no loss reads the output, or reads a choice of its rows.
    """

    transfer: Transfer
    likelihood: Likelihood | None = None
    after: Tensor | None = None


class _Path(NamedTuple):
    """An output's way to its only reader. carriers: the calls between, which give its elements again."""

    use: Use
    kind: Kind
    carriers: list[Reader]

    @property
    def edges(self) -> list[GradientEdge]:
        """The gradient edges on the way; the last is of what the reader reads."""
        return [self.use.edge, *(c.carried.edge for c in self.carriers if c.carried is not None)]

    @property
    def shape(self) -> torch.Size:
        """The shape of what the reader reads."""
        carried = self.carriers[-1].carried if self.carriers else None
        return self.use.call.out_shape if carried is None else carried.shape

    @property
    def chooses(self) -> bool:
        """Whether the reader reads some of the elements alone."""
        return any(carrier.func in CHOOSES for carrier in self.carriers)

    def is_output_axis(self, axis: int) -> bool:
        """Whether an axis of what the reader reads is that of a row's outputs `o`, measured by indices along it."""
        axis %= len(self.shape)
        if not self.carriers:
            return self._is_own_axis(axis)
        if not self.shape.numel():
            return False  # no element shows it
        key = "classes", axis, self.use.call.out_shape, tuple(map(_layout, self.carriers))
        return self.kind.once(key, lambda: self._is_carried_axis(axis))

    def _is_own_axis(self, axis: int) -> bool:
        shape = self.use.call.out_shape

        def marked() -> bool:
            rows = rows_of(self.use.slots[self.kind.weight], _marks(self.use, axis))
            return rows.shape[1] == 1 and rows.shape[2] == shape[axis] and _counts(rows, -1)

        return self.kind.once(("classes", axis, shape), marked)

    def _is_carried_axis(self, axis: int) -> bool:
        for own in range(len(self.use.call.out_shape)):
            if self._is_own_axis(own):
                marks, value = _marks(self.use, own), self.use.value
                marks = marks.contiguous() if value is None else torch.empty_like(value, dtype=marks.dtype).copy_(marks)
                for func, args, kwargs, *_ in self.carriers:
                    marks = marks if func in CONVERTS else func(marks, *args, **kwargs)
                return marks.shape[axis] == self.use.call.out_shape[own] and _counts(marks, axis)
        return False


def reading(tape: Tape, graph: Graph, use: Use, kind: Kind) -> Reading:
    """What reads a use's output; the identity where that is no known function, or several calls."""
    carriers, reader = _only_reader(graph, use)
    path = _Path(use, kind, carriers)
    if reader is None or any(edge[:2] in graph.hidden for edge in path.edges):
        return Reading(IDENTITY)
    func, args, kwargs, *_ = reader
    if is_loss(func) or func in LOG_SOFTMAX:
        found = _loss_reading(tape, graph, path)
        if found is not None or is_loss(func):
            return Reading(IDENTITY) if found is None else found
    transfer = find(func, (None, *args), kwargs)
    if transfer is not None and transfer.name.startswith("softmax"):
        transfer = _softmax(path, func, args, kwargs)
    if transfer is None:
        return Reading(IDENTITY)
    return Reading(transfer, after=None if transfer.is_squared or carriers else reader.result)


def _loss_reading(tape: Tape, graph: Graph, path: _Path) -> Reading | None:
    for loss in tape.losses:
        if unhooked(loss.logits)[:2] == path.edges[-1][:2]:
            c = _scale(graph.total, loss.value)
            if c is None or loss.call.learned or not isinstance(loss.call, LossCall):
                continue
            scale = loss_scale(tape.scaler_calls, graph.total)
            c = c.detach() if not scale else c.detach() / scale
            found = likelihood(loss.call, loss.call.logits, c)
            link = _LINKS.get(found.link) or squared(found.link)
            if found.class_axis is not None and not path.is_output_axis(found.class_axis):
                link = squared(found.link)
            return Reading(link, None if path.chooses else found)
    return None


def _only_reader(graph: Graph, use: Use) -> tuple[list[Reader], Reader | None]:
    """The only call that reads a use's output on the way to the loss, or None; and the calls that carry it there."""
    carriers: list[Reader] = []
    readers: Sequence[Reader] = use.readers
    while True:
        found = [reader for reader in readers if not graph.passed.keys().isdisjoint(reader.nodes)]
        if len(found) != 1 or found[0].carried is None:
            return carriers, found[0] if len(found) == 1 else None
        carriers.append(found[0])
        readers = found[0].readers


def _scale(total: Tensor, value: GradientEdge) -> Tensor | None:
    """The derivative of the total by the value of one loss call; None where there is none."""
    one = torch.ones_like(total, requires_grad=False)
    if value.node is total.grad_fn and value.output_nr == total.output_nr:
        return one
    return pull([total], [one], [value])[0]


def _softmax(path: _Path, func: Any, args: Any, kwargs: Any) -> Transfer:
    """The transfer function of a softmax call, which has a matching loss over the outputs of a row only."""
    z = torch.empty(path.shape, device="meta")
    for axis in range(z.dim()):
        if find(func, (z, *args), kwargs, axis=axis) is SOFTMAX:
            return SOFTMAX if path.is_output_axis(axis) else squared(f"softmax(dim={axis})")
    return squared("softmax")


def _marks(use: Use, axis: int) -> Tensor:
    """Indices along an axis of an output, in its shape."""
    shape = use.call.out_shape
    marks = torch.arange(shape[axis], dtype=torch.float32, device=use.slots[0].used.device)
    return marks.view(-1, *(1,) * (len(shape) - 1 - axis)).expand(shape)


def _counts(marks: Tensor, axis: int) -> bool:
    """Whether marks count from 0 along an axis."""
    along = marks.movedim(axis, -1)
    return bool((along == torch.arange(along.shape[-1], dtype=marks.dtype, device=marks.device)).all())


def _layout(given: Any) -> Any:
    """A call's function and arguments without the values of tensors: whichever rows they choose."""
    if isinstance(given, Reader):
        return given.func, _layout(given.args), _layout(tuple(given.kwargs.items()))
    if isinstance(given, (tuple, list)):
        return tuple(map(_layout, given))
    return (given.dim(), given.dtype) if isinstance(given, Tensor) else repr(given)


def rows_of(slot: Slot, g: Tensor) -> Tensor:
    """A tensor of the output's shape as rows `[R,K,O]`."""
    return slot.output(g[None], None)[0].flatten(0, 1)
