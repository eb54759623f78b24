"""Quantities of the gradient, computed from the cotangents of the user's own backward pass while it runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import Undefined
from layerwise.gradient.derived import has_derived_gradient
from layerwise.gradient.parameter import ParameterGradient, PartCollector
from layerwise.gradient.parts import DensePart, LaterPart, Part, RowsPart
from layerwise.gradient.row_sums import summed_weights
from layerwise.gradient.stacked_rows import RowStack, RowStacks
from layerwise.graph.walk import Node, by_node, finished
from layerwise.observation.backward_pass import BackwardPass
from layerwise.observation.guards import Fingerprints
from layerwise.tape.pull import pull, without_autocast
from layerwise.tape.uses import Use
from layerwise.tensors import lazy_copy

__all__ = ["SecondStage", "Stream"]


class Stream:
    """Contract every parameter's gradient as soon as the cotangents of all its uses have arrived.

    keeps_inputs: whether what uses hold is read after the user's backward pass. summed: the weights whose gradient that
    pass may leave out, for `sums` will have it.
    """

    def __init__(self, observed: BackwardPass, keeps_inputs: bool) -> None:
        self._observed, self._keeps_inputs = observed, keeps_inputs
        quantities = observed.quantities
        self._indices = sorted(observed.streamed, key=lambda i: not quantities[i].computed_first)
        self._second = SecondStage(observed, [i for i in self._indices if quantities[i].revisits])
        self._fingerprints = Fingerprints()
        if self._second.must_come_first():
            self._fingerprints = self._second.run_both()
            self._indices = [i for i in self._indices if i not in self._second.indices]
            self._second = SecondStage(observed, [])
        self._rows_only = all(quantities[i].rows_only for i in self._indices)
        self.summed = self._summed_weights()
        self.sums: dict[str, Tensor] = {}
        graph = observed.graph
        self._collector = PartCollector(observed.tape, graph.asked_uses, graph.asked, self.summed)
        self._received: set[int] = set()
        self._stacks = self._row_stacks()

    def _summed_weights(self) -> frozenset[str]:
        """The weights whose gradient is the sum of per-sample gradients that some quantity forms."""
        observed, graph = self._observed, self._observed.graph
        if not (observed.sums_rows and observed.layout is not None):
            return frozenset()

        def forms(*sizes: int) -> bool:
            return any(observed.quantities[i].forms_rows(*sizes) for i in self._indices)

        found = summed_weights(observed.tape, graph.asked_uses, observed.layout.uses, forms)
        return found if graph.asked is None else found & graph.asked

    def _row_stacks(self) -> RowStacks | None:
        """The stacks of small calls that are alike, where all quantities can be computed of many parameters at once."""
        observed, asked = self._observed, [self._observed.quantities[i] for i in self._indices]
        if self._second.indices or not asked or not all(q.rows_of_many for q in asked) or not observed.stackable:
            return None
        graph = observed.graph
        found = RowStacks(observed.tape, graph.asked_uses, graph.asked, self.summed, self._contract_all)
        return found or None

    def awaited(self) -> list[Use]:
        """The uses whose cotangents are wanted from the user's backward pass."""
        return self._observed.graph.asked_uses if self._indices or self._fingerprints else []

    def release(self) -> None:
        """Let go of what uses hold, where nothing will read it: the user's backward pass wants the memory."""
        if self._keeps_inputs:
            return
        read = {use.index for use in self._observed.read_uses()} if self._indices else set()
        for use in self._observed.graph.uses:
            if use.index not in read:
                use.release()

    def send(self, total: Tensor) -> None:
        """Send the cotangents of a total to the uses, and to no parameter; `receive` takes them as they arrive.

        Autograd is asked for the uses with no other one below them: the others lie on the way to these.
        """
        lowest = _lowest(total, self.awaited())
        found = torch.autograd.grad([total], [use.edge for use in lowest], allow_unused=True) if lowest else ()
        for use, g in zip(lowest, found, strict=True):
            if g is not None and use.index not in self._received:
                self.receive(use, g)

    def receive(self, use: Use, g: Tensor) -> None:
        """Take the cotangent of one use; a parameter whose uses have all arrived is contracted at once."""
        with torch._C.DisableTorchFunction(), without_autocast(g.device.type):
            self._receive(use, g)

    def _receive(self, use: Use, g: Tensor) -> None:
        self._received.add(use.index)
        g = g.detach().unsqueeze(0)
        self._fingerprints.compare(use, g)
        if not self._indices:
            return
        if self._stacks is not None and self._stacks.take(use, g, self._observed.samples_of(use)):
            self._collector.leave(use)
            if not self._keeps_inputs:
                use.release()
            return
        parts = self._observed.parts(use, g, rows_only=self._rows_only)
        self._second.hold(use, g, parts)
        for gradient in self._collector.add(use, parts):
            self._contract(gradient)
            if not (self._second.indices or self._keeps_inputs):
                for part in gradient.parts:
                    if self._collector.complete(part.use):
                        part.use.release()

    def _contract(self, gradient: ParameterGradient) -> None:
        _compute(self._observed, self._indices, gradient)
        if gradient.name in self.summed:
            self.sums[gradient.name] = gradient.sum().to(self._observed.tape.parameters[gradient.name].dtype)

    def _contract_all(self, stack: RowStack) -> None:
        """Contract the gradients of many parameters alike at once, and share out their values."""
        observed = self._observed
        for place, names in enumerate(stack.names):
            forms: dict[str | None, ParameterGradient] = {}
            for i in self._indices:
                form = observed.quantities[i].rows_of_many
                if form not in forms:
                    forms[form] = observed.gradient_of_many(names[0], stack.part(place, form == "groups"))
                (values,) = observed.compute([i], forms[form])
                each = [t.unflatten(0, (len(names), -1)) if form == "samples" else t for t in values]
                observed.values[i].update(zip(names, zip(*each, strict=True), strict=True))

    def complete(self) -> dict[str, Tensor]:
        """Contract gradients of which some use received no cotangent, which counts as zero; copies of all `sums`."""
        self._fingerprints.check()
        if self._indices:
            if self._stacks is not None:
                self._stacks.rest()
            for gradient in self._collector.rest():
                self._contract(gradient)
        return {name: lazy_copy(g) for name, g in self.sums.items()}

    def finish(self, reached: Collection[str]) -> None:
        """Complete the values, or refuse a use that received no cotangent though its parameter got a gradient.

        reached: the parameters that the backward pass gave a gradient.
        """
        if not self._indices:
            return
        values, graph = self._observed.values, self._observed.graph
        if self._observed.tape.partial:  # `inputs=` asks for the gradients of some parameters alone
            for i in self._indices:
                values[i] = {name: v for name, v in values[i].items() if name in reached}
        else:
            missing = [use for use in graph.asked_uses if use.index not in self._received]
            unseen = {name for use in missing for name in use.names} - set(values[self._indices[0]])
            unseen &= {*reached, *self.summed}  # what got no gradient at all is left out, as what no call reads
            unseen = unseen if graph.asked is None else unseen & graph.asked
            if unseen:
                raise Undefined(
                    f"the backward pass never reached {missing[0]}, so nothing was recorded for "
                    f"{', '.join(sorted(unseen))}, which may have a gradient by another way: a hook or a function of "
                    "your own between that call and the loss keeps its gradient back; take it out, or freeze these"
                )
        self._second.run()


