"""What local learning reads off one run of the closure: the layers, with what came in and what came back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.coverage import Graph, prove
from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem, predict, target_m, target_s
from layerwise.local.transfer import IDENTITY, SIGMOID, SOFTMAX, Transfer, find, squared
from layerwise.losses import Likelihood, LossCall, is_loss, likelihood
from layerwise.ops import writes_first
from layerwise.ops.base import Call, Slot
from layerwise.pull import hooked, pull
from layerwise.replay import check_loss
from layerwise.tape import Tape
from layerwise.uses import Use

__all__ = ["Layer", "Recorded", "dense", "is_finite", "layers_of", "problem_of", "pulled", "record"]


@dataclass(frozen=True)
class Layer:
    """One use whose weight can be fitted to local targets: a linear map on rows with a transfer function.

    call: with the data it is to be fitted on. weight, bias: the slots; names: of the weight and, where there is
    one to fit, of the bias. shifted: whether the output has further terms, `z = W a + b + rest` (a frozen bias,
    an addend). transfer: the one known elementwise function that alone reads the output, or the loss's link;
    else the identity. likelihood: of the loss call that alone reads the output, if one does. value: the output,
    `[*out_shape]`, where it is at hand.
    """

    use: Use
    call: Call
    names: tuple[str, ...]
    weight: Slot
    bias: Slot | None
    shifted: bool
    transfer: Transfer
    likelihood: Likelihood | None
    value: Tensor | None = None

    @property
    def name(self) -> str:
        """The weight's parameter name."""
        return self.names[0]

    def data(self) -> list[Tensor]:
        """The tensors that the call reads besides its parameters."""
        return [t for t in _tensors(self.call) if not any(t is d.tensor for d in self.use.used)]

    def input(self) -> Tensor:
        """Input rows `[R,K,I]`."""
        a = self.weight.input(None)
        assert a is not None
        return a.flatten(0, 1)

    def rows(self, g: Tensor) -> Tensor:
        """A tensor of the output's shape as rows `[R,K,O]`."""
        return self.weight.output(g[None], None)[0].flatten(0, 1)

    @torch.no_grad()
    def output(self) -> Tensor:
        """The output `[*out_shape]`; the call runs again where something has overwritten it."""
        if self.value is not None:
            return self.value
        args = self.call.args
        if writes_first(self.call.func):
            args = (args[0].clone(), *args[1:])
        out = self.call.func(*args, **self.call.kwargs)
        return args[0] if out is None else out


@dataclass(frozen=True)
class Recorded:
    """One run of a closure.

    cotangents: by use index, `[*out_shape]`. gradients: of the parameters outside the layers, by name.
    Where the loss is not finite there are no layers and no gradients.
    """

    loss: Tensor
    tape: Tape
    layers: list[Layer]
    cotangents: Mapping[int, Tensor]
    gradients: Mapping[str, Tensor]

    @property
    def samples(self) -> int:
        """Dim 0 of the batch."""
        first = self.tape.first
        return first.shape[0] if first is not None and first.dim() else 1


