"""Runs of a closure with codes, recorded as cotangents of the relaxed objective.

At every use with a code, `c + u − z` is `−γ` times the cotangent, with γ = B/μ, however the codes moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.graph.coverage import prove
from layerwise.graph.samples import count
from layerwise.local.codes.code_step import CodeStep, Terms, sweep
from layerwise.local.codes.gauss_newton import AssumedCodes, damped_cotangents, pulled_roots
from layerwise.local.layers.kinds import Kinds
from layerwise.local.layers.layer import Layer, layers_of
from layerwise.local.layers.record import Recorded, may_be_finite, pulled
from layerwise.local.problem import contract
from layerwise.optim.base import refuse_unreached
from layerwise.replay.coded import CodedModel
from layerwise.replay.state import check_loss
from layerwise.tape.modes import WithoutScalers
from layerwise.tape.tape import Tape
from layerwise.tensors import dense, widened, without_grad

__all__ = [
    "Coded",
    "coded_layers",
    "gauss_newton",
    "hidden_uses",
    "recorded_on_codes",
    "samples_of",
    "sparse",
    "swept",
    "weight_gradients",
]

Ours = Callable[[Tensor], bool]


class Coded(NamedTuple):
    """A run with codes: at every use with one, the cotangent is `−1/γ` times the displacement of the code, γ = B/μ.

    codes: those of a sweep, by use index. slopes: the gradients of the layers' weights by backpropagation. assumed:
    what the codes assume, or None.
    """

    run: Recorded
    codes: Mapping[int, Tensor] = {}
    slopes: Callable[[], Mapping[str, Tensor]] = dict
    assumed: AssumedCodes | None = None

    def settled(self) -> Coded:
        """Codes that assume nothing; waits where they do."""
        return self if self.assumed is None else self._replace(run=self.assumed.settled(self.run), assumed=None)


def gauss_newton(
    model: nn.Module | Mapping[str, Tensor],
    closure: Callable[[], Tensor],
    ours: Ours,
    gamma: Callable[[Recorded], Callable[[str], float]],
    kinds: Kinds | None = None,
    samples: int | Tensor | None = None,
) -> tuple[Recorded, Recorded, AssumedCodes | None]:
    """A run with damped Gauss-Newton cotangents, the same run with the loss's own, and what the former assumes.

    gamma: of a run, γ of a layer's name. samples: as the user says. Backward calls of the closure are left out. Raises
    as `pulled_roots`.
    """
    tape = Tape(model, lambda tape, total, weight, run: None, keep_outputs=True, crosses=True)
    with torch.enable_grad(), tape, WithoutScalers():
        loss = closure()
    check_loss(loss)
    plain = pulled(tape, loss, ours, matrices=True, kinds=kinds)
    if not plain.layers:
        return plain, plain, None
    roots = pulled_roots(model, plain, loss, samples)
    found, assumed = damped_cotangents(plain, roots, gamma(plain))
    return found, plain, assumed


@without_grad
def weight_gradients(run: Recorded) -> dict[str, Tensor]:
    """The gradients of the layers' weights by name, from the cotangents of a run."""
    found = {}
    for layer in run.layers:
        g = layer.join([part.rows(run.cotangents[part.use.index]) for part in layer.parts])
        size_in = layer.matrix().shape[-1]
        found[layer.name] = layer.fold(contract(g, layer.join([part.input() for part in layer.parts]), size_in))
    return found


@without_grad
def sparse(recorded: Recorded, gamma: Callable[[str], float], threshold: Callable[[Layer], float]) -> Recorded:
    """The run with codes soft-thresholded: `c = S(z − γ g, λ/μ)`. threshold: λ/μ of a layer, 0 for none."""
    cotangents = dict(recorded.cotangents)
    for layer in recorded.layers:
        if (most := threshold(layer)) > 0:
            for part in layer.parts:
                z, size = part.output(), gamma(layer.name)
                code = F.softshrink(z - size * cotangents[part.use.index], most)
                cotangents[part.use.index] = (z - code) / size
    return dataclasses.replace(recorded, cotangents=cotangents)


def hidden_uses(coded: CodedModel, layers: list[Layer]) -> dict[int, Layer]:
    """The uses that carry codes, those whose output another layer reads, with their layers."""
    every = {part.use.index: layer for layer in layers for part in layer.parts}
    readers = coded.consumers(every)
    return {i: layer for i, layer in every.items() if any(m in every for m in readers[i][0])}


