"""One recorded run of the closure: its layers, with inputs, outputs and cotangents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.graph.coverage import prove
from layerwise.graph.samples import count
from layerwise.local.layers.kinds import Kinds
from layerwise.local.layers.layer import Layer, layers_of
from layerwise.local.problem import LocalProblem, Pull, predict, target_m
from layerwise.local.targets import Target
from layerwise.local.transfer import Transfer
from layerwise.replay.state import check_loss
from layerwise.tape.pull import OnePass, hooked, pull
from layerwise.tape.tape import Tape
from layerwise.tensors import dense, is_finite

__all__ = ["Recorded", "dense", "problem_of", "pulled", "record"]


@dataclass(frozen=True)
class Recorded:
    """One run of a closure.

    cotangents: by use index, `[*out_shape]`. gradients: of the parameters outside the layers, by name. samples: N.
    Where the loss is not finite there are no layers and no gradients.
    """

    loss: Tensor
    tape: Tape
    layers: list[Layer]
    cotangents: Mapping[int, Tensor]
    gradients: Mapping[str, Tensor]
    samples: int = 1


def record(
    model: nn.Module | Mapping[str, Tensor],
    closure: Callable[[], Tensor],
    ours: Callable[[Tensor], bool] = lambda p: True,
    matrices: bool = False,
    crosses: bool = False,
    kinds: Kinds | None = None,
) -> Recorded:
    """Run the closure once and take the cotangents of its layers, and gradients of the other parameters.

    ours: whether a parameter is to be moved; the others are constants. matrices, kinds: as in `layers_of`; crosses: as
    for `Tape`. The closure returns the loss; where it calls backward itself, the cotangents stream from that pass.
    Raises BadInput for a closure without a tensor loss, UncoveredUse for a parameter no call covers.
    """
    streamed: list[Recorded] = []

    def on_backward(tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        graph = prove(tape, total, weight, need_loss=False)
        layers = layers_of(tape, graph, ours, matrices, kinds) if is_finite(total) else []
        inside = {name for layer in layers for name in layer.names}
        rest = {n: p for n, p in tape.parameters.items() if n not in inside and ours(p)}
        received: dict[int, Tensor] = {}
        samples = count(tape, graph, total)
        with (
            _fresh_gradients(rest) as gradients,
            OnePass(total) as within,
            hooked(
                [part.use for layer in layers for part in layer.parts],
                lambda use, g: received.__setitem__(use.index, g.detach()),
                within,
            ),
        ):
            out = run()
        _fill(layers, received)
        layers = [layer for layer in layers if layer.use.index in received]
        streamed.append(Recorded(total.detach(), tape, layers, received, gradients, samples))
        return out

    tape = Tape(model, on_backward, keep_outputs=True, crosses=crosses)
    with tape, torch.enable_grad():
        loss = closure()
    check_loss(loss)
    if len(streamed) > 1:
        raise BadInput(f"the closure called backward {len(streamed)} times; one step takes one loss: add them up")
    return replace(streamed[0], loss=loss.detach()) if streamed else pulled(tape, loss, ours, matrices, kinds)


def pulled(
    tape: Tape,
    loss: Tensor,
    ours: Callable[[Tensor], bool] = lambda p: True,
    matrices: bool = False,
    kinds: Kinds | None = None,
) -> Recorded:
    """The layers of a recorded loss, with cotangents from one vector-Jacobian product without weight gradients."""
    graph = prove(tape, loss, None, need_loss=False)
    if not is_finite(loss):
        return Recorded(loss.detach(), tape, [], {}, {})
    layers = layers_of(tape, graph, ours, matrices, kinds)
    inside = {name for layer in layers for name in layer.names}
    rest = {n: p for n, p in tape.parameters.items() if n not in inside and ours(p)}
    uses = [part.use for layer in layers for part in layer.parts]
    found = pull([loss], [torch.ones_like(loss)], [*(use.edge for use in uses), *rest.values()])
    cotangents = {use.index: g for use, g in zip(uses, found, strict=False) if g is not None}
    _fill(layers, cotangents)
    layers = [layer for layer in layers if layer.use.index in cotangents]
    gradients = {n: dense(g) for n, g in zip(rest, found[len(uses) :], strict=True) if g is not None}
    return Recorded(loss.detach(), tape, layers, cotangents, gradients, count(tape, graph, loss))


def _fill(layers: list[Layer], cotangents: dict[int, Tensor]) -> None:
    """Set zero cotangents at uses that the loss does not depend on, of layers with another use that it does."""
    for layer in layers:
        if len(layer.others) and any(part.use.index in cotangents for part in layer.parts):
            for part in layer.parts:
                if part.use.index not in cotangents:
                    cotangents[part.use.index] = layer.parameter.new_zeros(part.use.call.out_shape)


@contextmanager
def _fresh_gradients(params: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A dict that is filled on exit with what a backward pass inside adds to the parameters' `.grad`."""
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
def problem_of(
    recorded: Recorded, layer: Layer, gamma: float, transfer: Transfer, target: Target | None = None,
    pulls: tuple[Pull, ...] = (),
) -> LocalProblem:  # fmt: skip
    """The local problem of a layer, from its rows, its targets and its parameters as matrices.

    target: `(z, g, transfer) -> y`; the default is `f(z) − γ g`, with which the problem keeps `g` and γ.
    """
    parts = layer.parts
    a = layer.join([part.input() for part in parts])
    g = layer.join([part.rows(recorded.cotangents[part.use.index]) for part in parts])
    weight = layer.matrix()
    bias = None
    if len(layer.names) > 1:
        bias = recorded.tape.parameters[layer.names[1]].detach().view(weight.shape[0], weight.shape[1])
    shifted = any(part.shifted for part in parts)
    # a look-up's rows leave out the padding's output as they do its cotangent: predicted, it stays where it is
    known = all(part.value is not None for part in parts) and not layer.kind.indexed
    z = layer.join([part.rows(part.output()) for part in parts]) if shifted or known else None
    after: list[Tensor] = []
    if transfer is layer.transfer and not layer.kind.indexed:
        after = [part.rows(part.after) for part in parts if part.after is not None]
    rest = None
    if z is None or shifted:
        predicted = predict(LocalProblem(a, weight, bias, g))
        rest, z = (z - predicted, z) if z is not None else (None, predicted)
    if target is None:
        y = target_m(z, g, gamma, transfer, y=layer.join(after) if len(after) == len(parts) else None)
        return LocalProblem(a, weight, bias, y, transfer, None, g, gamma, rest, pulls)
    return LocalProblem(a, weight, bias, target(z, g, transfer), transfer, rest=rest, pulls=pulls)