class SecondStage:
    """Two-stage quantities (ClippedGrad): after `compute` of all parameters, `revisit` sees every gradient once more.

    indices: their numbers.
    """

    def __init__(self, observed: BackwardPass, indices: Sequence[int]) -> None:
        self._observed, self.indices = observed, indices
        self._held: list[tuple[Use, Tensor, list[tuple[str, Part]]]] = []

    def hold(self, use: Use, g: Tensor, parts: list[tuple[str, Part]]) -> None:
        """Keep a cotangent, and its parts where they came back through a graph that the backward pass frees."""
        if self.indices:
            self._held.append((use, g, parts if any(_by_autograd(part) for _, part in parts) else []))

    def must_come_first(self) -> bool:
        """Whether both stages must run before the user's backward pass, which frees the graph of derived weights."""
        tape, uses = self._observed.tape, self._observed.graph.asked_uses
        return bool(self.indices) and not tape.partial and any(has_derived_gradient(tape, use) for use in uses)

    def run_both(self) -> Fingerprints:
        """Run both stages on cotangents pulled before the user's backward pass; what to compare its own with."""
        graph = self._observed.graph
        weight = torch.ones_like(graph.total) if graph.weight is None else graph.weight
        uses = graph.asked_uses
        pulled = pull([graph.total], [weight], [use.edge for use in uses])
        self._held = [(use, g.detach()[None], []) for use, g in zip(uses, pulled, strict=True) if g is not None]
        del pulled
        fingerprints = Fingerprints([(use, g) for use, g, _ in self._held])
        for gradient in self._gradients(list(self._held), later=True):
            _compute(self._observed, self.indices, gradient)
        self.run(later=True)
        return fingerprints

    def run(self, later: bool = False) -> None:
        """Run the second stage on the held cotangents, which are let go on the way."""
        if not self.indices:
            return
        observed = self._observed
        first = {i: observed.values[i] for i in self.indices}
        surveys = {i: observed.quantities[i].survey(first[i], observed.union) for i in self.indices}
        for gradient in self._gradients(self._held, later):
            for i in self.indices:
                if gradient.name in first[i]:
                    observed.values[i][gradient.name] = observed.quantities[i].revisit(gradient, surveys[i])

    def _gradients(
        self, held: list[tuple[Use, Tensor, list[tuple[str, Part]]]], later: bool
    ) -> Iterator[ParameterGradient]:
        graph = self._observed.graph
        collector = PartCollector(self._observed.tape, graph.asked_uses, graph.asked)
        held.reverse()
        while held:
            use, g, parts = held.pop()
            yield from collector.add(use, parts or self._observed.parts(use, g, later=later))
        yield from collector.rest()


