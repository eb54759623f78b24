"""The layers of a recorded run: weights that can be fitted to local targets, at all their uses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from layerwise import ops
from layerwise.errors import BadInput
from layerwise.graph.coverage import Graph
from layerwise.local.layers.kinds import Kind, Kinds, data_places, tensors_of
from layerwise.local.layers.output_reading import reading, rows_of
from layerwise.local.transfer import Transfer, squared
from layerwise.losses import Likelihood
from layerwise.ops import writes_first
from layerwise.ops.base import Call, Slot
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use
from layerwise.tensors import HALF, wide_type, without_grad

__all__ = ["Layer", "layers_of", "one_weight", "over_passes", "shaped"]


@dataclass(frozen=True)
class Layer:
    """A weight that can be fitted to local targets: at each of its uses a linear map on rows, with a transfer function.

    call: the recorded call, with the data to fit on. kind: the indices of weight and bias in it. parameter: the weight,
    or a copy with its strides in float32, the least type of rows; names: of the weight and, if it is fitted, of the
    bias. shifted: whether the output has further terms, `z = W a + b + rest` (a frozen bias, an addend). transfer: the
    known elementwise function that is the only reader of the output, or the loss's link; else the identity. likelihood:
    of the loss call that is the only reader, or None. value: the output, `[*out_shape]`, if kept; after: its transfer
    function, if kept. others: further uses of the same weight and bias, whose rows join these. passes: how many uses
    each backward pass has, where there were several.
    """

    use: Use
    call: Call
    kind: Kind
    names: tuple[str, ...]
    shifted: bool
    parameter: Tensor
    transfer: Transfer
    likelihood: Likelihood | None
    value: Tensor | None = None
    after: Tensor | None = None
    others: tuple[Layer, ...] = ()
    passes: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[Layer, ...]:
        """All uses, each as a layer of one use."""
        return (self, *self.others) if self.others else (self,)

    def of_all(self, rows: Callable[[Layer], Tensor]) -> Tensor:
        """What a function gives of each use, joined as rows of the layer."""
        return self.join([rows(part) for part in self.parts]) if self.others else rows(self)

    @property
    def name(self) -> str:
        """The weight's parameter name."""
        return self.names[0]

    @property
    def has_rows(self) -> bool:
        """Whether any use has a row: an expert to which nothing is routed has none, and stays as it is."""
        return any(part.use.call.out_shape.numel() for part in self.parts)

    @cached_property
    def _weight(self) -> Slot:
        if self.call is self.use.call:
            return self.use.slots[self.kind.weight]
        return ops.slots(self.call, [d.tensor for d in self.use.used])[self.kind.weight]

    @cached_property
    def _of_rows(self) -> Slot:
        """The weight's slot as that of a weight in the type of the layer's rows, which are in the slot's."""
        slot = self._weight
        if slot.used.dtype not in HALF:
            return slot
        found = copy.copy(slot)
        found.used = slot.used.detach().new_zeros((), dtype=wide_type(slot.used.dtype)).expand(slot.used.shape)
        return found

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows of all uses as rows of the layer: interleaved where uses have equal counts, else concatenated.

        The rows of several passes are concatenated.
        """
        if len(rows) == 1:
            return rows[0]
        if self.passes:
            left, one = iter(rows), replace(self, passes=())
            return torch.cat([one.join([next(left) for _ in range(n)]) for n in self.passes])
        even = all(len(x) == len(rows[0]) for x in rows)
        return torch.stack(tuple(rows), 1).flatten(0, 1) if even else torch.cat(tuple(rows))

    def matrix(self) -> Tensor:
        """The weight as `[K,O,I]`, in the parameter's memory."""
        p = self.parameter

        def made() -> Tensor:
            return self.kind.view("matrix", p.detach(), lambda: self._viewed(p.detach()))

        return self.kind.of_parameter(self.name, p, made)

    def _viewed(self, p: Tensor) -> Tensor:
        slot = self._weight
        return slot.matrix(p) if self.kind.whole else shaped(p, slot.matrix(slot.used.detach()))

    def offsets(self, bias: Tensor) -> Tensor:
        """The fitted bias as `[K,O]`, in the parameter's memory."""
        return self.kind.of_parameter(self.names[1], bias, lambda: bias.detach().view(self.matrix().shape[:2]))

    def fold(self, w: Tensor) -> Tensor:
        """Reshape `[K,O,I]` to the shape of the parameter."""
        if self.kind.whole:
            return self.kind.view("fold", w, lambda: self._weight.fold(w))
        # the call used a permuted or reshaped view of the parameter
        out = torch.empty_like(self.parameter)
        shaped(out, self.matrix()).copy_(w)
        return out

    @property
    def data(self) -> list[Tensor]:
        """The tensors among the call's arguments that are no parameters."""
        args, kwargs = self.call.args, self.call.kwargs
        places = self.kind.once("data", lambda: data_places(self.call, [d.tensor for d in self.use.used]))
        if places is not None:
            return [kwargs[at] if isinstance(at, str) else args[at] for at in places]
        return [t for t in tensors_of(self.call) if not any(t is d.tensor for d in self.use.used)]

    def input(self) -> Tensor:
        """Input rows `[R,K,I]` of this use, int64 `[R]` for a table that is looked up."""
        if len(self.data) != 1:
            return self._typed(self._input())
        return self._typed(self.kind.view("input", self.data[0], self._input, [d.tensor for d in self.use.used]))

    def _typed(self, rows: Tensor) -> Tensor:
        """Rows in the weight's type, under autocast, too; in float32 for half precision."""
        dtype, own = rows.dtype, self.parameter.dtype
        if (dtype is own and dtype not in HALF) or (self.kind.indexed and not rows.is_floating_point()):
            return rows
        return rows.to(wide_type(own))

    def _input(self) -> Tensor:
        a = self._of_rows.input(None)
        assert a is not None
        return a.flatten(0, 1)

    def rows(self, g: Tensor) -> Tensor:
        """A tensor of the output's shape as rows `[R,K,O]`, of this use."""
        return self._typed(self.kind.view("rows", g, lambda: rows_of(self._of_rows, g)))

    def output(self) -> Tensor:
        """The output `[*out_shape]`; recomputed where it was overwritten in place."""
        return self.again() if self.value is None else self.value

    @without_grad
    def again(self) -> Tensor:
        """The call's output at the present weights."""
        args = self.call.args
        if self.kind.elementwise:  # a norm updates its running statistics
            args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        elif writes_first(self.call.func):
            args = (args[0].clone(), *args[1:])
        out = self.call.func(*args, **self.call.kwargs)
        return args[0] if out is None else out

    def weight_ends(self) -> Tensor | None:
        """The least and the largest weight of the terms of each loss that reads the outputs, `[2 parts]`.

        None where a loss does not have the form of a weighted matching loss (`Likelihood.weights`).
        """
        found = [None if part.likelihood is None else part.likelihood.weights() for part in self.parts]
        ends: list[Tensor] = []
        for weights in found:
            if weights is None or not weights.numel():
                return None
            ends += torch.aminmax(weights) if weights.dim() else (weights, weights)
        return ends[0].expand(2) if len(ends) == 2 and ends[0] is ends[1] else torch.stack(ends)


