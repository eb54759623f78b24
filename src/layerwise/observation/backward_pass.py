"""One backward pass that is observed: which cotangents are sent, and the values of each quantity."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import AmbiguousSamples, BadInput, SamplesMixed, Undefined
from layerwise.gradient.derived import carries, without_rows
from layerwise.gradient.parameter import Gather, ParameterGradient
from layerwise.gradient.parts import Part, parts_of
from layerwise.graph.cotangents import Averaged, Cotangent, Exact, Gradient, Sampled, Second
from layerwise.graph.coverage import Graph
from layerwise.graph.loss_curvature import LossCurvature, loss_curvatures
from layerwise.graph.samples import SampleLayout, measure
from layerwise.losses import DeclaredLikelihood, Likelihood
from layerwise.observation.guards import Sent
from layerwise.observation.union import Batch, Values
from layerwise.quantities.base import Quantity
from layerwise.quantities.kfra.recursion import averaged
from layerwise.tape.pull import alone, pull
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use

__all__ = ["Pass"]

_COTANGENT_ELEMENTS = 2**22  # of a stack of columns sent back together; convolutions go one by one


class Pass:
    """One backward pass: its likelihoods, its layout, and the values of each quantity."""

    def __init__(
        self,
        tape: Tape,
        graph: Graph,
        known: Sequence[Likelihood],
        quantities: Sequence[Quantity],
        model: Any,
        samples: int | None,
        scale: str,
        dtype: torch.dtype | None,
    ) -> None:
        self.tape, self.graph, self.quantities, self.dtype = tape, graph, quantities, dtype
        self.likelihoods = known
        self.layout: SampleLayout | None = None
        self._flat: Collection[str] = ()  # parameters whose rows need no sample structure where none is asked for
        self._measured = model, samples
        n = self._samples(samples)
        declared = [*known, *(DeclaredLikelihood(own.call, n) for own in graph.own)]
        self._check_scale(scale, declared)
        for q in quantities:
            q.check_losses(declared)
        told_apart = (Exact, Sampled) if graph.own else Exact
        apart = self._without_rows()
        if apart or any(q.needs_samples or isinstance(q.cotangent, told_apart) for q in quantities):
            self.layout = measure(tape, graph, model, samples)
        self.batch = Batch(self._samples(samples), _terms(declared), _untold(declared))
        self.union = self.batch.union(scale)
        streams = [i for i, q in enumerate(quantities) if isinstance(q.cotangent, Gradient)]
        self.streams = sorted(streams, key=lambda i: not quantities[i].leads)
        self._values: dict[int, Values] = {i: {} for i in range(len(quantities))}
        self._stacks: dict[int, dict[str, list[tuple[Tensor, ...]]]] = {}  # of quantities that keep columns apart
        self._gather = Gather(tape, graph.uses)
        self._received: set[int] = set()
        self._again = [i for i in self.streams if quantities[i].revisits]
        self.sent = Sent()
        self._later = False
        self.keeps_inputs = False  # whether what uses hold is read after the user's backward pass
        self._held: list[tuple[Use, Tensor, list[tuple[str, Part]]]] = []  # all cotangents, for a second stage

    def _without_rows(self) -> set[str]:
        """The parameters of quantities that ask for no samples, but whose samples must be told apart nevertheless."""
        asked = [q for q in self.quantities if not (q.needs_samples or isinstance(q.cotangent, Second))]
        if not asked:
            return set()
        apart = without_rows(self.tape, self.graph.uses)
        if all(q.lenient for q in asked):
            self._flat = self.tape.parameters.keys()
            return set()
        self._flat = self.tape.parameters.keys() - apart
        return apart

    def _check_scale(self, scale: str, declared: Sequence[Likelihood]) -> None:
        untold, means = _untold(declared), {lik.mean for lik in declared}
        if scale == "sample" and untold is not None:
            raise Undefined(
                f'scale="sample" asks for N g_n under a mean, but whether {untold} is a mean is not said; mark it: '
                'lw.as_loss(fn, reduction="mean") or "sum", or take scale="loss"'
            )
        if scale == "sample" and len(means) > 1:
            raise Undefined('scale="sample" asks for N g_n under a mean, but this total adds a mean and a sum')
        if scale == "sample" and any(loss.call.reduction == "none" for loss in self.graph.losses):
            raise Undefined(
                'scale="sample" asks for N g_n under a mean, but this loss is reduced by hand (reduction="none"), so '
                'whether it is a mean cannot be told; use reduction="mean" or "sum", or scale="loss"'
            )

    def _samples(self, samples: int | None) -> int:
        if self.layout is not None:
            return self.layout.n
        if samples is not None:
            return samples
        batch = self.graph.batch
        return batch.shape[0] if batch is not None and batch.dim() else 1

    # -- roots of the loss Hessian, sent before the user's backward pass -----------------------------------

    def pull_roots(self) -> None:
        """Send the columns that the quantities ask for, shared between those that ask for the same."""
        wanted: dict[Cotangent, list[int]] = {}
        for i, q in enumerate(self.quantities):
            if isinstance(q.cotangent, Second):
                self._values[i] = q.compute_graph(self.tape, self.graph, self._known_layout())
            elif not isinstance(q.cotangent, Gradient):
                wanted.setdefault(q.cotangent, []).append(i)
        for cotangent, indices in wanted.items():
            if isinstance(cotangent, Averaged):
                self._average(cotangent, indices)
                continue
            assert not isinstance(cotangent, Gradient | Second)
            self._check_size(cotangent, indices)
            column = 0
            for head in self._heads:
                for stack in cotangent.columns(head.likelihood, head.rows, _chunk_size(self.graph)):
                    self._send(head, stack, indices, column)
                    column += len(stack)
        for i, stacks in self._stacks.items():
            for name in list(stacks):
                self._values[i][name] = tuple(torch.cat(t, 1) for t in zip(*stacks.pop(name), strict=True))

    def _average(self, cotangent: Averaged, indices: Sequence[int]) -> None:
        """The averaged blocks, shared between the quantities that ask for them."""
        assert self.layout is not None
        for gradient in averaged(self.tape, self.graph, self._heads, self.layout, cotangent.max_bytes):
            for i in indices:
                self._compute(i, gradient)

    def pull_gradient(self) -> None:
        """Both stages of quantities that revisit, where some gradient goes back through a graph of parameters.

        The user's backward pass frees that graph, so the gradient's cotangents are sent once more, before it.
        """
        if not self._again or self.tape.partial or not any(carries(self.tape, use) for use in self.graph.uses):
            return
        weight = torch.ones_like(self.graph.total) if self.graph.weight is None else self.graph.weight
        uses = self.graph.uses
        pulled = pull([self.graph.total], [weight], [use.edge for use in uses])
        found = [(use, g.detach()[None]) for use, g in zip(uses, pulled, strict=True) if g is not None]
        self.sent = Sent(found)
        self._later = True
        for last in (False, True):
            self._held = [(use, g, []) for use, g in found]
            if last:
                del found
                self._revisit()
            else:
                for gradient in self._once_more():
                    for i in self._again:
                        self._compute(i, gradient)
        self.streams = [i for i in self.streams if i not in self._again]
        self._again, self._later = [], False

    @property
    def listens(self) -> bool:
        """Whether the cotangents of the user's own backward pass are wanted."""
        return bool(self.streams or self.sent)

    def release(self) -> None:
        """Let go of what uses hold, where the user's backward pass is not to be observed: it wants the memory."""
        if not (self.streams or self.keeps_inputs):
            for use in self.graph.uses:
                use.release()

    def _known_layout(self) -> SampleLayout | None:
        """The samples' layout, or None where they cannot be told apart."""
        if self.layout is None:
            with suppress(SamplesMixed, AmbiguousSamples, BadInput):
                return measure(self.tape, self.graph, *self._measured)
        return self.layout

    def _check_size(self, cotangent: Any, indices: Sequence[int]) -> None:
        """Let the quantities refuse a number of columns before any is sent."""
        asked = [self.quantities[i] for i in indices if type(self.quantities[i]).check_size is not Quantity.check_size]
        if asked:
            count = sum(cotangent.count(head.likelihood, head.rows) for head in self._heads)
            sizes = {name: self.tape.parameters[name].numel() for name in self.graph.parameters()}
            for quantity in asked:
                quantity.check_size(count, self.batch.samples, sizes)

    @cached_property
    def _heads(self) -> list[LossCurvature]:
        return loss_curvatures(self.graph, self.likelihoods, self.layout)

    def _send(self, head: LossCurvature, stack: Tensor, indices: list[int], column: int) -> None:
        uses = self.graph.uses
        edges = [use.edge for use in uses]
        if len(stack) == 1:
            sent = [x[0] for x in head.cotangents(stack)]
            pulled = [None if g is None else g[None] for g in pull(head.edges, sent, edges)]
        else:
            pulled = pull(head.edges, head.cotangents(stack), edges, batched=True)
        parts: dict[tuple[str, bool], list[Part]] = {}
        flags = {self.quantities[i].needs_samples for i in indices}
        asked = [self.quantities[i] for i in indices]
        lenient = {flag: all(q.lenient for q in asked if q.needs_samples == flag) for flag in flags}
        for use, g in zip(uses, pulled, strict=True):
            g = stack.new_zeros(len(stack), *use.call.out_shape) if g is None else g
            for flag in flags:
                for name, part in self._parts(use, g, flag, lenient[flag]):
                    parts.setdefault((name, flag), []).append(part)
        shared: dict[Any, Any] = {}
        for (name, flag), found in parts.items():
            gradient = ParameterGradient(name, self.tape.parameters[name].shape, found, column, shared)
            for i in indices:
                if self.quantities[i].needs_samples == flag:
                    self._compute(i, gradient)

    def _parts(self, use: Use, g: Tensor, needs_samples: bool = True, lenient: bool = False) -> list[tuple[str, Part]]:
        where = None if self.layout is None else self.layout.uses[use.index]
        flat = () if needs_samples else self._flat
        found = parts_of(self.tape, use, g, where, self._later, flat, lenient)
        return [(name, part.to(self.dtype)) for name, part in found]

    # -- the gradient, streamed from the user's backward pass ----------------------------------------------

    def receive(self, use: Use, g: Tensor) -> None:
        """Take the cotangent of one use; a parameter whose uses have all arrived is contracted at once."""
        with alone(g.device.type):
            self._receive(use, g)

    def _receive(self, use: Use, g: Tensor) -> None:
        self._received.add(use.index)
        g = g.detach()[None]
        self.sent.arrived(use, g)
        if not self.streams:
            return
        parts = self._parts(use, g, lenient=all(self.quantities[i].lenient for i in self.streams))
        if self._again:
            self._held.append((use, g, parts if any(part.carried for _, part in parts) else []))
        for gradient in self._gather.add(use, parts):
            for i in self.streams:
                self._compute(i, gradient)
            if not (self._again or self.keeps_inputs):
                for part in gradient.parts:
                    if self._gather.complete(part.use):
                        part.use.release()

    def _revisit(self) -> None:
        """The second stage: every gradient once more, from the held cotangents, which are let go on the way."""
        if not self._again:
            return
        first = {i: self._values[i] for i in self._again}
        surveys = {i: self.quantities[i].survey(first[i], self.union) for i in self._again}
        for gradient in self._once_more():
            for i in self._again:
                if gradient.name in first[i]:
                    self._values[i][gradient.name] = self.quantities[i].revisit(gradient, surveys[i])

    def _once_more(self) -> Iterator[ParameterGradient]:
        gather = Gather(self.tape, self.graph.uses)
        self._held.reverse()
        while self._held:
            use, g, parts = self._held.pop()
            yield from gather.add(use, parts or self._parts(use, g))
        yield from gather.rest()

    def _compute(self, i: int, gradient: ParameterGradient) -> None:
        quantity, name = self.quantities[i], gradient.name
        if not quantity.covers(gradient):
            return
        new = quantity.compute(gradient)
        if isinstance(quantity.cotangent, Gradient):
            new = tuple(_own(t, gradient) if isinstance(t, Tensor) else t for t in new)
        if quantity.stacks:
            self._stacks.setdefault(i, {}).setdefault(name, []).append(new)
        else:
            old = self._values[i].get(name)
            self._values[i][name] = new if old is None else tuple(a + b for a, b in zip(old, new, strict=True))

    def values(self, reached: Collection[str]) -> dict[int, Values]:
        """The values of all quantities, complete: a use that saw no cotangent counts as zero, or is refused.

        reached: the parameters that the backward pass gave a gradient.
        """
        if self.streams:
            for gradient in self._gather.rest():  # some of its uses received no cotangent: they contribute nothing
                for i in self.streams:
                    self._compute(i, gradient)
            if self.tape.partial:  # `inputs=` asks for the gradients of some parameters alone
                for i in self.streams:
                    self._values[i] = {name: v for name, v in self._values[i].items() if name in reached}
                self._revisit()
                return self._values
            missing = [use for use in self.graph.uses if use.index not in self._received]
            alone = {name for use in missing for name in use.names} - set(self._values[self.streams[0]])
            if alone:
                raise Undefined(
                    f"the backward pass never reached {missing[0]}, so nothing was recorded for "
                    f"{', '.join(sorted(alone))}: something between it and the loss passes no gradient on"
                )
            self._revisit()
        return self._values