def record(
    model: nn.Module | Mapping[str, Tensor],
    closure: Callable[[], Tensor],
    ours: Callable[[Tensor], bool] = lambda p: True,
) -> Recorded:
    """Run the closure once and take the cotangents of its layers, and gradients of the other parameters.

    ours: whether a parameter is to be moved; the others are constants. The closure returns the loss; where it
    calls backward itself, the cotangents stream from that pass.
    Raises BadInput for a closure without a tensor loss, UncoveredUse for a parameter no call covers.
    """
    streamed: list[Recorded] = []

    def on_backward(tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        graph = prove(tape, total, weight, need_loss=False)
        layers = layers_of(tape, graph, ours) if is_finite(total) else []
        inside = {name for layer in layers for name in layer.names}
        rest = {n: p for n, p in tape.parameters.items() if n not in inside and ours(p)}
        received: dict[int, Tensor] = {}
        with (
            _fresh_gradients(rest) as gradients,
            hooked([layer.use for layer in layers], lambda use, g: received.__setitem__(use.index, g.detach())),
        ):
            out = run()
        layers = [layer for layer in layers if layer.use.index in received]
        streamed.append(Recorded(total.detach(), tape, layers, received, gradients))
        return out

    tape = Tape(model, on_backward, keep_outputs=True)
    with tape, torch.enable_grad():
        loss = closure()
    check_loss(loss)
    if len(streamed) > 1:
        raise BadInput(f"the closure called backward {len(streamed)} times; one step takes one loss: add them up")
    return replace(streamed[0], loss=loss.detach()) if streamed else pulled(tape, loss, ours)


def pulled(tape: Tape, loss: Tensor, ours: Callable[[Tensor], bool] = lambda p: True) -> Recorded:
    """The layers of a recorded loss, with cotangents by one pull that computes no weight gradient."""
    graph = prove(tape, loss, None, need_loss=False)
    if not is_finite(loss):
        return Recorded(loss.detach(), tape, [], {}, {})
    layers = layers_of(tape, graph, ours)
    inside = {name for layer in layers for name in layer.names}
    rest = {n: p for n, p in tape.parameters.items() if n not in inside and ours(p)}
    edges = [layer.use.edge for layer in layers]
    found = pull([loss], [torch.ones_like(loss)], [*edges, *rest.values()])
    cotangents = {layer.use.index: g for layer, g in zip(layers, found, strict=False) if g is not None}
    layers = [layer for layer in layers if layer.use.index in cotangents]
    gradients = {n: dense(g) for n, g in zip(rest, found[len(edges) :], strict=True) if g is not None}
    return Recorded(loss.detach(), tape, layers, cotangents, gradients)


@contextmanager
def _fresh_gradients(params: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Filled on exit with what a backward pass inside adds to the parameters' `.grad`."""
    before = {n: p.grad for n, p in params.items()}
    found: dict[str, Tensor] = {}
    for p in params.values():
        p.grad = None
    try:
        yield found
    finally:
        for n, p in params.items():
            new, old = p.grad, before[n]
            if new is not None:
                found[n] = dense(new.detach())
            p.grad = new if old is None else old if new is None else old + new


@torch.no_grad()
def problem_of(recorded: Recorded, layer: Layer, gamma: float, transfer: Transfer) -> LocalProblem:
    """The local problem of a layer, from its rows, its target `f(z) − γ g` and its parameters as matrices."""
    a, g = layer.input(), layer.rows(recorded.cotangents[layer.use.index])
    params = [recorded.tape.parameters[name].detach() for name in layer.names]
    weight = layer.weight.matrix(params[0])
    bias = params[1].view(weight.shape[0], weight.shape[1]) if len(params) > 1 else None
    rest = None
    if layer.shifted or layer.value is not None:
        z = layer.rows(layer.output())
        if layer.shifted:
            rest = z - predict(LocalProblem(a, weight, bias, g))
    else:
        z = predict(LocalProblem(a, weight, bias, g))
    target = target_s(z, g, gamma) if transfer.is_squared else target_m(z, g, gamma, transfer)
    return LocalProblem(a, weight, bias, target, transfer, g=g, gamma=gamma, rest=rest)


def layers_of(tape: Tape, graph: Graph, ours: Callable[[Tensor], bool] = lambda p: True) -> list[Layer]:
    """The uses that are layers: a matrix of one parameter of ours, used once, on rows of data; in call order.

    Biases that stand alone, scales, tied, reused and derived weights have no local problem of their own.
    """
    count = Counter(name for use in graph.uses for name in use.names)
    found = []
    for use in graph.uses:
        weight: tuple[str, Slot] | None = None
        bias: tuple[str, Slot] | None = None
        plain = all(len(d.names) == 1 and d.tensor is tape.parameters[next(iter(d.names))] for d in use.used)
        if not plain or any(count[name] > 1 for name in use.names):
            continue
        for (_, (name,)), slot in zip(use.used, use.slots, strict=True):
            plain &= slot.factored and slot.linear and not slot.aligned and slot.used is tape.parameters[name]
            if slot.bias and bias is None:
                bias = (name, slot)
            elif not (slot.bias or slot.elementwise) and weight is None:
                weight = (name, slot)
            else:
                plain = False
        if not plain or weight is None or not ours(weight[1].used) or not _is_matrix(use, *weight, bias):
            continue
        if bias is not None and not ours(bias[1].used):
            bias = None
        names = (weight[0],) if bias is None else (weight[0], bias[0])
        shifted = len(_tensors(use.call)) > 1 + len(names)
        layer = Layer(use, use.call, names, weight[1], bias and bias[1], shifted, IDENTITY, None, use.value)
        transfer, loss = _read_by(tape, graph, layer)
        found.append(replace(layer, transfer=transfer, likelihood=loss))
    return found


def _is_matrix(use: Use, name: str, slot: Slot, bias: tuple[str, Slot] | None) -> bool:
    """Whether the rows are numbers and the parameter's matrix is a view of it, so that steps work in place."""
    used = slot.used.detach()
    if any(t.dtype != used.dtype for t in _tensors(use.call)):
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


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    return bool(torch.isfinite(x).all())


def dense(g: Tensor) -> Tensor:
    """A gradient that may be sparse, as a dense tensor."""
    return g.to_dense() if g.is_sparse else g


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