def one_weight(ends: list[float]) -> float | None:
    """The positive weight of all terms, up to rounding between losses; None where there is no one. ends: as numbers."""
    first, pairs = ends[0], zip(ends[::2], ends[1::2], strict=True)
    same = all(low == high and abs(low - first) <= 1e-6 * abs(first) for low, high in pairs)
    return first if first > 0 and same else None


def over_passes(layers: list[Layer]) -> Layer:
    """The layers of one weight in several backward passes, as one. Raises BadInput where they do not join."""
    first = layers[0]
    if len(layers) == 1:
        return first
    if any(layer.names != first.names or _geometry(layer) != _geometry(first) for layer in layers):
        raise BadInput(
            f"the backward passes of this step use {first.name} as different matrices, or with different biases; the "
            "passes of one step must use each weight alike"
        )
    parts = [replace(part, others=()) for layer in layers for part in layer.parts]
    return replace(_as_one_layer(parts), passes=tuple(len(layer.parts) for layer in layers))


def shaped(t: Tensor, like: Tensor) -> Tensor:
    """A tensor with a parameter's layout, viewed as `like` views the parameter."""
    return t.as_strided(like.shape, like.stride(), t.storage_offset())


def layers_of(
    tape: Tape,
    graph: Graph,
    ours: Callable[[Tensor], bool] = lambda p: True,
    matrices: bool = False,
    kinds: Kinds | None = None,
) -> list[Layer]:
    """The weights to be moved that have a local problem, with all their uses, in the order of their first calls.

    At each use the weight, or a view of all of it, is the same matrix on rows of data: of a product, a convolution, a
    looked-up table, or elementwise (a scale). A bias is fitted with it where every use has that bias, and no other call
    reads it. Lone biases, weights in two orientations and derived weights have no local problem.
    matrices: leave out tables and scales. kinds: a cache for further batches.
    """
    kinds = Kinds() if kinds is None else kinds
    count: dict[str, int] = {}
    for use in graph.uses:
        for name in use.names:
            count[name] = count.get(name, 0) + 1
    found: dict[str, list[tuple[Use, Kind]]] = {}
    for use in graph.uses:
        kind = kinds.of(use, tape.parameters, ours, lambda use=use: _kind(tape, use, ours))  # type: ignore[misc]
        if kind is not None:
            found.setdefault(kind.names[0], []).append((use, kind))
    layers = []
    for name, uses in found.items():
        first = uses[0][1]
        if (matrices and (first.elementwise or first.indexed)) or len(uses) != count[name]:
            continue
        parts = _parts(tape, graph, uses, count)
        if len(parts) == 1 or len(set(map(_geometry, parts))) == 1:
            layers.append(_as_one_layer(parts))
    return layers