def _lowest(total: Tensor, uses: Sequence[Use]) -> list[Use]:
    """The uses on the graph of a total that have none of the others below them."""
    use_at = by_node(uses)
    above: set[Node] = set()  # nodes with a use at or below them
    found = []
    for node in finished([total.grad_fn], {}):
        lower = any(child in above for child, _ in node.next_functions)
        if node in use_at and not lower:
            found += use_at[node]
        if node in use_at or lower:
            above.add(node)
    return found


def _compute(observed: BackwardPass, indices: Sequence[int], gradient: ParameterGradient) -> None:
    covering = [i for i in indices if observed.quantities[i].covers(gradient)]
    for i, values in zip(covering, observed.compute(covering, gradient), strict=True):
        observed.add(i, gradient, tuple([_unshared(t, gradient) for t in values]))


def _by_autograd(part: Part) -> bool:
    """Whether a contribution came back through a graph of parameters, which a backward pass frees."""
    return isinstance(part, LaterPart) or (isinstance(part, DensePart) and part.by_autograd)


def _unshared(t: Any, gradient: ParameterGradient) -> Any:
    """The tensor in memory of its own: the cotangent of one sample can become `.grad`, which is added to in place."""
    if not isinstance(t, Tensor):  # a value of several tensors, such as Kronecker factors
        return t
    storage = t.untyped_storage()._cdata  # not its data_ptr, which would end a lazy copy
    for part in gradient.parts:
        held = part.rows.cotangents if isinstance(part, RowsPart) else ()
        held = (part.values,) if isinstance(part, DensePart) else held
        for g in held:
            if g.untyped_storage()._cdata == storage and t.numel() <= gradient.shape.numel():
                return t.clone()
    return t
