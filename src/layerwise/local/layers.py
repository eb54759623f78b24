"""The layers of a recorded run: weights that can be fitted to local targets, at all their uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.coverage import Graph
from layerwise.local.transfer import IDENTITY, SIGMOID, SOFTMAX, Transfer, find, squared
from layerwise.losses import Likelihood, LossCall, is_loss, likelihood
from layerwise.ops import writes_first
from layerwise.ops.base import Call, Slot
from layerwise.pull import pull
from layerwise.tape import Tape
from layerwise.uses import Use

__all__ = ["Layer", "layers_of", "shaped"]


@dataclass(frozen=True)
class Layer:
    """A weight that can be fitted to local targets: at each of its uses a linear map on rows, with a transfer function.

    call: with the data it is to be fitted on. weight, bias: the slots; parameter: the weight itself;
    names: of the weight and, where there is
    one to fit, of the bias. shifted: whether the output has further terms, `z = W a + b + rest` (a frozen bias,
    an addend). transfer: the one known elementwise function that alone reads the output, or the loss's link;
    else the identity. likelihood: of the loss call that alone reads the output, if one does. value: the output,
    `[*out_shape]`, where it is at hand; after: the transfer function of it, likewise.
    others: further uses of the same weight and bias, whose rows join these.
    """

    use: Use
    call: Call
    names: tuple[str, ...]
    weight: Slot
    bias: Slot | None
    shifted: bool
    parameter: Tensor
    transfer: Transfer
    likelihood: Likelihood | None
    value: Tensor | None = None
    after: Tensor | None = None
    others: tuple[Layer, ...] = ()

    @property
    def parts(self) -> tuple[Layer, ...]:
        """The uses, each as a layer by itself."""
        return (self, *self.others)

    @property
    def name(self) -> str:
        """The weight's parameter name."""
        return self.names[0]

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows of the uses as rows of the layer; in turn where there are as many of each, so that slices are alike."""
        if len(rows) == 1:
            return rows[0]
        even = all(len(x) == len(rows[0]) for x in rows)
        return torch.stack(tuple(rows), 1).flatten(0, 1) if even else torch.cat(tuple(rows))

    def fold(self, w: Tensor) -> Tensor:
        """Carry `[K,O,I]` to the shape of the parameter."""
        if self.parameter is self.weight.used:
            return self.weight.fold(w)
        # the call used a rearranged view of the parameter
        out = torch.empty_like(self.parameter)
        shaped(out, self.weight.matrix(self.weight.used.detach())).copy_(w)
        return out

    def data(self) -> list[Tensor]:
        """The tensors that the call reads besides its parameters."""
        return [t for t in _tensors(self.call) if not any(t is d.tensor for d in self.use.used)]

    def input(self) -> Tensor:
        """Input rows `[R,K,I]` of this use, int64 `[R]` for a table that is looked up."""
        a = self.weight.input(None)
        assert a is not None
        return a.flatten(0, 1)

    def rows(self, g: Tensor) -> Tensor:
        """A tensor of the output's shape as rows `[R,K,O]`, of this use."""
        return self.weight.output(g[None], None)[0].flatten(0, 1)

    @torch.no_grad()
    def output(self) -> Tensor:
        """The output `[*out_shape]`; the call runs again where something has overwritten it."""
        return self.again() if self.value is None else self.value

    @torch.no_grad()
    def again(self) -> Tensor:
        """The call's output at the weights as they stand."""
        args = self.call.args
        if self.weight.elementwise:  # a norm writes on its running statistics
            args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        elif writes_first(self.call.func):
            args = (args[0].clone(), *args[1:])
        out = self.call.func(*args, **self.call.kwargs)
        return args[0] if out is None else out


def shaped(t: Tensor, like: Tensor) -> Tensor:
    """A tensor laid out as a parameter is, seen as `like` sees the parameter."""
    return t.as_strided(like.shape, like.stride(), t.storage_offset())


def layers_of(
    tape: Tape, graph: Graph, ours: Callable[[Tensor], bool] = lambda p: True, matrices: bool = False
) -> list[Layer]:
    """The weights of ours that have a local problem, with all their uses; in the order of their first calls.

    At each use the weight, or a rearranged view of it, is the same matrix on rows of data: of a product, a convolution,
    a looked-up table, or each element by itself (a scale). A bias takes part where every use has it and none stands
    elsewhere. Biases that stand alone, weights in two orientations and derived weights have no local problem.
    matrices: only those that multiply rows of numbers, no tables and no scales.
    """
    count = Counter(name for use in graph.uses for name in use.names)
    found: dict[str, list[Layer]] = {}
    for use in graph.uses:
        part = _part(tape, use, ours)
        if part is not None:
            found.setdefault(part.name, []).append(part)
    layers = []
    for name, parts in found.items():
        first = parts[0]
        if matrices and (first.weight.elementwise or first.weight.indexed):
            continue
        alike = len(parts) == 1 or len({_geometry(part.weight) for part in parts}) == 1
        if len(parts) == count[name] and alike:
            layers.append(_joined(tape, graph, parts, count))
    return layers


