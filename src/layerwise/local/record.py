"""What local learning reads off one run of the closure: the layers, with what came in and what came back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.coverage import Graph, prove
from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem, predict, target_m, target_s
from layerwise.local.transfer import IDENTITY, SIGMOID, SOFTMAX, Transfer, find, squared
from layerwise.losses import Likelihood, is_loss, likelihood
from layerwise.ops.base import Slot
from layerwise.pull import hooked, pull
from layerwise.tape import Tape
from layerwise.uses import Use

__all__ = ["Layer", "Recorded", "layers_of", "problem_of", "record"]


@dataclass(frozen=True)
class Layer:
    """One use whose weight can be fitted to local targets: a linear map on rows with a transfer function.

    weight, bias: the slots; names: of the weight and, where there is one, of the bias.
    transfer: the one known elementwise function that alone reads the output, or the loss's link; else the
    identity. likelihood: of the loss call that alone reads the output, if one does. value: the output,
    `[*out_shape]`, where it is at hand.
    """

    use: Use
    names: tuple[str, ...]
    weight: Slot
    bias: Slot | None
    transfer: Transfer
    likelihood: Likelihood | None
    value: Tensor | None = None

    @property
    def name(self) -> str:
        """The weight's parameter name."""
        return self.names[0]

    def input(self) -> Tensor:
        """Input rows `[R,K,I]`."""
        a = self.weight.input(None)
        assert a is not None
        return a.flatten(0, 1)

    def rows(self, g: Tensor) -> Tensor:
        """A tensor of the output's shape as rows `[R,K,O]`."""
        return self.weight.output(g[None], None)[0].flatten(0, 1)


@dataclass(frozen=True)
class Recorded:
    """One run of a closure.

    cotangents: by use index, `[*out_shape]`. gradients: of the parameters outside the layers, by name.
    """

    loss: Tensor
    tape: Tape
    graph: Graph
    layers: list[Layer]
    cotangents: Mapping[int, Tensor]
    gradients: Mapping[str, Tensor]

    @property
    def samples(self) -> int:
        """Dim 0 of the batch."""
        first = self.tape.first
        return first.shape[0] if first is not None and first.dim() else 1

    def finite(self) -> str | None:
        """The first place that holds NaN or infinity, or None."""
        if not bool(torch.isfinite(self.loss).all()):
            return "the loss"
        for layer in self.layers:
            if not _finite(self.cotangents[layer.use.index]):
                return f"the cotangent of {layer.name}"
        for name, g in self.gradients.items():
            if not _finite(g):
                return f"the gradient of {name}"
        return None