def _kind(tape: Tape, use: Use, ours: Callable[[Tensor], bool]) -> Kind | None:
    """The kind of one use; None where it has no weight on rows."""
    weight: int | None = None
    bias: int | None = None
    if not all(len(d.names) == 1 and _is_view_of_all(d.tensor, tape.parameters[next(iter(d.names))]) for d in use.used):
        return None
    params = [tape.parameters[name] for _, (name,) in use.used]
    for place, (p, slot) in enumerate(zip(params, use.slots, strict=True)):
        if not (slot.factored and slot.linear) or slot.aligned:
            return None
        if slot.bias and bias is None and slot.used is p:
            bias = place
        elif not slot.bias and weight is None and _is_view_of_all(slot.used, p):
            weight = place
        else:
            return None
    if weight is None or not ours(params[weight]):
        return None
    if not _is_matrix(use, use.slots[weight], None if bias is None else use.slots[bias]):
        return None
    bias = None if bias is None or not ours(params[bias]) else bias
    return Kind(use, weight, bias, use.slots[weight].used is params[weight])


def _is_view_of_all(used: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor is a parameter, or a view that holds each of its elements once."""
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


def _geometry(part: Layer) -> tuple[torch.Size, tuple[int, ...]]:
    matrix = part.matrix()
    return matrix.shape, matrix.stride()


def _parts(tape: Tape, graph: Graph, uses: Sequence[tuple[Use, Kind]], count: Mapping[str, int]) -> list[Layer]:
    """The uses of a weight, each as a layer of one use; without the bias, where uses differ in it."""
    names, shared = uses[0][1].names, True
    if len(names) > 1 or len(uses) > 1:
        alike = {kind.names for _, kind in uses} == {names}
        shared = alike and {count[name] for name in names} == {len(uses)}
    parts = []
    for use, kind in uses:
        own = kind.names if shared else kind.names[:1]
        shifted = kind.shifted or len(own) < len(kind.names)
        read = reading(tape, graph, use, kind)
        fixed = use, use.call, kind, own, shifted, tape.parameters[names[0]]
        parts.append(Layer(*fixed, read.transfer, read.likelihood, use.value, read.after))
    return parts


def _as_one_layer(parts: list[Layer]) -> Layer:
    """All uses of a weight as one layer."""
    if len(parts) == 1:
        return parts[0]
    transfer = parts[0].transfer
    if any(part.transfer.name != transfer.name for part in parts):
        transfer = squared(" and ".join(sorted({part.transfer.name for part in parts})))
    made = parts[0].likelihood if all(part.likelihood is not None for part in parts) else None
    return replace(parts[0], transfer=transfer, likelihood=made, others=tuple(parts[1:]))


def _is_matrix(use: Use, slot: Slot, bias: Slot | None) -> bool:
    """Whether the rows are numbers and the matrix is a view of the parameter, so that it can be updated in place."""
    used = slot.used.detach()
    tensors = tensors_of(use.call)
    if any(not t.is_floating_point() and not slot.indexed and t.dtype != used.dtype for t in tensors):
        return False
    matrix = slot.matrix(used)
    fits = bias is None or bias.used.numel() == matrix.shape[0] * matrix.shape[1]
    return fits and matrix.untyped_storage().data_ptr() == used.untyped_storage().data_ptr()