# -- helpers ------------------------------------------------------------------------------------------------


def _chunk_size(graph: Graph) -> int:
    """Columns sent back at once: as many as the uses' cotangents fit in the cache's neighbourhood."""
    elements = sum(use.call.out_shape.numel() for use in graph.uses)
    return max(1, _COTANGENT_ELEMENTS // max(1, elements))


def _own(t: Any, gradient: ParameterGradient) -> Any:
    """The tensor in memory of its own: the cotangent of one sample can become `.grad`, which is added to in place."""
    if not isinstance(t, Tensor):  # sums of its own, such as Kronecker factors
        return t
    held = [part.dense if part.rows is None else part.rows.g for part in gradient.parts]
    storage = t.untyped_storage()._cdata  # not its data_ptr, which would end a lazy copy
    shared = any(isinstance(g, Tensor) and g.untyped_storage()._cdata == storage for g in held)
    return t.clone() if shared and t.numel() <= gradient.shape.numel() else t


def _untold(likelihoods: Sequence[Likelihood]) -> str | None:
    """The name of a loss that does not say whether it is a mean."""
    return next((lik.call for lik in likelihoods if lik.mean is None), None)


def _terms(likelihoods: Sequence[Likelihood]) -> tuple[float, ...] | None:
    if not all(lik.mean for lik in likelihoods):
        if any(lik.mean for lik in likelihoods):
            return tuple(float(lik.terms) if lik.mean else float("nan") for lik in likelihoods)
        return None
    return tuple(float(lik.terms) for lik in likelihoods)