def _part(tape: Tape, use: Use, ours: Callable[[Tensor], bool]) -> Layer | None:
    """One use as a layer by itself, without its transfer function; None where it has no weight on rows."""
    weight: tuple[str, Slot] | None = None
    bias: tuple[str, Slot] | None = None
    if not all(len(d.names) == 1 and _rearranged(d.tensor, tape.parameters[next(iter(d.names))]) for d in use.used):
        return None
    for (_, (name,)), slot in zip(use.used, use.slots, strict=True):
        if not (slot.factored and slot.linear) or slot.aligned:
            return None
        if slot.bias and bias is None and slot.used is tape.parameters[name]:
            bias = (name, slot)
        elif not slot.bias and weight is None and _rearranged(slot.used, tape.parameters[name]):
            weight = (name, slot)
        else:
            return None
    if weight is None or not ours(tape.parameters[weight[0]]) or not _is_matrix(use, *weight, bias):
        return None
    if bias is not None and not ours(bias[1].used):
        bias = None
    names = (weight[0],) if bias is None else (weight[0], bias[0])
    # elementwise calls may add what no tensor shows: PReLU adds its input's positive part
    shifted = weight[1].elementwise or len(_tensors(use.call)) > 1 + len(names)
    parameter = tape.parameters[weight[0]]
    return Layer(use, use.call, names, weight[1], bias and bias[1], shifted, parameter, IDENTITY, None, use.value)


def _rearranged(used: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of all of it, each element once."""
    if used is parameter:
        return True
    same = used.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    same &= used.storage_offset() == parameter.storage_offset() and used.dtype == parameter.dtype
    dense = 1
    for stride, n in sorted(zip(used.stride(), used.shape, strict=True)):
        if n > 1:
            same &= stride == dense
            dense *= n
    return same and dense == parameter.numel()


def _geometry(slot: Slot) -> tuple[torch.Size, tuple[int, ...]]:
    matrix = slot.matrix(slot.used.detach())
    return matrix.shape, matrix.stride()


def _joined(tape: Tape, graph: Graph, parts: list[Layer], count: Mapping[str, int]) -> Layer:
    """All uses of a weight as one layer."""
    every = {part.names for part in parts}
    if len(every) > 1 or any(count[name] > len(parts) for name in parts[0].names):
        parts = [replace(part, names=part.names[:1], bias=None, shifted=part.shifted or len(part.names) > 1)
                 for part in parts]  # fmt: skip
    read = [_read_by(tape, graph, part) for part in parts]
    parts = [replace(part, after=_after(part.use, f)) for part, (f, _) in zip(parts, read, strict=True)]
    transfer, likelihood = read[0]
    if any(other.name != transfer.name for other, _ in read):
        transfer = squared(" and ".join(sorted({other.name for other, _ in read})))
    likelihood = likelihood if len(parts) == 1 else None
    return replace(parts[0], transfer=transfer, likelihood=likelihood, others=tuple(parts[1:]))


def _after(use: Use, transfer: Transfer) -> Tensor | None:
    """`f(z)` as the model computed it, where the call that alone reads z is f and its result is at hand."""
    return None if transfer.is_squared or is_loss(use.consumers[0][0]) else use.read


def _is_matrix(use: Use, name: str, slot: Slot, bias: tuple[str, Slot] | None) -> bool:
    """Whether the rows are numbers and the parameter's matrix is a view of it, so that steps work in place."""
    used = slot.used.detach()
    tensors = _tensors(use.call)
    if any(t.dtype != used.dtype and (t.is_floating_point() or not slot.indexed) for t in tensors):
        return False
    matrix = slot.matrix(used)
    fits = bias is None or bias[1].used.numel() == matrix.shape[0] * matrix.shape[1]
    return fits and matrix.untyped_storage().data_ptr() == used.untyped_storage().data_ptr()


_LINKS = {"identity": IDENTITY, "sigmoid": SIGMOID, "softmax": SOFTMAX}


def _read_by(tape: Tape, graph: Graph, layer: Layer) -> tuple[Transfer, Likelihood | None]:
    """The transfer function of a layer's output, and the likelihood of the loss call that reads it, if one does."""
    use = layer.use
    if len(use.consumers) != 1:
        return IDENTITY, None
    func, args, kwargs = use.consumers[0]
    if not is_loss(func):
        transfer = find(func, (None, *args), kwargs)
        if transfer is not None and transfer.name.startswith("softmax"):
            transfer = _softmax(layer, func, args, kwargs)
        return (IDENTITY if transfer is None else transfer), None
    for loss in tape.losses:
        if loss.logits.node is use.edge.node and loss.logits.output_nr == use.edge.output_nr:
            (c,) = pull([graph.total], [torch.ones_like(graph.total)], [loss.value])
            if c is None or loss.call.learned or not isinstance(loss.call, LossCall):
                continue
            found = likelihood(loss.call, loss.call.logits, c.detach())
            if found.class_axis is not None and not _over_rows(layer, found.class_axis):
                return squared(found.link), found
            return _LINKS.get(found.link, squared(found.link)), found
    return IDENTITY, None


def _softmax(layer: Layer, func: Any, args: Any, kwargs: Any) -> Transfer:
    """The transfer function of a softmax: its matching loss where it runs over the outputs of a row."""
    z = torch.empty(layer.use.call.out_shape, device="meta")
    for axis in range(z.dim()):
        if find(func, (z, *args), kwargs, axis=axis) is SOFTMAX:
            return SOFTMAX if _over_rows(layer, axis) else squared(f"softmax(dim={axis})")
    return squared("softmax")


def _over_rows(layer: Layer, axis: int) -> bool:
    """Whether the axis of the output is that of the outputs of a row: marks along it come out along `o`."""
    shape = layer.use.call.out_shape
    axis %= len(shape)
    marks = torch.arange(shape[axis], dtype=torch.float32, device=layer.weight.used.device)
    rows = layer.rows(marks.view(-1, *(1,) * (len(shape) - 1 - axis)).expand(shape))
    return rows.shape[1] == 1 and rows.shape[2] == len(marks) and bool((rows == marks).all())


def _tensors(call: Call) -> list[Tensor]:
    """The tensors among a call's arguments."""
    found: list[Tensor] = []
    stack = [*call.args, *call.kwargs.values()]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            stack += value
    return found