def swept(
    coded: CodedModel, layers: list[Layer], terms: Terms, step: CodeStep, ours: Ours, counted: int | str
) -> tuple[Recorded, dict[int, Tensor]]:
    """Move the codes from the layers' outputs; returns the layers recorded on them, and the codes by use.

    counted: the samples, as `Recorded.counted`.
    """
    start = {part.use.index: part.output() for layer in layers for part in layer.parts
             if part.use.index in terms.coupling}  # fmt: skip
    codes = sweep(coded, start, terms, step)
    return recorded_on_codes(coded, layers, codes, terms, ours, counted), codes


def coded_layers(coded: CodedModel, ours: Ours, kinds: Kinds | None = None) -> list[Layer] | None:
    """The layers of a coded model's first run; None where its loss is known not to be finite.

    Raises BadInput where the loss depends on nothing that is ours.
    """
    refuse_unreached([coded.loss] if coded.loss.requires_grad else [])
    graph = prove(coded.tape, coded.loss, None, need_loss=False)
    refuse_unreached([name for name in graph.parameters() if ours(coded.tape.parameters[name])])
    return layers_of(coded.tape, graph, ours, matrices=True, kinds=kinds) if may_be_finite(coded.loss) else None


def samples_of(coded: CodedModel) -> int | str:
    """The number of samples of a coded model's batch, as `Recorded.counted`."""
    return count(coded.tape, prove(coded.tape, coded.loss, None, need_loss=False), coded.loss)


def recorded_on_codes(
    coded: CodedModel, layers: list[Layer], codes: Mapping[int, Tensor], terms: Terms, ours: Ours, counted: int | str
) -> Recorded:
    """The layers on inputs computed from the codes, with the relaxed objective's cotangents and gradients.

    A layer's output depends on its own weights and the codes alone, so no cotangent crosses a block.
    """
    every = [part.use.index for layer in layers for part in layer.parts]
    out = coded.piece(codes, every, True)
    assert out.loss is not None
    objective = out.loss
    for i, code in codes.items():
        if i not in out.predictions:  # a code from outside
            continue
        weight = terms.coupling[i] / terms.batch / 2
        objective = objective + weight * (terms.aim(i, code) - out.predictions[i]).square().sum()
    inside = {name for layer in layers for name in layer.names}
    rest = {n: p for n, p in coded.tape.parameters.items() if n not in inside and ours(p)}
    found = torch.autograd.grad(objective, [*(out.predictions[i] for i in every), *rest.values()], allow_unused=True)
    cotangents = {i: g for i, g in zip(every, found, strict=False) if g is not None}
    # nothing but its own term reads the output under a code: written out, for in half precision small ones vanish
    cotangents |= {i: terms.coupling[i] / terms.batch * (out.predictions[i].detach() - terms.aim(i, code))
                   for i, code in codes.items() if i in cotangents}  # fmt: skip
    moved = []
    for layer in layers:
        if layer.has_rows and any(part.use.index in cotangents for part in layer.parts):
            indices = [part.use.index for part in layer.parts]
            parts = [
                _on_new_data(part, out.calls[i], out.predictions[i])
                for part, i in zip(layer.parts, indices, strict=True)
            ]
            moved.append(dataclasses.replace(parts[0], others=tuple(parts[1:])))
            for part in parts:
                cotangents.setdefault(part.use.index, torch.zeros_like(out.predictions[part.use.index]))
    gradients = {n: widened(dense(g)) for n, g in zip(rest, found[len(every) :], strict=True) if g is not None}
    return Recorded(coded.loss.detach(), coded.tape, moved, cotangents, gradients, counted)


def _on_new_data(part: Layer, given: tuple[Any, Any], value: Tensor) -> Layer:
    """A use of a layer with the arguments of another call, and its output there."""
    parameters = {id(d.tensor) for d in part.use.used}
    args, kwargs = (_with_data(old, new, parameters) for old, new in zip(part.use.call[1:3], given, strict=True))
    call = part.use.call._replace(args=args, kwargs=kwargs)
    return dataclasses.replace(part, call=call, value=value.detach())


def _with_data(old: Any, new: Any, keep: set[int]) -> Any:
    """Arguments with detached new data and the old parameters, which a later call views again."""
    if isinstance(old, Tensor):
        return old if id(old) in keep else new.detach()
    if isinstance(old, dict):
        return {k: _with_data(v, new[k], keep) for k, v in old.items()}
    if isinstance(old, (list, tuple)):
        return type(old)(_with_data(v, w, keep) for v, w in zip(old, new, strict=True))
    return new