def record(
    model: nn.Module | Mapping[str, Tensor],
    closure: Callable[[], Tensor],
    eligible: Callable[[Layer], bool] = lambda layer: True,
) -> Recorded:
    """Run the closure once and take the cotangents of its layers.

    The closure returns the loss; where it calls backward itself, the cotangents stream from that pass.
    Raises BadInput for a closure without a tensor loss, UncoveredUse for a parameter no call covers.
    """
    streamed: list[Recorded] = []

    def on_backward(tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        graph = prove(tape, total, weight, need_loss=False)
        layers = [layer for layer in layers_of(tape, graph) if eligible(layer)]
        received: dict[int, Tensor] = {}
        with hooked([layer.use for layer in layers], lambda use, g: received.__setitem__(use.index, g.detach())):
            out = run()
        inside = {name for layer in layers for name in layer.names}
        rest = {n: p.grad for n, p in tape.parameters.items() if n not in inside and p.grad is not None}
        layers = [layer for layer in layers if layer.use.index in received]
        streamed.append(Recorded(total.detach(), tape, graph, layers, received, rest))
        return out

    tape = Tape(model, on_backward, keep_outputs=True)
    with tape, torch.enable_grad():
        loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise BadInput(f"the closure must return the loss, a tensor of one element; got {_describe(loss)}")
    if len(streamed) > 1:
        raise BadInput(f"the closure called backward {len(streamed)} times; one step takes one loss: add them up")
    return streamed[0] if streamed else pulled(tape, loss, eligible)


def pulled(tape: Tape, loss: Tensor, eligible: Callable[[Layer], bool] = lambda layer: True) -> Recorded:
    """The layers of a recorded loss, with cotangents by one pull that computes no weight gradient."""
    graph = prove(tape, loss, None, need_loss=False)
    layers = [layer for layer in layers_of(tape, graph) if eligible(layer)]
    inside = {name for layer in layers for name in layer.names}
    rest = {n: p for n, p in tape.parameters.items() if n not in inside}
    edges = [layer.use.edge for layer in layers]
    found = pull([loss], [torch.ones_like(loss)], [*edges, *rest.values()])
    cotangents = {layer.use.index: g for layer, g in zip(layers, found, strict=False) if g is not None}
    layers = [layer for layer in layers if layer.use.index in cotangents]
    gradients = {n: g for n, g in zip(rest, found[len(edges) :], strict=True) if g is not None}
    return Recorded(loss.detach(), tape, graph, layers, cotangents, gradients)


@torch.no_grad()
def problem_of(recorded: Recorded, layer: Layer, gamma: float, transfer: Transfer) -> LocalProblem:
    """The local problem of a layer, from its rows, its target `f(z) − γ g` and its parameters as matrices."""
    a, g = layer.input(), layer.rows(recorded.cotangents[layer.use.index])
    params = [recorded.tape.parameters[name].detach() for name in layer.names]
    weight = layer.weight.matrix(params[0])
    bias = params[1].view(weight.shape[0], weight.shape[1]) if len(params) > 1 else None
    z = layer.rows(layer.value) if layer.value is not None else predict(LocalProblem(a, weight, bias, g))
    target = target_s(z, g, gamma) if transfer.is_squared else target_m(z, g, gamma, transfer)
    return LocalProblem(a, weight, bias, target, transfer, g=g, gamma=gamma)


def layers_of(tape: Tape, graph: Graph) -> list[Layer]:
    """The uses that are layers: a matrix of one parameter, used once, on rows of data; in call order.

    Biases that stand alone, scales, tied, reused and derived weights have no local problem of their own.
    """
    count: dict[str, int] = {}
    for use in graph.uses:
        for name in use.names:
            count[name] = count.get(name, 0) + 1
    found = []
    for use in graph.uses:
        weight: tuple[str, Slot] | None = None
        bias: tuple[str, Slot] | None = None
        plain = True
        for derived, slot in zip(use.used, use.slots, strict=True):
            (name, *more) = derived.names
            ok = not more and slot.used is tape.parameters[name] and count[name] == 1 and slot.factored and slot.linear
            plain &= ok and not slot.aligned
            if slot.bias:
                bias = (name, slot)
            elif not slot.elementwise and weight is None:
                weight = (name, slot)
            else:
                plain = False
        if plain and weight is not None and _is_matrix(weight[1]):
            names = (weight[0],) if bias is None else (weight[0], bias[0])
            transfer, loss = _read_by(tape, graph, use)
            found.append(Layer(use, names, weight[1], bias[1] if bias else None, transfer, loss, use.value))
    return found


def _is_matrix(slot: Slot) -> bool:
    """Whether the rows are numbers and the parameter's matrix is a view of it, so that steps work in place."""
    a = slot.input(None)
    used = slot.used.detach()
    return (
        a is not None
        and a.is_floating_point()
        and a.dtype == used.dtype
        and slot.matrix(used).untyped_storage().data_ptr() == used.untyped_storage().data_ptr()
    )


_LINKS = {"identity": IDENTITY, "sigmoid": SIGMOID, "softmax": SOFTMAX}


def _read_by(tape: Tape, graph: Graph, use: Use) -> tuple[Transfer, Likelihood | None]:
    """The transfer function of a use's output, and the likelihood of the loss call that reads it, if one does."""
    if len(use.consumers) != 1:
        return IDENTITY, None
    func, args, kwargs = use.consumers[0]
    if not is_loss(func):
        rank = len(use.call.out_shape)
        transfer = find(func, (None, *args), kwargs, axis=rank - 1)
        return (IDENTITY if transfer is None else transfer), None
    for loss in tape.losses:
        if loss.logits.node is use.edge.node and loss.logits.output_nr == use.edge.output_nr:
            (c,) = pull([graph.total], [torch.ones_like(graph.total)], [loss.value])
            if c is None or loss.call.learned:
                continue
            found = likelihood(loss.call, loss.call.logits, c.detach())
            return _LINKS.get(found.link, squared(found.link)), found
    return IDENTITY, None


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.sum()))


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__
